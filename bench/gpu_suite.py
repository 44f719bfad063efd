"""Everything to be learnt from a GPU in one call of ten minutes: `python bench/gpu_suite.py --out bench/results/DATE_DEVICE.jsonl`.

Correctness first, then timings. Every section runs in a process of its own under its own limit, and its lines are written as
they come: a crash or a slow compile costs one section. Inputs are random normal numbers and larger than the L2 cache; a time is
the median of events around single calls; a ratio above 1 says how much faster ours is than the reference, measured in the same
process. `--table FILE` prints the table of an older run; `--dry-run` goes through every section on the CPU with tiny sizes
(under TRITON_INTERPRET=1), so that no minute of a GPU is spent on a typing error: its times mean nothing.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import lzma
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
import unittest.mock
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.attention.flex_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_gpt as tg

DRY = "--dry-run" in sys.argv
SMALL = dict(num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=4, mlp_mult=2.0, vocab_size=64, loop_start=1, loop_end=2,
             gate_window=8, xsa_last_n=4, parallel_start_layer=3, ttt_lora_rank=4, lqer_rank=2, lqer_asym_group=16) if DRY else {}
CFG = tg.Config(**SMALL)
N = 256 if DRY else 98_304  # tokens of a micro-batch of S14
DEVICE = "cpu" if DRY else "cuda"
BUILD = Path(__file__).parents[1] / "build"  # where the CUTLASS kernel is looked for, and made
D, H, G, HEAD, HIDDEN, V = CFG.model_dim, CFG.num_heads, CFG.num_kv_heads, CFG.head_dim, CFG.mlp_dim, CFG.vocab_size
CAP = CFG.logit_softcap
ALL_KERNELS = dict(mlp_kernel="lsb", qk_kernel="triton", xsa_kernel="triton", fused_ce_kernel="triton")
# Document lengths in tokens of FineWeb's validation part at these percentiles (50,000 documents, CaseOps, 8,192 pieces).
FLEX_TILES = ((), (64, 64), (64, 128), (128, 64), (128, 128))  # queries and keys at a time; () is torch's own choice
PERCENTILES = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9, 100)
LENGTHS = (26, 104, 142, 179, 251, 334, 440, 566, 722, 936, 1259, 1873, 2769, 4618, 6625, 9624, 22379, 93646)


if DRY:  # a graph is its function
    torch.cuda.make_graphed_callables, torch.cuda.graph_pool_handle = lambda f, sample, **_: f, lambda: None


def make_world() -> tg.World:
    torch.set_float32_matmul_precision("high")
    return tg.World(0, 1, torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"), torch.bfloat16)


def compiled(f):
    """What the compiler makes of a definition."""
    return f if DRY else torch.compile(f)


def milliseconds(f, repeat: int = 20) -> float:
    """Median time of f() on the device, after three calls that do not count."""
    if DRY:
        start = time.perf_counter()
        f()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(3):
        f()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def randn(*shape, dtype=torch.bfloat16, grad=False, scale=1.0):
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype).requires_grad_(grad)


def relative_error(ours, reference) -> float:
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def first_line(e: Exception) -> str:
    return (str(e) or repr(e)).splitlines()[0]


def line(
    name: str, ms: float, reference: str = "", reference_ms: float = 0.0, tf: float = 0.0, gb: float = 0.0, target_ms: float = 0.0
) -> dict:
    """One result. tf and gb: work done, in TFLOP and GB."""
    out = dict(name=name, ms=round(ms, 4))
    if reference:
        out |= dict(reference=reference, reference_ms=round(reference_ms, 4), ratio=round(reference_ms / ms, 3))
    if tf:
        out["tflop_per_s"] = round(tf / ms * 1e3, 1)
    if gb:
        out["gb_per_s"] = round(gb / ms * 1e3, 1)
    if target_ms:
        out |= dict(target_ms=target_ms, reached=ms <= target_ms)
    return out


def packed_bounds(context: int, seed: int = 0) -> torch.Tensor:
    """cu_seqlens of a row of N tokens with documents drawn from the lengths of FineWeb."""
    rng = np.random.default_rng(seed)
    lengths = np.interp(rng.uniform(0, 100, 4000), PERCENTILES, LENGTHS).astype(np.int64)
    starts = np.cumsum(lengths)
    return torch.from_numpy(tg.document_cu_seqlens(starts[starts < N], N, context)).to(DEVICE)


def split_inputs(grad: bool = False):
    cos, sin = tg.rotary_tables(CFG, N, CFG.train_seq_len, torch.device(DEVICE))
    return randn(1, N, (H + 2 * G) * HEAD, grad=grad), randn(H, dtype=torch.float32, grad=grad), cos, sin, G


def gate_inputs(grad: bool = False):
    gate = torch.rand(1, N, H, device=DEVICE).bfloat16().requires_grad_(grad)
    return randn(1, N, H, HEAD, grad=grad), randn(1, N, G, HEAD, grad=grad), gate


def head_inputs(rows: int, scale: float = 1.0):
    """Draw hidden states (1, rows, D), a head (V, D) and targets (1, rows)."""
    x, head = randn(1, rows, D, grad=True), randn(V, D, grad=True, scale=scale * D**-0.5)
    return x, head, torch.randint(0, V, (1, rows), device=DEVICE)


def defined_head_ce(x, head, targets):
    return tg.softcapped_ce(torch.nn.functional.linear(x, head), targets, CAP)


def mlp_inputs(grad: bool = False):
    return randn(1, N, D, grad=grad), randn(HIDDEN, D, grad=grad, scale=D**-0.5), randn(D, HIDDEN, grad=grad, scale=HIDDEN**-0.5)


def forward_backward(f, inputs, gradients=None):
    """Call and backward of f(*inputs), gradients of the inputs that want one."""
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    return [*out, *torch.autograd.grad(out, wanted, gradients or [torch.ones_like(t) for t in out])]


# ---- sections


def ceilings():
    """What this device can do: a large product, a large copy."""
    side = 64 if DRY else 8192
    a, b = randn(side, side), randn(side, side)
    yield line(f"matmul {side}^3 bf16", milliseconds(lambda: a @ b), tf=2 * side**3 / 1e12)
    source = torch.randn(1 << (10 if DRY else 30), device=DEVICE)
    target = torch.empty_like(source)
    yield line("copy 8.6 GB", milliseconds(lambda: target.copy_(source)), gb=8.6)


def gemms():
    """B1: every product of a block and the head, forward and gradient of the weight, against the time its bytes or FLOPs need."""
    side, source = 64 if DRY else 8192, torch.randn(1 << (10 if DRY else 28), device=DEVICE)
    a, target = randn(side, side), torch.empty_like(source)
    flops_per_ms = 2 * side**3 / milliseconds(lambda: a @ a)
    bytes_per_ms = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))
    for K, M in ((D, (H + 2 * G) * HEAD), (D, D), (D, HIDDEN), (HIDDEN, D), ((H + 2 * G) * HEAD, D), (D, V), (V, D)):
        x, w, y = randn(N, K), randn(K, M), randn(N, M)
        for name, f in (("forward", lambda x=x, w=w: x @ w), ("weight gradient", lambda x=x, y=y: x.T @ y)):
            roof = max(2 * N * K * M / flops_per_ms, 2 * (N * K + K * M + N * M) / bytes_per_ms)
            yield line(f"gemm {K}->{M} {name}", milliseconds(f), "roof of this device", roof, tf=2 * N * K * M / 1e12)


def correctness():
    """Every kernel at full size against its definition in fp32, values and gradients of a random direction; NaN in fresh memory."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    pairs = {f"mlp {form}": (tg.fused_mlp(form), tg.leaky_mlp, lambda: (*mlp_inputs(True), 0.5), 0.012) for form in tg.MLP_KERNELS[1:]}
    pairs |= {"split_heads": (tg.split_heads_op, tg.split_heads, lambda: split_inputs(True), 0.008),
              "gate_heads": (tg.gate_heads_op, tg.gate_heads, lambda: gate_inputs(True), 0.008)}
    for name, (fused, definition, make, tolerance) in pairs.items():
        inputs, tolerance = make(), tolerance * (1 + DRY)  # the interpreter cuts to bf16 instead of rounding
        wide = [t.detach().float().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs]
        outputs = definition(*wide)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        directions = [randn(*t.shape, dtype=torch.float32) for t in outputs]
        ours = forward_backward(fused, inputs, [d.bfloat16() for d in directions])
        reference = forward_backward(definition, wide, [d.bfloat16().float() for d in directions])
        error = max(relative_error(a, b) for a, b in zip(ours, reference, strict=True))
        yield dict(name=f"check {name}", error=error, tolerance=tolerance, reached=error < tolerance)
    x, head, targets = head_inputs(N // 4, scale=8.0)
    wide = [t.detach().float().requires_grad_() for t in (x, head)]
    direction = [torch.rand(targets.shape, device=DEVICE)]
    ours = forward_backward(lambda *args: tg.HeadCe.apply(*args, targets, CAP), (x, head), direction)
    reference = forward_backward(lambda *args: defined_head_ce(*args, targets), wide, direction)
    error = max(relative_error(a, b) for a, b in zip(ours, reference, strict=True))
    yield dict(name="check head_ce", error=error, tolerance=0.01, reached=error < 0.01)
    x = 20 * torch.randn(tg.TRELLIS_SEGMENT, 33, device=DEVICE)
    ours, reference = tg.fused_viterbi(x, tg.TRELLIS_INTO.to(DEVICE, torch.int32)), tg.viterbi(x)
    error = max(relative_error(a, b) for a, b in zip(ours, reference, strict=True))
    yield dict(name="check viterbi", error=error, tolerance=1e-9, reached=error < 1e-9)
    for shape in ((16, 48), (64, 24)) if DRY else ((512, 2048), (8192, 512)):
        E = torch.randn(shape, device=DEVICE) * torch.linspace(0.5, 1.5, shape[1], device=DEVICE)
        U, S, Vh = torch.linalg.svd(E.double().cpu(), full_matrices=False)
        A, B = tg.low_rank_factors(E, 4)
        error = relative_error((A @ B).cpu(), (U[:, :4] * S[:4]) @ Vh[:4])
        yield dict(name=f"check low-rank factors {shape}", error=error, tolerance=1e-4, reached=error < 1e-4)


def attentions() -> list[tuple[str, Any]]:
    """Those of this machine; cuDNN's, which torch itself does not use for packed rows, after those it could take along."""
    order = ("varlen", "fa3", "fa4", "cpu", "flex", "cudnn", "sdpa")
    return sorted(tg.attention_backends(make_world()).items(), key=lambda item: order.index(item[0]))


def check_attention(name: str, attend):
    """Against the loop of SDPA, values and gradients; one that fails costs its own lines only."""
    for context in (1024, 3072):
        bounds, inputs = packed_bounds(context), tuple(randn(N, heads, HEAD, grad=True) for heads in (H, G, G))
        try:
            ours, reference = (forward_backward(partial(f, cu_seqlens=bounds, max_len=context), inputs)
                               for f in (attend, tg.document_attention_reference))
            error = max(relative_error(a, b) for a, b in zip(ours, reference, strict=True))
            yield dict(name=f"check attention {name} {context}", error=error, tolerance=0.012, reached=error < 0.012)
        except Exception as e:
            yield dict(name=f"check attention {name} {context}", error=first_line(e), tolerance=0.012, reached=False)


def attention_correctness():
    """Every attention of this machine."""
    for name, attend in attentions():
        yield from check_attention(name, attend)


def against_compiled(name, fused, definition, make, gb=(0.0, 0.0), tf: float = 0.0, targets=(0.0, 0.0)):
    """Forward, then forward and backward, of a kernel against torch.compile of its definition."""
    reference = compiled(definition)
    plain, with_grad = make(False), make(True)
    with torch.no_grad():
        yield line(f"{name} forward", milliseconds(lambda: fused(*plain)), "compiled definition", milliseconds(lambda: reference(*plain)),
                   tf=tf, gb=gb[0], target_ms=targets[0])
    yield line(f"{name} forward+backward", milliseconds(lambda: forward_backward(fused, with_grad)), "compiled definition",
               milliseconds(lambda: forward_backward(reference, with_grad)), tf=3 * tf, gb=gb[1], target_ms=targets[1])


def mlp():
    """B2: the MLP in its three forms."""
    for form in tg.MLP_KERNELS[1:]:
        yield from against_compiled(f"mlp {form}", tg.fused_mlp(form), tg.leaky_mlp, lambda grad: (*mlp_inputs(grad), 0.5),
                                    tf=4 * N * D * HIDDEN / 1e12, targets=(0.60, 1.84))


def cutlass():
    """B2: the backward product of the act_grad form, checked and then timed: a library's product and a multiplication, Triton, CUTLASS."""
    grad, down, stored = randn(N, D), randn(D, HIDDEN, scale=D**-0.5), randn(N, HIDDEN)
    tf, gb = 2 * N * D * HIDDEN / 1e12, 2 * (N * D + D * HIDDEN + 2 * N * HIDDEN) / 1e9
    expected, libraries = (grad.float() @ down.float()) * stored.float(), dict(triton="")
    if DRY:
        tg.launch_cutlass = lambda grad, down, stored, library: ((grad.float() @ down.float()) * stored.float()).bfloat16()
        libraries["cutlass"] = "a stand-in, since no CPU runs it"
    elif torch.cuda.get_device_capability()[0] != 9:
        yield dict(name="dpre cutlass", skipped="it needs a GPU of compute capability 9.0")
    else:
        try:
            libraries["cutlass"] = tg.build_cutlass(tg.Config(compile_cache_dir=str(BUILD)))
        except tg.RunError as e:
            yield dict(name="dpre cutlass", skipped=str(e))
    pair = "product and multiplication"
    times, whole = {pair: milliseconds(lambda: (grad @ down) * stored)}, {}
    yield line(f"dpre {pair}", times[pair], tf=tf, gb=gb)
    for name, library in libraries.items():
        for rows in (N, N - 37):  # the latter fill no whole number of tiles
            product = partial(tg.mlp_up_grad, grad[:rows], down, stored[:rows], 0.5, "act_grad", library)
            error, tolerance = relative_error(product(), expected[:rows]), 0.003 * (1 + DRY)
            yield dict(name=f"check dpre {name}, {rows} rows", error=error, tolerance=tolerance, reached=error < tolerance)
        times[name] = milliseconds(partial(tg.mlp_up_grad, grad, down, stored, 0.5, "act_grad", library))
        whole[name] = milliseconds(partial(forward_backward, tg.fused_mlp("act_grad", library), (*mlp_inputs(True), 0.5)))
        for reference in [pair] + ["triton"] * (name != "triton"):
            yield line(f"dpre {name}", times[name], reference, times[reference], tf=tf, gb=gb)
    if "cutlass" in whole:
        yield line("mlp act_grad forward+backward, cutlass", whole["cutlass"], "triton", whole["triton"], tf=6 * tf)


def heads():
    """B3 and B4: projection to heads, XSA and gate. 1 U = a bf16 tensor of N x 512."""
    U = N * 512 * 2 / 1e9
    yield from against_compiled("split_heads", tg.split_heads_op, tg.split_heads, split_inputs, gb=(4 * U, 10 * U), targets=(0.08, 0.20))
    yield from against_compiled("gate_heads", tg.gate_heads_op, tg.gate_heads, gate_inputs, gb=(2.5 * U, 6.5 * U), targets=(0.07, 0.18))


def cross_entropy():
    """B7: head, loss and gradients, one pass over the logits against two."""
    x, head, targets = head_inputs(N)
    reference = compiled(lambda x, head: defined_head_ce(x, head, targets).sum())
    yield line("head and softcapped CE forward+backward", milliseconds(lambda: forward_backward(
        compiled(lambda x, head: tg.HeadCe.apply(x, head, targets, CAP).sum()), (x, head))), "compiled definition",
        milliseconds(lambda: forward_backward(reference, (x, head))), gb=4 * N * V * 2 / 1e9, tf=6 * N * V * D / 1e12, target_ms=4.6)


def dense_causal(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def time_attention(name: str, attend, contexts):
    """One attention on packed documents, against dense causal attention of as many pairs. One that does not run says so."""
    for context in contexts:
        bounds = packed_bounds(context)
        lengths = np.diff(bounds.cpu().numpy()).astype(np.float64)
        pairs = (lengths * (lengths + 1)).sum() / 2
        packed = partial(attend, cu_seqlens=bounds, max_len=context)
        inputs = tuple(randn(N, heads, HEAD, grad=True) for heads in (H, G, G))
        side = int((2 * pairs / 8) ** 0.5)  # eight dense sequences with as many pairs in all
        dense = tuple(randn(8, H, side, HEAD, grad=True) for _ in range(3))
        try:
            ms, reference_ms = (milliseconds(partial(forward_backward, f, x)) for f, x in ((packed, inputs), (dense_causal, dense)))
        except Exception as e:
            yield dict(name=f"{name} {context} forward+backward", error=first_line(e))
            continue
        yield line(f"{name} {context} forward+backward", ms, "dense causal SDPA of equal pairs", reference_ms,
                   tf=3.5 * 4 * D * pairs / 1e12)


def attention():
    """B6: every attention of this machine."""
    for name, attend in attentions():
        yield from time_attention(name, attend, (1024, 2048, 3072))


def load_fa3(library: Path, runtime: Path) -> None:
    """Put FlashAttention 3 in the place of torch's own kernels for this process. library: xz of the one in xformers' wheel, which uses
    torch's stable interface only and the CUDA 12 runtime."""
    ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        with lzma.open(library) as packed:
            shutil.copyfileobj(packed, file, 1 << 24)
        file.flush()
        torch.ops.load_library(file.name)
    sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")  # torch imports the package and calls the library
    torch.nn.attention.activate_flash_attention_impl("FA3")


def fa3():
    """B6: FlashAttention 3, what the published runs had, through torch's varlen attention: the others against it, in one process each."""
    files = BUILD / "flash_attn_3.so.xz", BUILD / "libcudart.so.12"
    if missing := [f.name for f in files if not f.exists()]:
        yield dict(name="fa3", skipped=f"build/ lacks {', '.join(missing)}: bench/README.md says where they are from")
    elif not DRY:
        load_fa3(*files)
        yield from check_attention("fa3 of xformers", tg.varlen_attention())
        yield from time_attention("fa3 of xformers", tg.varlen_attention(), (1024, 2048, 3072))


def tiled_flex_attention(tile: tuple[int, ...]):
    """Make `tg.flex_attention` with this tile, in which its backward's blocks divide each other as torch asks."""
    queries, keys = tile
    short, long = sorted(tile)
    options = dict(
        BLOCK_M=queries, BLOCK_N=keys, BLOCK_M1=short, BLOCK_N1=long, BLOCK_M2=long, BLOCK_N2=short)
    untiled = torch.nn.attention.flex_attention.flex_attention

    def flex(*args, **rest):
        return untiled(*args, kernel_options=options, **rest)

    with unittest.mock.patch.object(torch.nn.attention.flex_attention, "flex_attention", flex):
        return tg.flex_attention()


def flex_tiles():
    """B6: FlexAttention by tile, checked and timed, and the fastest right one.

    The CPU has only its forward, uncompiled, so a dry run takes the definition's place.
    """
    times = {}
    for tile in FLEX_TILES:
        attend = tiled_flex_attention(tile) if tile else tg.flex_attention()
        attend = tg.document_attention_reference if DRY else attend
        name = f"flex {'x'.join(map(str, tile)) or 'as torch chooses'}"
        checks = list(check_attention(name, attend))
        timings = list(time_attention(name, attend, (1024, 3072)))
        yield from checks + timings
        if all(check["reached"] for check in checks) and all("ms" in timing for timing in timings):
            times[name] = sum(timing["ms"] for timing in timings)

    if times:
        best = min(times, key=times.get)
        yield dict(name=f"best tile: {best}", ms=round(times[best], 4))
    else:
        yield dict(name="best tile", error="no tile of FlexAttention is right here")


def muon():
    """B8 and B9: orthogonalisation of the four banks, and a whole optimizer step."""
    for shape in ((2, 8, 8),) if DRY else ((22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048)):
        g = randn(*shape)
        n, m = max(shape[1:]), min(shape[1:])
        flop = 5 * shape[0] * (4 * m * m * n + 2 * m**3)
        yield line(f"polar_express {shape}", milliseconds(partial(tg.polar_express, g, 5)), tf=flop / 1e12)
    world = make_world()
    model = tg.build_model(CFG, world, tg.choose_kernels(CFG, world))
    optimizer = tg.TrainOptimizer(model, CFG, world)

    def step():
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3) if p.requires_grad else None
        optimizer.step(1.0, 0.95)

    committed, ema = json.loads(Path(__file__).with_name("traffic.json").read_text()), tg.Ema(model, CFG.ema_decay)
    yield line("optimizer step, gradients written first", milliseconds(step), target_ms=2.5)
    with unittest.mock.patch.object(tg, "polar_express", lambda G, steps: G):
        yield line("optimizer step without the products, and average", milliseconds(lambda: (step(), ema.update(model))),
                   gb=committed["optimizer_gigabytes"] + sum(p.nbytes for p in model.parameters()) / 1e9, target_ms=1.3)


def micro_batch(cfg, model, looping: bool, context: int):
    """(a function of a forward that runs it and its backward on random tokens and returns nats and gradients, lengths of the segments)."""
    tokens, bounds = torch.randint(8, V, (1, N + 1), device=DEVICE), packed_bounds(context)
    order, segments = tg.layer_order(cfg, looping), tg.Segments(bounds, context)

    def step(forward):
        for p in model.parameters():
            p.grad = None
        nats = forward(tokens[:, :-1], tokens[:, 1:], layers=order, segments=segments, training=True)
        ((1 / N) * nats.sum()).backward()
        return [nats.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    lengths = np.diff(bounds.cpu().numpy())
    return step, lengths[lengths > 0]


def train_step():
    """B10: forward and backward of a micro-batch, definitions and kernels, compiled, and the same in CUDA graphs; MFU of the datasheet's
    989 TFLOP/s. Graphs are right where nats and gradients are those of the same kernels without: only sums by atomics may differ."""
    world, reference = make_world(), {}
    for name, kernels in dict(definitions={}, kernels=ALL_KERNELS).items():
        cfg = tg.Config(**SMALL, **kernels)
        model = tg.build_model(cfg, world, tg.choose_kernels(cfg, world))
        forward = tg.compile_forward(model, cfg, world)
        for looping, context, target in ((False, 1024, 57.8), (True, 2048, 93.6), (True, 3072, 100.3))[: 2 if DRY else 3]:
            gc.collect()  # graphs and the memory they hold lie in cycles of references
            step, lengths = micro_batch(cfg, model, looping, context)
            flops, shape, begin = tg.flops_per_token(cfg, lengths, looping), (looping, context), time.perf_counter()
            expected = [t.clone() for t in step(forward)]
            for suffix in ("", " graphs"):
                run, what = forward, f"micro-batch {name}{suffix} loop:{int(looping)} context:{context}"
                if suffix:
                    begin, run = time.perf_counter(), tg.Graphed(forward, world, (p for p in model.parameters() if p.requires_grad))
                    step(run)  # the next one is recorded
                    error = max(relative_error(a, b) for a, b in zip(step(run), expected, strict=True) if b.any())
                    yield dict(name=f"check {what}", error=error, tolerance=1e-3, reached=error < 1e-3)
                world.synchronize()
                compile_seconds = time.perf_counter() - begin
                ms = milliseconds(partial(step, run), 10)
                reference.setdefault(shape, ms)
                yield line(what, ms, "definitions", reference[shape], target_ms=target) | dict(
                    tokens_per_s=round(N / ms * 1e3), mfu=round(3 * sum(flops) * N / ms * 1e3 / 989.4e12, 4),
                    compile_seconds=round(compile_seconds, 1), peak_mib=tg.peak_memory_mib(world.device))


def evaluation():
    """B11: the scoring forward, without gradients, in the longest context."""
    world, context = make_world(), 3072
    model = tg.build_model(CFG, world, tg.choose_kernels(CFG, world))
    forward, order, bounds = tg.compile_forward(model, CFG, world), tg.layer_order(CFG, True), packed_bounds(context)
    tokens, segments = torch.randint(8, V, (1, N + 1), device=DEVICE), tg.Segments(bounds, context)
    with torch.no_grad():
        ms = milliseconds(lambda: forward(tokens[:, :-1], tokens[:, 1:], layers=order, segments=segments), 10)
    flops = tg.flops_per_token(CFG, bounds.diff()[bounds.diff() > 0].cpu().numpy(), True)
    yield line("scoring forward", ms, tf=N * sum(flops) / 1e12) | dict(tokens_per_s=round(N / ms * 1e3))


def learning_step(cfg, world, forward, rows: int, width: int, chunk: int, padded: int):
    """Make a function that scores a chunk of `rows` documents, learns from it and returns the nats.

    padded: width of the windows.
    """
    order, generator = tg.layer_order(cfg, True), torch.Generator(DEVICE).manual_seed(0)
    chain = tg.AdapterChain(cfg, world, rows, cfg.seed, tg.choose_kernels(cfg, world).adam)
    optimizer = chain.begin()
    inputs, targets = (torch.randint(8, V, (rows, n), device=DEVICE, generator=generator) for n in (width, chunk))
    inputs = torch.nn.functional.pad(inputs, (0, padded - width))
    positions = torch.arange(width - chunk, width, device=DEVICE).expand(rows, -1).contiguous()

    def step():
        nats = forward(inputs, targets, layers=order, adapters=chain.adapters, positions=positions)
        nats.mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return nats.detach().clone()

    return step


def ttt():
    """B12: learning steps of test-time training at four shapes: definitions; kernels; kernels in CUDA graphs, their windows padded to a
    bucket. The nats of three steps from the same adapters come first: those in graphs must be those of the same windows without."""
    world, models, cfgs = make_world(), [], []
    for kernels in ({}, {**ALL_KERNELS, "ttt_adam_kernel": "triton"}):
        cfgs.append(cfg := tg.Config(**SMALL, **kernels))
        model = tg.build_model(cfg, world, tg.choose_kernels(cfg, world)).requires_grad_(False)
        models.append(tg.compile_forward(model, cfg, world, growing=True))
    definitions, kernels = models
    for rows, bucket, chunk in ((2, 16, 4),) if DRY else ((24, 3072, 48), (24, 1024, 24), (96, 512, 8), (256, 192, 8)):
        what, width = f"{rows}x{bucket} chunk {chunk}", bucket - chunk // 2  # of the documents' windows
        kinds = {"definitions": (definitions, width), "kernels": (kernels, width), "padded": (kernels, bucket),
                 "graphs": (tg.Graphed(kernels, world), bucket)}
        nats, ms = {}, {}
        for name in list(kinds):  # one after the other: the adapters and moments of 256 documents are 14 GB
            forward, padded = kinds.pop(name)
            step = learning_step(cfgs[name != "definitions"], world, forward, rows, width, chunk, padded)
            nats[name], ms[name] = torch.stack([step() for _ in range(3)]), milliseconds(step, 5)
            del step, forward
            gc.collect()
        differences = {name: (nats[name] - nats[base]).abs().max().item()
                       for name, base in (("kernels", "definitions"), ("padded", "kernels"), ("graphs", "padded"))}
        error = differences["graphs"]
        yield dict(name=f"check ttt graphs {what}", error=error, tolerance=0.01, reached=error < 0.01)
        for name in ("kernels", "graphs"):
            yield line(f"ttt step {name} {what}", ms[name], "definitions", ms["definitions"]) | dict(
                positions_per_s=round(rows * width / ms[name] * 1e3), loss_differences=differences)


def gptq():
    """B13: Hessians and GPTQ of every matrix of S14."""
    world = make_world()
    model = tg.build_model(CFG, world, tg.choose_kernels(CFG, world))
    hessians = tg.Hessians()
    tokens = torch.randint(8, V, (1, N + 1), device=DEVICE)
    segments = tg.Segments(packed_bounds(3072), 3072)

    def collect():
        with torch.no_grad():
            model(tokens[:, :-1], tokens[:, 1:], layers=tg.layer_order(CFG, True), segments=segments, tap=hessians)

    yield line("Hessians of a micro-batch", milliseconds(collect, 3))
    tensors = tg.unbank(CFG, model.state_dict())
    plain = dataclasses.replace(CFG, awq_lite_enabled=False, lqer_enabled=False)
    solve = partial(tg.run_gptq, plain, tg.gptq_inputs(CFG, tensors), hessians, tg.clips_by_deviation)
    yield line("GPTQ of all matrices", milliseconds(solve, 2), target_ms=200.0)


def quantization():
    """B13: what comes after the Hessians: paths of the trellis, low-rank factors, order of rows."""
    into = tg.TRELLIS_INTO.to(DEVICE, torch.int32)
    for segments in (3,) if DRY else (88, 176, 64):  # of a column of all matrices of one shape
        x = 20 * torch.randn(tg.TRELLIS_SEGMENT, segments, device=DEVICE)
        yield line(f"path of a column, {segments} segments", milliseconds(lambda x=x: tg.fused_viterbi(x, into)), "definition",
                   milliseconds(lambda x=x: tg.viterbi(x), 5), target_ms=0.08)
    for shape in ((24, 16),) if DRY else ((512, 512), (2048, 512), (512, 2048), (8192, 512)):
        E = torch.randn(shape, device=DEVICE)
        yield line(f"low-rank factors {shape}", milliseconds(lambda E=E: tg.low_rank_factors(E, 4), 3), "torch.linalg.svd",
                   milliseconds(lambda E=E: torch.linalg.svd(E, full_matrices=False), 3), target_ms=30.0)
    for rows in (40,) if DRY else (512, 2048, 8192):
        q = (5 * torch.randn(rows, D)).round().clamp(-31, 31).to(torch.int8).numpy()
        start = time.perf_counter()
        tg.similarity_order(q)
        yield line(f"order of {rows} rows", 1e3 * (time.perf_counter() - start), target_ms=100.0)


SECTIONS = dict(  # name: (what runs, its limit in seconds); those that may be cut off by the limit of all come last
    ceilings=(ceilings, 40), correctness=(correctness, 90), attention_correctness=(attention_correctness, 90), gemms=(gemms, 30),
    mlp=(mlp, 60), heads=(heads, 60), cross_entropy=(cross_entropy, 40), attention=(attention, 60),
    muon=(muon, 40), train_step=(train_step, 300), evaluation=(evaluation, 90), gptq=(gptq, 60), quantization=(quantization, 60),
    ttt=(ttt, 180), fa3=(fa3, 60), cutlass=(cutlass, 180), flex_tiles=(flex_tiles, 150))


def table(lines: list[dict]) -> str:
    """The results for a person."""
    out = [f"{'what':<46}{'ms':>10}{'ratio':>8}{'TFLOP/s':>9}{'GB/s':>8}{'target':>9}  reference or note"]
    for r in lines:
        note = str(r["error"])[:60] if "error" in r else r.get("reference", r.get("skipped", ""))
        target = f"{r['target_ms']:g}{'' if r['reached'] else ' !'}" if "target_ms" in r else ""
        if "tolerance" in r:
            target = "ok" if r["reached"] else "WRONG"
        numbers = "".join(f"{r.get(key, ''):>{width}}" for key, width in (("ms", 10), ("ratio", 8), ("tflop_per_s", 9), ("gb_per_s", 8)))
        out.append(f"{r['name']:<46}{numbers}{target:>9}  {note}")
    return "\n".join(out)


def run_section(name: str) -> int:
    """In a process of its own: print one JSON line a result."""
    torch.manual_seed(0)
    for result in SECTIONS[name][0]():
        print(json.dumps(dict(section=name, **result)), flush=True)
    return 0


def section_lines(name: str, left: float) -> list[dict]:
    """Results of a section run in a process of its own, with a line about its end where that was not a good one. left: seconds."""
    limit = None if DRY else min(SECTIONS[name][1], left)  # a dry run's times mean nothing
    if left < 10:
        return [dict(section=name, name=f"{name} failed", error="no time was left: run it in a call of its own")]
    process = subprocess.Popen([sys.executable, __file__, "--only", name, *(["--dry-run"] if DRY else [])],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err = f"stopped after {limit:.3g} s"
    made = [json.loads(text) for text in out.splitlines() if text.startswith("{")]
    if process.returncode:
        print(err[-3000:], file=sys.stderr)
        made.append(dict(section=name, name=f"{name} failed", error=(err.strip() or f"exit {process.returncode}").splitlines()[-1]))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all, in this order)")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--seconds", type=float, default=570, help="of all sections together (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help="print the table of this file and stop")
    args = parser.parse_args()
    if args.only:
        return run_section(args.only)
    if args.table:
        print(table([json.loads(text) for text in args.table.read_text().splitlines()]))
        return 0
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if not DRY and not torch.cuda.is_available():
        print("error: torch sees no CUDA device. The CPU benchmarks are `make bench`, the compiler's reports `python bench/cubin.py`",
              file=sys.stderr)
        return 1
    lines = [dict(section="machine", name="dry run" if DRY else torch.cuda.get_device_name(0), torch=torch.__version__,
                  triton=tg.triton_version())]
    start = time.perf_counter()
    for name in args.sections or SECTIONS:
        made = section_lines(name, math.inf if DRY else args.seconds - (time.perf_counter() - start))
        lines += made
        print("\n".join(json.dumps(x) for x in made), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("".join(json.dumps(x) + "\n" for x in lines))
    print("\n" + table(lines))
    return any("error" in x and not x.get("reached", False) for x in lines)


if __name__ == "__main__":
    sys.exit(main())
