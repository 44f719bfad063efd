"""KERNELS, the CUTLASS backward: refusals, the build and its cache, the call; where there is a compiler, the real library."""

import ctypes
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_config

import train_gpt as tg

ACT_GRAD = dict(mlp_kernel="act_grad", mlp_backward="cutlass")
CUDA = torch.device("cuda", 0)  # a name: nothing here runs on it


# ---- what is refused


@pytest.mark.parametrize("kernel", ["eager", "pre_post", "lsb"])
def test_only_the_form_that_stores_the_derivative_has_it(kernel):
    with pytest.raises(ValueError, match=f"MLP_BACKWARD=cutlass needs what MLP_KERNEL=act_grad stores, not {kernel}"):
        tg.config_from_env({"MLP_BACKWARD": "cutlass", "MLP_KERNEL": kernel})
    assert tg.config_from_env({"MLP_BACKWARD": "cutlass", "MLP_KERNEL": "act_grad"}).mlp_backward == "cutlass"
    assert tg.Config().mlp_backward == "triton"


@pytest.mark.parametrize("capability", [None, (10, 0), (12, 0)])
def test_other_chips_are_refused(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(tg, "cutlass_library", lambda *_: pytest.fail("nothing to build"))
    world = tg.World(0, 1, CUDA if capability else torch.device("cpu"), torch.bfloat16)
    with pytest.raises(tg.RunError, match=r"MLP_BACKWARD=cutlass is made for compute capability 9\.0 .*MLP_BACKWARD=triton"):
        tg.choose_kernels(tiny_config(**ACT_GRAD), world)


def on_a_hopper(monkeypatch, library: str, cfg: tg.Config) -> tg.Kernels:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tg, "cutlass_library", lambda cfg, world: library)
    monkeypatch.setattr(tg, "choose_attention", lambda *args: ("sdpa", tg.document_attention_reference, ""))
    return tg.choose_kernels(cfg, tg.World(0, 1, CUDA, torch.bfloat16))


def test_sizes_are_looked_at_before_the_first_step(monkeypatch):
    asked = []

    def entry(*args):
        asked.append(args)
        return b"Invalid status" if any(size % 8 for size in args[5:7]) else None

    monkeypatch.setattr(tg, "cutlass_entry", lambda library: entry)
    assert on_a_hopper(monkeypatch, "some.so", tiny_config(**ACT_GRAD)).mlp is not tg.leaky_mlp
    assert asked == [(None, None, None, None, 1, 128, 32, 0, None)]
    with pytest.raises(tg.RunError, match=r"multiples of 8, not 36 \(MODEL_DIM\), 144: Invalid status"):
        on_a_hopper(monkeypatch, "some.so", tiny_config(model_dim=36, lqer_enabled=False, **ACT_GRAD))


