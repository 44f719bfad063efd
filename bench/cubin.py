"""Compile every kernel for Hopper without a GPU: `python bench/cubin.py [triton|cutlass]`. One JSON line a kernel, then a table.

Registers per thread, spilled bytes and shared memory come from the compiler, instruction counts from the disassembly. Triton: the
real launch functions are called on CPU tensors at the sizes of S14; only the launch itself is left out. CUTLASS needs nvcc and
the headers, takes a minute the first time and leaves its library in build/, from where `gpu_suite.py` takes it.
"""

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_gpt as tg

BUILD = Path(__file__).parents[1] / "build"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT_BYTES = 232_448  # what a Hopper block can have
SMS = 132


class Hopper(DriverBase):
    """As much of a driver as compiling asks for."""

    def __init__(self):
        pass

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise RuntimeError("nothing can be timed without a GPU")


class Compiled:
    """Stands in for a kernel: compiles what would be launched and remembers it."""

    def __init__(self, kernel):
        self.kernel, self.made = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.made.append(self.kernel.warmup(*args, grid=grid, **options))


def resources(cubin: bytes, shared_bytes: int) -> dict:
    """What a compiled kernel costs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
                       for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"])))
    return dict(
        registers=int(re.search(r"REG:(\d+)", usage)[1]), stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)), shared_bytes=shared_bytes,
        wgmma=len(re.findall(r"\bHGMMA\b", sass)), tma_loads=len(re.findall(r"\bUTMALDG\b", sass)))


def launches(rows: int, cfg: tg.Config):
    """(name, function that launches it once) for every kernel and form."""
    D, H, G, V = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.vocab_size
    x, up, down, hidden = (torch.empty(shape, dtype=torch.bfloat16) for shape in
                           ((rows, D), (cfg.mlp_dim, D), (D, cfg.mlp_dim), (rows, cfg.mlp_dim)))
    for form in tg.MLP_KERNELS[1:]:
        yield f"mlp_{form}", "mlp_kernel", lambda form=form: tg.launch_mlp(x, up, 0.5, form)
        yield f"mlp_{form}_grad", "mlp_kernel", lambda form=form: tg.launch_mlp(x, down, 0.5, form, hidden)
    qkv = torch.empty(1, rows, (H + 2 * G) * cfg.head_dim, dtype=torch.bfloat16)
    q, k, v = (torch.empty(1, rows, heads, cfg.head_dim, dtype=torch.bfloat16) for heads in (H, G, G))
    gain, (cos, sin) = torch.empty(H), tg.rotary_tables(cfg, rows, cfg.train_seq_len, torch.device("cpu"))
    yield "split_heads", "split_heads_kernel", lambda: tg.split_heads_op(qkv, gain, cos, sin, G)
    yield "split_heads_grad", "split_heads_grad_kernel", lambda: tg.split_heads_grad(q, k, v, qkv, gain, cos, sin)
    gate = torch.empty(1, rows, H, dtype=torch.bfloat16)
    yield "gate_heads", "gate_heads_kernel", lambda: tg.gate_heads_op(q, v, gate)
    yield "gate_heads_grad", "gate_heads_grad_kernel", lambda: tg.gate_heads_grad(q, q, v, gate)
    logits, targets = torch.empty(rows, V, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
    yield "head_ce", "ce_kernel", lambda: tg.ce_with_slope(logits, targets, cfg.logit_softcap)
    p = torch.nn.Parameter(torch.empty(17, 24, 80, D))
    p.grad = torch.empty_like(p)
    yield "fused_adam", "adam_kernel", tg.FusedAdam([p], 1e-4, 0.99, 1e-10, 0.5).step
    yield "viterbi", "viterbi_kernel", lambda: tg.fused_viterbi(torch.empty(tg.TRELLIS_SEGMENT, 176), tg.TRELLIS_INTO.int())


def triton_kernels():
    """(name, resources) of each Triton kernel."""
    triton.runtime.driver.set_active(Hopper())
    tg.mlp_tiles = lambda device: (tg.MLP_TILES[9], SMS)
    for name, kernel, launch in launches(4096, tg.Config()):
        stand_in = Compiled(getattr(tg, kernel))
        setattr(tg, kernel, stand_in)
        launch()
        setattr(tg, kernel, stand_in.kernel)
        yield name, resources(stand_in.made[0].asm["cubin"], stand_in.made[0].metadata.shared)


def cutlass_kernels():
    """(name, resources) of the CUTLASS kernel, of every program in its library that has code."""
    library = tg.build_cutlass(tg.Config(compile_cache_dir=str(BUILD)))
    shared_bytes = ctypes.c_int.in_dll(ctypes.CDLL(library), "mlp_grad_shared_bytes").value
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", "all", library], cwd=folder, capture_output=True, check=True)
        for cubin in Path(folder).glob("*.cubin"):
            if b"device_kernel" in (code := cubin.read_bytes()):
                yield "mlp_act_grad_grad, CUTLASS", resources(code, shared_bytes)


def main() -> int:
    made = dict(triton=triton_kernels, cutlass=cutlass_kernels)
    if unknown := set(sys.argv[1:]) - set(made):
        sys.exit(f"error: {', '.join(unknown)}: expected triton or cutlass, or nothing for both")
    failed, rows = [], []
    for kind in sys.argv[1:] or made:
        try:
            for name, used in made[kind]():
                rows.append(line := dict(name=name, target="sm_90a", **used))
                print(json.dumps(line), flush=True)
                if line["stack_bytes"] or line["spills"] or line["shared_bytes"] > SHARED_LIMIT_BYTES:
                    failed.append(name)
        except tg.RunError as e:
            print(f"{kind}: not made. {e}", file=sys.stderr)
            failed += [kind] * (kind in sys.argv)  # an error for who asked for it
    print(f"\n{'kernel':26} {'registers':>9} {'spills':>7} {'shared B':>9} {'wgmma':>6} {'TMA':>5}")
    for r in rows:
        print(f"{r['name']:26} {r['registers']:9} {r['spills']:7} {r['shared_bytes']:9,} {r['wgmma']:6} {r['tma_loads']:5}")
    if failed:
        print(f"not made, spills or too much shared memory: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
