"""RUNTIME: files never lie half written, clocks add up, ranks agree, and a stop request is honoured once."""

import dataclasses
import errno
import json
import mmap
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config

import train_gpt as tg

# ---- files


@pytest.fixture
def old(tmp_path):
    """A file that a failing write must leave as it is."""
    path = tmp_path / "folder" / "file.bin"
    tg.write_atomic(path, b"old")
    return path


def only(path: Path) -> bool:
    return [p.name for p in path.parent.iterdir()] == [path.name]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_creates_folders_and_replaces(old):
    tg.write_atomic(old, b"newer")
    assert old.read_bytes() == b"newer" and only(old)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(old, monkeypatch, function):
    monkeypatch.setattr(os, function, full)
    with pytest.raises(tg.RunError, match="No space left on device.*ARTIFACT_DIR") as caught:
        tg.write_atomic(old, b"new")
    assert str(old) in str(caught.value) and old.read_bytes() == b"old" and only(old)


def test_write_that_stops_midway_leaves_the_old_file(old):
    """The kernel itself cuts the write short."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with pytest.raises(tg.RunError, match=r"cannot write .*file\.bin \(3145728 bytes\)"):
            tg.write_atomic(old, bytes(3 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert old.read_bytes() == b"old" and only(old)


def test_a_file_that_never_was_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(tg.RunError):
        tg.write_atomic(tmp_path / "new.bin", b"x" * 100)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(tg.RunError, match="cannot write .*ARTIFACT_DIR"):
        tg.write_atomic(tmp_path / "file" / "below" / "x.bin", b"x")
    with pytest.raises(tg.RunError, match="cannot write the log .*ARTIFACT_DIR"):
        tg.Log(tmp_path / "file" / "below" / "x.txt")


def test_tensors_come_back(tmp_path):
    state = dict(a=torch.arange(5), b=dict(c=torch.ones(2, dtype=torch.bfloat16), step=3, position=(1, 2), name="x"))
    tg.save_tensors(tmp_path / "s.pt", state)
    back = tg.load_tensors(tmp_path / "s.pt", "cpu")
    assert torch.equal(back["a"], state["a"]) and torch.equal(back["b"]["c"], state["b"]["c"])
    assert {k: v for k, v in back["b"].items() if k != "c"} == {"step": 3, "position": (1, 2), "name": "x"}


class Forbidden:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("pickle-was-here",)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("spoil", [
    lambda p: p.write_bytes(b"garbage"), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:-100]),
    lambda p: p.write_bytes(b"\x80\x04" + bytes(100)), lambda p: p.unlink(), lambda p: torch.save(Forbidden(), p),
], ids=["garbage", "empty", "truncated", "pickle", "missing", "code"])  # fmt: skip
def test_damaged_tensors(tmp_path, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)
    tg.save_tensors(tmp_path / "s.pt", dict(a=torch.arange(500)))
    spoil(tmp_path / "s.pt")
    with pytest.raises(tg.RunError, match="cannot load .*s.pt"):
        tg.load_tensors(tmp_path / "s.pt", "cpu")
    assert not (tmp_path / "pickle-was-here").exists()


# ---- log


def test_log_writes_console_and_file(tmp_path, capsys):
    log = tg.Log(tmp_path / "new" / "run.txt")
    log("one")
    log("two", console=False)
    log("three")
    assert capsys.readouterr().out == "one\nthree\n"
    assert (tmp_path / "new" / "run.txt").read_text() == "one\ntwo\nthree\n"
    tg.Log(tmp_path / "new" / "run.txt")("four")
    assert (tmp_path / "new" / "run.txt").read_text().endswith("three\nfour\n"), "a resumed run goes on in the same log"


def test_other_ranks_are_silent(capsys):
    tg.Log(None)("nothing")
    assert capsys.readouterr() == ("", "")


def test_log_outlives_its_file(tmp_path, capsys):
    log = tg.Log(tmp_path / "logs" / "run.txt")
    log.path.unlink()
    log.path.parent.rmdir()
    log("still here")
    out, err = capsys.readouterr()
    assert out == "still here\n" and "cannot append" in err


# ---- clocks


def test_phases_add_up_to_the_wall_time(world):
    start = time.perf_counter()
    clock = tg.Clock(world)
    for name in ("a", "b", "a", "c"):
        clock.phase(name)
        time.sleep(0.01)
    table = clock.table()
    wall = time.perf_counter() - start
    assert [p["name"] for p in table] == ["setup", "a", "b", "c"], "coming back to a name adds to it"
    assert sum(p["seconds"] for p in table) == pytest.approx(wall, abs=0.005)
    assert table[1]["seconds"] >= 0.02 and table[2]["seconds"] >= 0.01
    assert all(p["peak_mib"] > 0 for p in table)


def test_peak_memory_is_that_of_the_phase(world):
    tg.reset_peak_memory(world.device)
    before = tg.peak_memory_mib(world.device)
    block = mmap.mmap(-1, 512 << 20)  # not malloc: a process may keep what it freed
    np.frombuffer(block, np.uint8)[:] = 1
    during = tg.peak_memory_mib(world.device)
    block.close()
    assert during >= before + 500
    if Path("/proc/self/clear_refs").exists() and os.access("/proc/self/clear_refs", os.W_OK):
        tg.reset_peak_memory(world.device)
        assert tg.peak_memory_mib(world.device) < during


def test_training_clock_stands_still_while_paused(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = tg.StepClock(7.0)
    clock.go_on()
    now[0] += 3
    assert clock.now() == 10
    clock.pause()
    assert clock.now() == clock.seconds == 10
    now[0] += 50
    assert clock.now() == 10
    clock.go_on()
    now[0] += 1
    assert clock.now() == 11


def test_eta(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    eta = tg.Eta(10)
    assert eta.left == float("inf")
    now[0] = 4.0
    eta.add(2)
    assert (eta.elapsed, eta.left) == (4, 16)


# ---- stop requests


def test_first_signal_requests_second_kills(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with tg.StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_requests_a_stop():
    with tg.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


# ---- ranks


def test_one_rank_is_the_identity(world):
    t = torch.tensor([1.0, 2.0])
    world.sum_(t)
    box = object()
    assert t.tolist() == [1, 2] and world.max(3, 4.0) == [3, 4] and world.from_main(box) is box and world.main
    world.barrier()
    world.synchronize()
    world.close()


@pytest.mark.parametrize("size", [3, 4, 5])
def test_ranks_that_do_not_divide_the_micro_batches(size):
    with pytest.raises(tg.RunError, match=f"{size} ranks cannot share 2 micro-batches.*TRAIN_MICROBATCH_TOKENS"):
        tg.World.init(tiny_config(), tg.Launch(0, 0, size))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_missing_device(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(tg.RunError, match=f"DEVICE={device}.*DEVICE=cpu"):
        tg.World.init(tiny_config(device=device), tg.Launch(0, 0, 1))


@pytest.mark.parametrize("asked, dtype", [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_world_on_a_cpu(asked, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    world = tg.World.init(tiny_config(activation_dtype=asked, seed=77), tg.Launch(0, 0, 1))
    assert (world.device.type, world.dtype, world.rank, world.size) == ("cpu", dtype, 0, 1)
    assert torch.initial_seed() == 77
    assert re.match(r"1x cpu \(.+, \d+ cores\)$", tg.hardware_name(world))


TWO_RANKS = """
import os, torch
import train_gpt as tg
from conftest import tiny_config
world = tg.World.init(tiny_config(device="cpu"), tg.launch_from_env(os.environ))
a, b = torch.tensor([1.0, 10.0]) * (world.rank + 1), torch.tensor(world.rank, dtype=torch.float64)
c, messages, real = torch.arange(6.0).view(2, 3).T, [], torch.distributed.all_reduce  # a view that is not contiguous
torch.distributed.all_reduce = lambda t, *args: messages.append(t.numel()) or real(t, *args)
world.sum_(a, b, c)
torch.distributed.all_reduce = real
assert a.tolist() == [3, 30] and b.item() == 1 and c.tolist() == [[0, 6], [2, 8], [4, 10]], (a, b, c)
assert messages == [8, 1]  # one for each type
assert world.max(world.rank, -world.rank, 2**53 - 1 - world.rank) == [1, 0, 2**53 - 1]
assert world.from_main(dict(rank=world.rank, name="x" * 5000)) == dict(rank=0, name="x" * 5000)
world.barrier()
assert world.main == (world.rank == 0)
world.close()
print("agreed", world.rank, world.size)
"""


def test_two_ranks_agree():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), PYTHONPATH=path)
    ranks = [subprocess.Popen([sys.executable, "-c", TWO_RANKS], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) for r in range(2)]  # fmt: skip
    try:
        for number, rank in enumerate(ranks):
            out, err = rank.communicate(timeout=900)
            assert rank.returncode == 0, err
            assert out == f"agreed {number} 2\n"
    finally:
        for rank in ranks:
            rank.kill()


# ---- the compiler


def test_compiled_code_is_kept_apart_by_everything_it_depends_on(world, monkeypatch, tmp_path):
    assert tg.compile_cache(tiny_config(), world) == {}
    cfg = tiny_config(compile_cache_dir=str(tmp_path))
    first = tg.compile_cache(cfg, world)
    assert all(Path(folder).is_relative_to(tmp_path) for folder in first.values()) and first == tg.compile_cache(cfg, world)
    same = dataclasses.replace(cfg, ttt_lora_lr=0.5, seed=3)
    assert tg.compile_cache(same, world) == first
    others = [tg.compile_cache(dataclasses.replace(cfg, **change), world) for change in (
        dict(compile_backend="inductor"), dict(qk_kernel="triton"), dict(mlp_kernel="act_grad"),
        dict(mlp_kernel="act_grad", mlp_backward="cutlass"), dict(activation_dtype="bf16"), dict(attn_backend="sdpa"))]
    monkeypatch.setattr(torch, "__version__", "9.9")
    others.append(tg.compile_cache(cfg, world))
    monkeypatch.setattr(tg, "hardware_name", lambda world: "8x NVIDIA H100")
    others.append(tg.compile_cache(cfg, world))
    monkeypatch.setattr(tg, "hardware_name", lambda world: "1x NVIDIA H100")
    assert tg.compile_cache(cfg, world) == others[-1]  # what one rank has compiled serves eight
    (tmp_path / "script.py").write_text("# other code")
    monkeypatch.setattr(tg, "__file__", str(tmp_path / "script.py"))
    others.append(tg.compile_cache(cfg, world))
    assert len({json.dumps(folders) for folders in (first, *others)}) == 1 + len(others)


def test_the_compilers_look_where_the_cache_is(world, monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "elsewhere")  # and put back what was there
    monkeypatch.setenv("COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    seen = []
    monkeypatch.setattr(tg, "run_stages", lambda *args: seen.extend([cache_dir(), tg.triton.knobs.cache.dir]))
    assert tg.main() == 0
    assert seen == list(tg.compile_cache(tg.Config(compile_cache_dir=str(tmp_path)), world).values())


def test_a_clock_says_what_was_compiled_in_each_phase(world, monkeypatch):
    made = []
    monkeypatch.setattr(tg, "compilations", lambda world: made)
    clock = tg.Clock(world)
    made += ["a", "b"]
    clock.phase("train")
    clock.phase("eval")
    made += ["c"]
    table = clock.table()
    assert [(p["name"], p["compilations"]) for p in table] == [("setup", 2), ("train", 0), ("eval", 1)]
    assert clock.compiled == dict(setup=["a", "b"], eval=["c"])


# ---- CUDA graphs, without CUDA: see `recordings`


def test_graphs_need_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(tg.RunError, match="CUDA_GRAPHS=1 needs a CUDA device, and this run is on cpu: set CUDA_GRAPHS=0"):
        tg.World.init(tiny_config(cuda_graphs=True), tg.Launch(0, 0, 1))


def test_graphs_need_an_attention_on_the_device(world):
    with pytest.raises(tg.RunError, match="CUDA_GRAPHS=1 needs an attention that does not loop on the host.*set CUDA_GRAPHS=0"):
        tg.choose_kernels(tiny_config(cuda_graphs=True, attn_backend="sdpa"), world)
    tg.choose_kernels(tiny_config(attn_backend="sdpa"), world)


class Scaled(NamedTuple):
    factor: torch.Tensor
    power: int


def test_a_graph_is_its_forward(recordings, world):
    """Values, gradients of what is handed over and of what is not, and accumulation, over changing data; arguments stay as they are."""
    weight, other = (torch.tensor([2.0, 3.0], requires_grad=True) for _ in range(2))
    unused = torch.ones(2, requires_grad=True)

    def forward(x, scaled, shift=None):
        y = weight * scaled.factor * x**scaled.power
        return y if shift is None else y + shift

    graphed, generator, given = tg.Graphed(forward, world, [weight, unused]), torch.Generator().manual_seed(0), []
    for power, shifted in ((2, False), (3, True), (2, True), (2, False)):
        weight.grad = other.grad = None
        expected = [torch.zeros(2), torch.zeros(2)]
        for _ in range(3):
            x, shift, direction = torch.randn(3, 2, generator=generator)
            options = dict(shift=shift) if shifted else {}
            given.append((x, x.clone()))
            out = graphed(x, Scaled(other, power), **options)
            want = forward(x, Scaled(other, power), **options)
            assert torch.equal(out, want)
            for total, grad in zip(expected, torch.autograd.grad(want, (weight, other), direction), strict=True):
                total += grad
            taken, other.grad = other.grad, None  # a gradient of an argument is read before the next replay
            out.backward(direction)
            other.grad = other.grad + (0 if taken is None else taken)
        assert torch.equal(weight.grad, expected[0]) and torch.equal(other.grad, expected[1]) and not unused.grad.any()
    assert len(graphed.recorded) == 3 and len(recordings) == 6 and all(torch.equal(x, kept) for x, kept in given)
    with torch.no_grad():
        assert not graphed(x, Scaled(other, 2)).requires_grad and len(graphed.recorded) == 3
        weight += 1  # where it lies
        assert torch.equal(graphed(x, Scaled(other, 2)), forward(x, Scaled(other, 2)))


def test_a_graph_comes_after_a_backward(recordings, world):
    """What compiles or loads in a first run, backward included, is no part of a recording."""
    p, x = torch.ones(2, requires_grad=True), torch.tensor([2.0, 3.0])
    graphed = tg.Graphed(lambda x, p: p * x, world)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(graphed(x, p), x) and not recordings
    for recorded in (0, 1, 1):
        assert torch.equal(graphed(x, p), x) and len(graphed.recorded) == recorded
        p.grad = None
        graphed(x, p).sum().backward()
        assert torch.equal(p.grad, x)
    with torch.no_grad():
        p += 1
        assert torch.equal(graphed(x, p), 2 * x) and len(recordings) == 2


def twice(graphed, *args):
    """Run as it is, then from the graph."""
    graphed(*args).sum().backward()
    return graphed(*args)


def test_a_graph_of_its_own_for_each_shape_value_and_place(recordings, world):
    graphed = tg.Graphed(lambda x, adapter, n: adapter * x.sum() * n, world)
    adapter, elsewhere = (torch.ones(2, requires_grad=True) for _ in range(2))
    calls = [(torch.ones(4), adapter, 1), (torch.ones(5), adapter, 1), (torch.ones(4), adapter, 2), (torch.ones(4), elsewhere, 1),
             (torch.ones(4, dtype=torch.float64), adapter, 1)]
    for count, (x, place, n) in enumerate(calls, 1):
        for scale in (1, 2):
            assert twice(graphed, scale * x, place, n).tolist() == [scale * n * len(x)] * 2
        assert len(graphed.recorded) == count
    assert graphed(3 * torch.ones(4), adapter, 1).tolist() == [12, 12] and len(graphed.recorded) == len(calls)


def test_recordings_are_listed_among_the_compilations(recordings, world, monkeypatch):
    found = []
    dynamo = type("dynamo", (), dict(get_compilation_metrics=lambda: found))
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", dynamo)

    def compiled(name):
        return type("metrics", (), dict(co_name=name, compile_id="0/0", recompile_reason=None))

    graphed = tg.Graphed(lambda x, p: p * x.sum(), world)
    p, lines = torch.ones(1, requires_grad=True), []
    for step in ("a", 1, 2, "b", 3):
        if isinstance(step, int):
            twice(graphed, torch.ones(step), p)
        else:
            found.append(compiled(step))
        assert tg.compilations(world)[:-1] == lines, "nothing is ever put before what was there"
        lines = tg.compilations(world)
    first, graphs = "0/0: the first graph", [f"CUDA graph of [({n},)]" for n in (1, 2, 3)]
    assert lines == [f"a {first}", *graphs[:2], f"b {first}", graphs[2]]


def test_a_step_that_waits_for_the_device_can_not_be_recorded(recordings, world):
    with pytest.raises(AssertionError, match="can be in no CUDA graph"):
        twice(tg.Graphed(lambda x, p: p * x.sum().item(), world), torch.ones(2), torch.ones(1, requires_grad=True))