# ---- the build, with a script in the compiler's place


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A compiler that notes its calls, and headers; cfg points to them. Nothing else is on PATH or installed."""
    (tmp_path / "bin").mkdir()
    nvcc, headers = tmp_path / "bin" / "nvcc", tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    headers.parent.mkdir(parents=True)
    headers.write_text("#define CUTLASS_MAJOR 4")
    made = SimpleNamespace(nvcc=nvcc, headers=headers, calls=tmp_path / "calls", folder=tmp_path / "cache",
                           cfg=tiny_config(compile_cache_dir=str(tmp_path / "cache"), cutlass_path=str(tmp_path / "cutlass"), **ACT_GRAD))

    def write(version="release 13.0", body='while [ "$1" != -o ]; do shift; done; /bin/cp "$3" "$2"'):
        nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo {version}; exit 0; fi\necho "$@" >>{made.calls}\n{body}\n')
        nvcc.chmod(0o755)

    made.write, made.count = write, lambda: len(made.calls.read_text().splitlines()) if made.calls.exists() else 0
    write()
    which = shutil.which
    monkeypatch.setattr(tg.shutil, "which", lambda name, path=None: which(name, path=str(tmp_path / "bin")) if path is None else None)
    monkeypatch.setattr(tg.importlib.util, "find_spec", lambda name: None)
    return made


def test_a_library_is_built_once_and_named_by_all_it_comes_from(tools, monkeypatch):
    first = tg.build_cutlass(tools.cfg)
    call = tools.calls.read_text()
    assert all(flag in call for flag in (*tg.NVCC_FLAGS, f"-I{tools.headers.parents[1]}")) and "sm_90a" in call
    assert (tools.folder / first).read_text() == tg.CUTLASS_SOURCE  # what the script copied
    assert tg.build_cutlass(tools.cfg) == first and tools.count() == 1
    names = [first]
    tools.write(version="release 13.1")
    names.append(tg.build_cutlass(tools.cfg))
    tools.headers.write_text("#define CUTLASS_MAJOR 5")
    names.append(tg.build_cutlass(tools.cfg))
    for name, value in dict(NVCC_FLAGS=(*tg.NVCC_FLAGS, "-g"), CUTLASS_SOURCE=tg.CUTLASS_SOURCE + "// more").items():
        monkeypatch.setattr(tg, name, value)
        names.append(tg.build_cutlass(tools.cfg))
    assert len(set(names)) == tools.count() == 5 and {p.name for p in tools.folder.iterdir()} == {n.rsplit("/", 1)[1] for n in names}


def test_a_blank_cache_folder_is_torch_s_own(tools, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch" / "hub"))
    assert tg.build_cutlass(dataclasses.replace(tools.cfg, compile_cache_dir="")).startswith(f"{tmp_path}/torch/mlp_grad-")


def test_without_tools_any_build_of_this_source_will_do(tools, monkeypatch):
    made = tg.build_cutlass(tools.cfg)
    tools.nvcc.unlink()
    assert tg.build_cutlass(tools.cfg) == made
    assert tg.build_cutlass(dataclasses.replace(tools.cfg, cutlass_path="")) == made
    monkeypatch.setattr(tg, "CUTLASS_SOURCE", "another")
    with pytest.raises(tg.RunError, match="Missing to make it: nvcc"):
        tg.build_cutlass(tools.cfg)


@pytest.mark.parametrize("missing", ["nvcc", "headers", "path", "both"])
def test_missing_tools_are_named_with_the_way_to_get_them(tools, missing):
    cfg = tools.cfg
    if missing in ("nvcc", "both"):
        tools.nvcc.unlink()
    if missing in ("headers", "both"):
        tools.headers.unlink()
    if missing == "path":
        cfg = dataclasses.replace(cfg, cutlass_path="")
    with pytest.raises(tg.RunError) as caught:
        tg.build_cutlass(cfg)
    said = str(caught.value)
    assert ("nvcc (a CUDA toolkit" in said) == (missing in ("nvcc", "both"))
    assert ("pip install --no-deps nvidia-cutlass==" in said and "CUTLASS_PATH" in said) == (missing != "nvcc")
    assert "MLP_BACKWARD=triton" in said and tools.count() == 0 and not tools.folder.exists()


def test_a_failed_build_says_what_the_compiler_said_and_leaves_nothing(tools):
    tools.write(body='echo "mlp_grad.cu(3): error: no such type" >&2; exit 2')
    with pytest.raises(tg.RunError, match=r"(?s)nvcc failed with the headers in .*MLP_BACKWARD=triton.*error: no such type"):
        tg.build_cutlass(tools.cfg)
    assert not tools.folder.exists()
    tools.write()
    assert tg.build_cutlass(tools.cfg)


def on_ranks(cfg: tg.Config, devices: list) -> list:
    """What `cutlass_library` gives each rank: a path or an error. Threads whose collectives meet at a barrier."""
    meeting, box, out = threading.Barrier(len(devices)), {}, {}

    class Rank(tg.World):
        def gather(self, value):
            box[self.rank] = value
            meeting.wait(30)
            values = [box[r] for r in range(self.size)]
            meeting.wait(30)
            return values

    def work(rank: int) -> None:
        try:
            out[rank] = tg.cutlass_library(cfg, Rank(rank, len(devices), devices[rank], torch.bfloat16))
        except tg.RunError as e:
            out[rank] = e

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(devices))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return [out[rank] for rank in range(len(devices))]


def test_one_rank_of_a_machine_builds_and_the_others_wait(tools):
    paths = on_ranks(tools.cfg, [torch.device("cuda", i) for i in range(4)])
    assert tools.count() == 1 and len(set(paths)) == 1 and paths[0].endswith(".so")


def test_a_failure_on_one_rank_is_an_error_on_all(tools):
    tools.write(body="echo broken >&2; exit 1")
    errors = on_ranks(tools.cfg, [torch.device("cuda", i) for i in range(3)])
    assert tools.count() == 1 and all(isinstance(e, tg.RunError) and "broken" in str(e) for e in errors)


# ---- the call, with a function of this process in the library's place


def numbers(pointer: int, rows: int, columns: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_int16 * (rows * columns)).from_address(pointer), dtype=torch.bfloat16).view(rows, columns)


@pytest.fixture
def stand_in(monkeypatch):
    """`mlp_grad` as its C source defines it, on memory of the CPU."""
    def entry(grad, down, stored, out, m, n, k, device, stream):
        assert stream == 17
        product = numbers(grad, m, k).float() @ numbers(down, k, n).float()
        numbers(out, m, n).copy_((product * numbers(stored, m, n).float()).bfloat16())

    monkeypatch.setattr(tg, "cutlass_entry", lambda library: entry)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=17))


def mlp_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(2, 23, 24), up=(40, 24), down=(24, 40))
    return [(0.3 * torch.randn(shape, generator=generator)).bfloat16().requires_grad_() for shape in shapes.values()]


def gradients(mlp, inputs):
    out = mlp(*inputs, 0.3)
    return [out, *torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))]


def test_values_and_gradients_equal_the_definition(stand_in):
    inputs = mlp_inputs()
    reference = gradients(tg.leaky_mlp, [t.detach().double().requires_grad_() for t in inputs])
    for ours, exact in zip(gradients(tg.fused_mlp("act_grad", "some.so"), inputs), reference, strict=True):
        assert (ours.double() - exact).norm() < 0.015 * exact.norm()


def test_it_compiles_into_a_whole_graph(stand_in):
    mlp = tg.fused_mlp("act_grad", "some.so")
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, mlp_inputs()), gradients(mlp, mlp_inputs()), strict=True):
        torch.testing.assert_close(a, b)
    grad, down = torch.randn(6, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    torch.library.opcheck(tg.mlp_up_grad, (grad, down, torch.randn(6, 8).bfloat16(), 0.5, "act_grad", "some.so"))


def test_strided_inputs_reach_it_in_rows(stand_in):
    grad, down = torch.randn(16, 6).bfloat16().T, torch.randn(8, 16).bfloat16().T
    stored = torch.randn(6, 16).bfloat16()[:, ::2]
    out = tg.launch_cutlass(grad, down, stored, "some.so")
    torch.testing.assert_close(out, ((grad.float() @ down.float()) * stored.float()).bfloat16())


def test_a_refused_call_is_an_error_with_the_sizes(stand_in, monkeypatch):
    monkeypatch.setattr(tg, "cutlass_entry", lambda library: lambda *args: b"Error Internal")
    a = torch.zeros(8, 8, dtype=torch.bfloat16)
    with pytest.raises(tg.RunError, match=r"\(8, 8\) times \(8, 8\) on cpu: Error Internal"):
        tg.launch_cutlass(a, a, a, "some.so")


# ---- the real library; a minute to make, kept in build/ for the next time


def real_tools() -> str:
    """Why there can be no real library; blank if there can."""
    if not shutil.which("nvcc"):
        return "no nvcc"
    return "" if importlib.util.find_spec("cutlass_library") else "no CUTLASS: pip install --no-deps nvidia-cutlass==4.2.0.0"


needs_tools = pytest.mark.skipif(bool(real_tools()), reason=real_tools() or "none")


@pytest.fixture(scope="module")
def library():
    return tg.build_cutlass(tg.Config(compile_cache_dir=str(ROOT / "build")))


@needs_tools
def test_it_compiles_for_hopper_without_spilling(library):
    """Three groups of 128 threads share 65,536 registers; one block has 232,448 bytes of shared memory."""
    done = subprocess.run([sys.executable, ROOT / "bench" / "cubin.py", "cutlass"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    assert line["stack_bytes"] == line["spills"] == 0 and line["registers"] <= 168 and line["shared_bytes"] <= 232_448
    assert line["wgmma"] and line["tma_loads"]


@needs_tools
def test_cutlass_says_which_sizes_it_takes(library, monkeypatch):
    def problem(m, n, k):
        return tg.cutlass_entry(library)(None, None, None, None, m, n, k, 0, None)

    assert [problem(98304, 2048, 512), problem(5, 2048, 512), problem(1, 8, 8)] == [None] * 3  # rows are free
    assert all(problem(128, n, k) for n, k in ((2044, 512), (2048, 508)))
    assert on_a_hopper(monkeypatch, library, tiny_config(**ACT_GRAD)).mlp is not tg.leaky_mlp
    with pytest.raises(tg.RunError, match="multiples of 8"):
        on_a_hopper(monkeypatch, library, tiny_config(model_dim=36, lqer_enabled=False, **ACT_GRAD))


@needs_tools
@pytest.mark.parametrize("odd", range(4))
def test_an_address_that_the_copy_engine_can_not_take_is_an_error(library, odd):
    pointers = [4096 + 8 * (i == odd) for i in range(4)]
    assert tg.cutlass_entry(library)(*pointers, 128, 2048, 512, 0, None) == b"Error Misaligned Operand"


@needs_tools
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_launch_is_an_error(library):
    assert b"CUDA" in tg.cutlass_entry(library)(*[4096] * 4, 128, 2048, 512, 0, None)


@needs_tools
def test_the_real_compiler_s_complaint_is_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(tg, "CUTLASS_SOURCE", "int broken = nothing_of_that_name;\n")
    with pytest.raises(tg.RunError, match="nothing_of_that_name"):
        tg.build_cutlass(tg.Config(compile_cache_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU")
@pytest.mark.parametrize("rows", [128, 1000, 5])
def test_on_a_gpu_it_equals_the_definition(library, rows):
    grad, down, stored = (torch.randn(shape, device="cuda").bfloat16() for shape in ((rows, 512), (512, 2048), (rows, 2048)))
    out = tg.launch_cutlass(grad, down, stored, library).double()
    exact = (grad.double() @ down.double()) * stored.double()
    assert (out - exact).norm() < 0.003 * exact.norm()
