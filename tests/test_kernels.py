"""KERNELS: each fast form equals its definition in values and gradients, and writes every cell it returns."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_config, write_dataset

import train_gpt as tg

# Sizes of segments; zeros are the padding of cu_seqlens, ones are documents of one token (attention is then the identity on v).
SEGMENTS = [[1], [7], [1, 1, 1], [5, 13, 1, 31], [3, 0, 0, 9, 0], [33, 17, 64, 2, 0, 0]]


def cu_seqlens(sizes) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def qkv(tokens: int, heads: int, kv_heads: int, head_dim: int = 12, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, h, head_dim, generator=g).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def defined_ce(logits, targets, cap):
    """Written out in fp64: log sum exp of the capped logits, minus the capped logit of the target."""
    z = cap * torch.tanh(logits.double() / cap)
    return z.exp().sum(-1).log() - z.gather(-1, targets[..., None])[..., 0]


@pytest.mark.parametrize("cap", [30.0, 12.0, 5.0])
def test_softcapped_ce_equals_its_fp64_definition(cap):
    g = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(3, 7, 41, generator=g)).requires_grad_()
    targets = torch.randint(0, 41, (3, 7), generator=g)
    wide = logits.detach().double().requires_grad_()
    nats, expected = tg.softcapped_ce(logits, targets, cap), defined_ce(wide, targets, cap)
    assert nats.dtype == torch.float32 and nats.shape == targets.shape
    torch.testing.assert_close(nats.double(), expected, rtol=0, atol=2e-5)  # fp32 ulp at 60 nats is 4e-6
    nats.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=0, atol=1e-6)  # gradients are at most 1


def test_fp32_softcap_costs_nothing_and_a_bf16_one_does():
    """Golden test C.11. Upstream's rounded cap costs 0.001 to 0.002 nats; ours must not."""
    g = torch.Generator().manual_seed(1)
    logits = (6 * torch.randn(64, 512, generator=g)).bfloat16()
    targets = logits.float().argmax(-1)
    exact = defined_ce(logits, targets, 30.0)
    good, rounded = tg.softcapped_ce(logits, targets, 30.0), tg.softcapped_ce(logits, targets, 30.0, round_cap=True)
    assert (good - exact).abs().max() < 1e-5
    assert (rounded - exact).abs().max() > 1e-3
    z = (30 * torch.tanh(logits.float() / 30)).bfloat16().double()
    by_hand = z.exp().sum(-1).log() - z.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(rounded.double(), by_hand, rtol=0, atol=1e-5)
    plain = logits.float()
    assert torch.equal(tg.softcapped_ce(plain, targets, 30.0, round_cap=True), tg.softcapped_ce(plain, targets, 30.0))


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.5, 1.0])
def test_leaky_relu_squared(slope):
    x = torch.tensor([-3.0, -0.5, 0.0, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    y = tg.leaky_relu_squared(x, slope)
    expected = [p * p if p > 0 else (slope * p) ** 2 for p in x.tolist()]
    torch.testing.assert_close(y.tolist(), expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad.tolist(), [2 * p if p > 0 else 2 * slope**2 * p for p in x.tolist()])


@pytest.mark.parametrize("window", [0, 1, 5, 64])
@pytest.mark.parametrize("sizes", SEGMENTS, ids=str)
def test_reference_attention_equals_a_loop_over_heads_and_tokens(sizes, window):
    """The definition itself against softmax written out: token t sees its segment's tokens up to t, the last `window` of them."""
    bounds = cu_seqlens(sizes)
    q, k, v = (t.detach().double() for t in qkv(sum(sizes), 4, 2))
    out = tg.document_attention_reference(q, k, v, bounds, max(sizes), window)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for t in range(start, end):
            first = max(start, t + 1 - window) if window else start
            for h in range(4):
                weights = torch.softmax(k[first : t + 1, h // 2] @ q[t, h] / 12**0.5, 0)
                torch.testing.assert_close(out[t, h], weights @ v[first : t + 1, h // 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [0, 1, 5, 64])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("sizes", SEGMENTS, ids=str)
def test_cpu_attention_equals_the_reference(sizes, kv_heads, window):
    bounds, results = cu_seqlens(sizes), []
    for attend in (tg.document_attention_cpu, tg.document_attention_reference):
        inputs = qkv(sum(sizes), 4, kv_heads)
        out = attend(*inputs, bounds, max(sizes), window)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad(out, inputs, direction)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=5e-6)  # two summation orders in fp32 over <= 64 tokens


@pytest.mark.parametrize("window", [0, 1, 5, 200])
@pytest.mark.parametrize("sizes", [*SEGMENTS, [300, 40, 0, 0], [1, 127, 128, 129]], ids=str)
def test_flex_attention_equals_the_reference(sizes, window, monkeypatch):
    """Values alone, not compiled: FlexAttention has no backward on a CPU. Blocks are 128 wide, so the longer rows leave some out."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    bounds, inputs = cu_seqlens(sizes), [t.detach() for t in qkv(sum(sizes), 4, 2, 16)]
    out = tg.flex_attention()(*inputs, bounds, max(sizes), window)
    torch.testing.assert_close(out, tg.document_attention_reference(*inputs, bounds, max(sizes), window), rtol=1e-5, atol=5e-6)


def test_flex_attention_is_one_graph_and_reads_the_blocks_it_needs():
    from torch.nn.attention.flex_attention import BlockMask

    seen, make = [], BlockMask.from_kv_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **options: f)
        attend = tg.flex_attention()
        patch.setattr(BlockMask, "from_kv_blocks", lambda *a, **k: seen.append(make(*a, **k)) or seen[-1])
        bounds, inputs = cu_seqlens([300, 84, 256]), [t.detach() for t in qkv(640, 4, 2, 16)]
        expected = attend(*inputs, bounds, 300)
    assert seen[0].kv_num_blocks.tolist() == [[[1, 2, 3, 1, 2]]]  # blocks 0..2 and 2 hold the first document's end, 3 and 4 the last
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, bounds, 300), expected, rtol=1e-5, atol=5e-6)


def test_cpu_attention_in_bf16_is_as_good_as_the_reference():
    sizes = [19, 1, 44]
    q, k, v = qkv(64, 4, 2, 16, torch.bfloat16)
    bounds = cu_seqlens(sizes)
    exact = tg.document_attention_reference(q.double(), k.double(), v.double(), bounds, 44)
    out = tg.document_attention_cpu(q, k, v, bounds, 44)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() < 0.03  # one rounding of values up to 4: half an ulp is 0.008, doubled for the weights


def test_every_cell_is_written(monkeypatch):
    """Fresh memory is poisoned with NaN: a cell that the loop over segments forgets shows up in values or gradients."""
    allocate = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    new_empty = torch.Tensor.new_empty
    calls = []

    def poisoned(function):
        def call(*args, **kwargs):
            t = function(*args, **kwargs)
            calls.append(t.shape)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return call

    for name, function in allocate.items():
        monkeypatch.setattr(torch, name, poisoned(function))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    for sizes in SEGMENTS:
        inputs = qkv(sum(sizes), 4, 2)
        out, lse = tg._document_attention_cpu(inputs[0], *(t.repeat_interleave(2, dim=1) for t in inputs[1:]), cu_seqlens(sizes), 5)
        assert out.isfinite().all() and lse.isfinite().all()
        for grad in torch.autograd.grad(out.sum(), inputs):
            assert grad.isfinite().all()
    assert len(calls) >= 5 * len(SEGMENTS)  # the poison was really there: two buffers forward, three backward


def test_custom_operators_are_well_formed():
    """Schema, fake shapes, autograd and AOT dispatch, as torch itself checks them."""
    sizes = [5, 13, 1, 0, 9]
    q, k, v = qkv(28, 4, 4)
    bounds = cu_seqlens(sizes)
    torch.library.opcheck(tg._document_attention_cpu, (q, k, v, bounds, 4))
    with torch.no_grad():
        out, lse = tg._document_attention_cpu(q, k, v, bounds, 4)
    plain = [t.detach() for t in (torch.randn_like(out), q, k, v, out, lse)]
    torch.library.opcheck(tg._document_attention_cpu_backward, (*plain, bounds, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_chooses_its_kernel_after_a_trial(dtype):
    name, attend, trials = tg.choose_attention("auto", tg.World(0, 1, torch.device("cpu"), dtype))
    assert name == "cpu" and attend is tg.document_attention_cpu and trials.startswith("cpu:") and "sdpa" not in trials


def test_a_wanted_attention_is_taken_or_refused(monkeypatch):
    world = tg.World(0, 1, torch.device("cpu"), torch.float32)
    assert tg.choose_attention("sdpa", world)[1] is tg.document_attention_reference
    with pytest.raises(tg.RunError, match=r"ATTN_BACKEND=fa3 can not be had here: cpu in torch.float32 has cpu, sdpa"):
        tg.choose_attention("fa3", world)


def test_a_wrong_attention_is_never_chosen(monkeypatch):
    """One that lets a token see its future, and is fast."""

    def peeks(q, k, v, cu_seqlens, max_len, window=0):
        return tg.document_attention_cpu(q, k, v.roll(-1, 0), cu_seqlens, max_len)

    world = tg.World(0, 1, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(tg, "attention_backends", lambda world: dict(cpu=peeks, sdpa=tg.document_attention_reference))
    choose = tg.choose_attention.__wrapped__
    assert choose("auto", world)[0] == "sdpa"
    with pytest.raises(tg.RunError, match="ATTN_BACKEND=cpu is wrong on this machine: relative error"):
        choose("cpu", world)


def test_the_fastest_right_attention_is_chosen(monkeypatch):
    world = tg.World(0, 1, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(tg, "attention_backends", lambda world: dict(fa3="a", varlen="b", sdpa="c"))
    results = dict(a=(0.001, 0.5), b=(0.001, 0.25), c=(0.0, 0.01))
    monkeypatch.setattr(tg, "attention_trial", lambda attend, world, lengths: results[attend])
    assert tg.choose_attention.__wrapped__("auto", world) == ("varlen", "b", "fa3:500.00ms varlen:250.00ms")


def test_an_attention_that_does_not_run_is_passed_over(monkeypatch):
    """As cuDNN without a kernel for this device, or a torch whose operator takes other arguments."""
    def missing(*_):
        raise NotImplementedError("Could not run 'aten::_cudnn_attention_forward'\nwith a page of detail")

    def other_arguments(*_):
        raise TypeError

    world, choose = tg.World(0, 1, torch.device("cpu"), torch.float32), tg.choose_attention.__wrapped__
    monkeypatch.setattr(tg, "attention_backends", lambda world: dict(fa3=other_arguments, cudnn=missing, cpu=tg.document_attention_cpu))
    name, _, trial_texts = choose("auto", world)
    expected = r"fa3 does not run on this machine: TypeError\(\), cudnn does .*forward', cpu:[\d.]+ms"
    assert name == "cpu" and re.fullmatch(expected, trial_texts)
    with pytest.raises(tg.RunError, match=r"ATTN_BACKEND=cudnn does not run on this machine: Could not .*; take another"):
        choose("cudnn", world)
    monkeypatch.setattr(tg, "attention_backends", lambda world: dict(cudnn=missing, sdpa=missing))  # the device is lost
    with pytest.raises(tg.RunError, match="ATTN_BACKEND=cudnn does not run .*, sdpa does not run .*; take another"):
        choose("auto", world)


def test_cudnn_attention_asks_torch_for_what_the_definition_says(monkeypatch):
    """torch's operator, whose arguments its own schema checks, played by the CPU kernel: packed rows, grouped heads, padded bounds."""
    calls, sizes = [], [5, 13, 1, 31, 0, 0]

    def forward(q, k, v, bias, bounds_q, bounds_k, longest_q, longest_k, lse, dropout=0.0, causal=False, debug=False, *, scale=None):
        calls.append(("forward", bias, longest_q, longest_k, lse, dropout, causal, debug, scale))
        assert torch.equal(bounds_q, cu_seqlens(sizes)) and torch.equal(bounds_k, bounds_q) and all(t.is_contiguous() for t in (q, k, v))
        out, m = tg._document_attention_cpu(q, *(t.repeat_interleave(2, 1) for t in (k, v)), bounds_q, 0)
        one = torch.zeros((), dtype=torch.int64)
        return out, m.T[..., None].contiguous(), bounds_q, bounds_k, longest_q, longest_k, one, one, torch.empty(0)

    def backward(grad, q, k, v, out, m, seed, offset, bias, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, *, scale=None):
        calls.append(("backward", bias, longest_q, longest_k, dropout, causal, scale))
        wide = [t.repeat_interleave(2, 1) for t in (k, v)]
        dq, dk, dv = tg._document_attention_cpu_backward(grad, q, *wide, out, m[..., 0].T, bounds_q, 0)
        return dq, *(t.unflatten(1, (2, 2)).sum(2) for t in (dk, dv))

    monkeypatch.setattr(tg, "varlen_attention", lambda: lambda *args: args)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cudnn_attention_forward", forward, "CPU")
        library.impl("_cudnn_attention_backward", backward, "CPU")
        attend, results = tg.cudnn_attention(), []
        for f in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True), tg.document_attention_reference):
            q, k, v = qkv(50, 4, 2)
            out = f(q, k, v.transpose(0, 1).contiguous().transpose(0, 1), cu_seqlens(sizes), 31, 31)
            results.append([out, *torch.autograd.grad(out, (q, k, v), torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))])
        q, k, v = (t.detach() for t in qkv(50, 4, 2))
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(tg._document_attention_cudnn, (q, k, v, cu_seqlens(sizes), 31), test_utils=tests)
    for made in results[:2]:
        for ours, reference in zip(made, results[2], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=5e-6)
    assert set(calls) == {("forward", None, 31, 31, True, 0.0, True, False, None), ("backward", None, 31, 31, 0.0, True, None)}
    assert attend(q, k, v, cu_seqlens(sizes), 31, 30)[5] == 30  # a window is varlen's


def test_backends_of_a_gpu_depend_on_its_age_and_on_what_is_installed(monkeypatch):
    made = {name: (lambda name=name: name, *rest[1:]) for name, rest in tg.ATTENTION_BACKENDS.items() if name != "flex"}
    monkeypatch.setattr(tg, "ATTENTION_BACKENDS", made)
    for installed, capability, dtype, expected in (
            ({"flash_attn_interface", "torch.nn.attention.varlen"}, (9, 0), torch.bfloat16, ["fa3", "cudnn", "varlen", "sdpa"]),
            ({"flash_attn_interface", "torch.nn.attention.varlen"}, (8, 0), torch.bfloat16, ["varlen", "sdpa"]),
            ({"flash_attn.cute", "torch.nn.attention.varlen"}, (12, 0), torch.bfloat16, ["fa4", "cudnn", "varlen", "sdpa"]),
            ({"torch.nn.attention.varlen"}, (7, 5), torch.float16, ["sdpa"]),
            ({"flash_attn_interface"}, (9, 0), torch.float32, ["sdpa"])):
        monkeypatch.setattr(tg, "module_exists", lambda name, installed=installed: name in installed)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert list(tg.attention_backends(tg.World(0, 1, torch.device("cuda", 0), dtype))) == expected


# ---- Triton kernels, in the interpreter: odd sizes, every form, fresh memory poisoned with NaN.
# The interpreter cuts fp32 to bf16 instead of rounding, so one rounding costs up to 2^-7 = 0.8 %, twice what a GPU's does.


@pytest.fixture
def poison(monkeypatch):
    """New memory holds NaN, so a cell that a kernel forgets shows up in its results."""
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        monkeypatch.setattr(owner, name, poisoned)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    return ((ours.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)).item()


def values_and_gradients(function, inputs, *rest):
    """Every output of function(*inputs, *rest) and the gradients of a random direction of them."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs, *rest)
    out = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(99)  # no input's seed: a direction along an input can be one in which nothing moves
    directions = [torch.randn(t.shape, generator=g).to(t.dtype) for t in out]
    return [*out, *torch.autograd.grad(out, inputs, directions)]


def compare(fused, definition, inputs, *rest, tolerance: float):
    """The kernel on `inputs` against the definition on the same numbers in fp64."""
    ours = values_and_gradients(fused, inputs, *rest)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in rest]
    reference = values_and_gradients(definition, [t.double() for t in inputs], *wide)
    errors = [relative_error(a, b) for a, b in zip(ours, reference, strict=True)]
    assert max(errors) < tolerance, errors


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("slope", [0.5, 0.3])
@pytest.mark.parametrize("form", tg.MLP_KERNELS[1:])
@pytest.mark.parametrize("shape", [(1, 32, 16, 32), (3, 23, 24, 40), (1, 97, 40, 72)], ids=str)
def test_fused_mlp_equals_its_definition(poison, shape, form, slope):
    B, T, D, hidden = shape
    inputs = [randn(B, T, D, dtype=torch.bfloat16), randn(hidden, D, dtype=torch.bfloat16, seed=1, scale=D**-0.5),
              randn(D, hidden, dtype=torch.bfloat16, seed=2, scale=hidden**-0.5)]
    compare(tg.fused_mlp(form), tg.leaky_mlp, inputs, slope, tolerance=0.015)


def test_fused_mlp_makes_only_the_gradients_asked_for():
    """Test-time training freezes the matrices: their gradients are two of the three GEMMs of the backward."""
    x = randn(2, 9, 16, dtype=torch.bfloat16).requires_grad_()
    up, down = randn(32, 16, dtype=torch.bfloat16, seed=1), randn(16, 32, dtype=torch.bfloat16, seed=2)
    out = tg.fused_mlp("lsb")(x, up, down, 0.5)
    reference = tg.leaky_mlp(x.detach().float().requires_grad_(), up.float(), down.float(), 0.5)
    assert relative_error(out, reference) < 0.01
    (grad,) = torch.autograd.grad(out.sum(), [x])
    assert grad.shape == x.shape and up.grad is None and down.grad is None


def test_the_sign_rides_in_the_last_bit_at_the_least_cost():
    """Identity weights make the hidden layer a function of x alone: of all bf16 whose last bit is the sign, the nearest to the square."""
    values = torch.cat([randn(500, scale=3.0), torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-20, -1e-20, 3e4, -3e4])]).bfloat16()
    x = torch.zeros(len(values), 16, dtype=torch.bfloat16)
    x[:, 3] = values
    hidden, _ = tg.mlp_up(x, torch.eye(16, dtype=torch.bfloat16), 0.5, "lsb")
    pre = values.float()
    post = torch.where(pre > 0, pre * pre, (0.5 * pre) ** 2).double()
    bits = torch.arange(0x7F80, dtype=torch.int32)  # all finite bf16 >= 0
    for bit in (0, 1):
        candidates = bits[bits % 2 == bit].to(torch.int16).view(torch.bfloat16).double()
        chosen = (pre <= 0) == bool(bit)
        ours = hidden[chosen, 3]
        assert (ours.view(torch.int16) & 1 == bit).all()
        nearest = (candidates[None] - post[chosen, None]).abs().min(1).values
        assert torch.equal((ours.double() - post[chosen]).abs(), nearest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "length", "heads", "kv_heads", "head_dim", "rope_dims"), [
    (1, 70, 4, 2, 16, 8), (3, 11, 6, 2, 12, 12), (2, 33, 2, 2, 8, 2), (1, 1, 8, 4, 64, 16)])
def test_split_heads_kernel_equals_its_definition(poison, batch, length, heads, kv_heads, head_dim, rope_dims, dtype):
    cfg = tg.Config(model_dim=heads * head_dim, num_heads=heads, num_kv_heads=kv_heads, rope_dims=rope_dims, lqer_enabled=False)
    cos, sin = tg.rotary_tables(cfg, length, length, torch.device("cpu"))
    inputs = [randn(batch, length, (heads + 2 * kv_heads) * head_dim, dtype=dtype), randn(heads, seed=3)]
    compare(tg.split_heads_op, tg.split_heads, inputs, cos, sin, kv_heads, tolerance=1e-5 if dtype == torch.float32 else 0.012)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "length", "heads", "kv_heads", "head_dim"), [(1, 70, 4, 2, 16), (3, 11, 6, 2, 12), (2, 33, 2, 2, 8)])
def test_gate_heads_kernel_equals_its_definition(poison, batch, length, heads, kv_heads, head_dim, dtype):
    inputs = [randn(batch, length, heads, head_dim, dtype=dtype), randn(batch, length, kv_heads, head_dim, dtype=dtype, seed=1),
              torch.sigmoid(randn(batch, length, heads, seed=2)).to(dtype)]
    compare(tg.gate_heads_op, tg.gate_heads, inputs, tolerance=1e-5 if dtype == torch.float32 else 0.02)


def test_gate_heads_kernel_survives_a_value_of_zero():
    y, v, gate = randn(1, 5, 4, 8), torch.zeros(1, 5, 2, 8), torch.ones(1, 5, 4)
    assert torch.equal(tg.gate_heads_op(y, v, gate), y) and torch.equal(tg.gate_heads(y, v, gate), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "cap"), [(64, 30.0), (41, 12.0), (300, 5.0)])
def test_head_ce_equals_its_definition(poison, vocab, cap, dtype):
    """Losses, and gradients of any weighting of them: no promise about what the loss is."""
    g = torch.Generator().manual_seed(0)
    x, head = randn(3, 7, 16, dtype=dtype), randn(vocab, 16, dtype=dtype, scale=5.0, seed=1)
    targets, weights = torch.randint(0, vocab, (3, 7), generator=g), torch.rand(3, 7, generator=g)
    ours, wide = ([t.detach().to(kind).requires_grad_() for t in (x, head)] for kind in (dtype, torch.float64))
    nats = tg.HeadCe.apply(*ours, targets, cap)
    expected = defined_ce(wide[0] @ wide[1].T, targets, cap)
    assert nats.dtype == torch.float32 and nats.shape == targets.shape
    assert relative_error(nats, expected) < (1e-5 if dtype == torch.float32 else 0.01)
    (weights * nats).sum().backward()
    (weights.double() * expected).sum().backward()
    for a, b in zip(ours, wide, strict=True):
        assert a.grad.dtype == dtype and relative_error(a.grad, b.grad) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize(("wd", "beta2"), [(0.0, 0.99), (0.5, 0.9)])
def test_fused_adam_is_adamw_without_a_first_moment(wd, beta2):
    """Several steps, a size that is no multiple of a block, a gradient that is not contiguous, and one that is zero."""
    shapes, results = ((3, 700), (5,), (4, 4)), []
    for make in (lambda ps: tg.FusedAdam(ps, 0.01, beta2, 1e-10, wd),
                 lambda ps: torch.optim.AdamW(ps, lr=0.01, betas=(0.0, beta2), eps=1e-10, weight_decay=wd)):
        parameters = [randn(*shape, seed=k).detach().requires_grad_() for k, shape in enumerate(shapes)]
        optimizer = make(parameters)
        for step in range(4):
            for k, p in enumerate(parameters):
                turned = randn(*reversed(p.shape), seed=10 * step + k).permute(*reversed(range(p.ndim)))
                p.grad = turned.detach() if k != 2 else torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        results.append(parameters)
    for ours, theirs, k in zip(*results, range(3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
        assert not torch.equal(ours, randn(*shapes[k], seed=k)) or (k == 2 and not wd)


def test_triton_operators_are_well_formed():
    cfg = tg.Config(model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4, lqer_enabled=False)
    cos, sin = tg.rotary_tables(cfg, 5, 5, torch.device("cpu"))
    qkv, gain = randn(1, 5, 32).requires_grad_(), randn(2).requires_grad_()
    torch.library.opcheck(tg.split_heads_op, (qkv, gain, cos, sin, 1))
    y, v, gate = (randn(1, 5, *tail).requires_grad_() for tail in ((2, 8), (1, 8), (2,)))
    torch.library.opcheck(tg.gate_heads_op, (y, v, gate))
    torch.library.opcheck(tg.ce_with_slope, (randn(5, 9), torch.zeros(5, dtype=torch.int64), 30.0))
    x, up = randn(5, 16, dtype=torch.bfloat16), randn(8, 16, dtype=torch.bfloat16)
    for form in tg.MLP_KERNELS[1:]:
        torch.library.opcheck(tg.mlp_up, (x, up, 0.5, form))
        torch.library.opcheck(tg.mlp_up_grad, (x, randn(16, 8, dtype=torch.bfloat16), x[:, :8].abs(), 0.5, form, ""))


@pytest.mark.parametrize("knob", ["mlp_kernel", "qk_kernel", "xsa_kernel", "fused_ce_kernel", "ttt_adam_kernel"])
def test_kernels_that_can_not_run_are_refused(knob, monkeypatch):
    cfg = tiny_config(**{knob: tg.Config.__dataclass_fields__[knob].metadata["choices"][-1]})
    cpu = tg.World(0, 1, torch.device("cpu"), torch.float32)
    if knob == "mlp_kernel":
        with pytest.raises(tg.RunError, match="MLP_KERNEL=lsb needs bf16"):
            tg.choose_kernels(cfg, cpu)
    else:
        assert tg.choose_kernels(cfg, cpu) != tg.choose_kernels(tiny_config(), cpu)
    monkeypatch.setattr(tg, "INTERPRETED", False)
    with pytest.raises(tg.RunError, match=f"{knob.upper()}=.* needs Triton and an NVIDIA GPU.*set them to eager"):
        tg.choose_kernels(cfg, cpu)


def test_training_with_all_kernels_follows_the_definitions(tmp_path):
    """Eight steps on one row, two blocks, bf16, plain and looped: the losses differ by less than those of two seeds do."""
    small = dict(data_path=str(write_dataset(tmp_path / "data")), num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1,
                 xsa_last_n=2, train_batch_tokens=64, train_microbatch_tokens=64, train_seq_len=32, train_seq_schedule="")
    fused = dict(mlp_kernel="lsb", qk_kernel="triton", xsa_kernel="triton", fused_ce_kernel="triton")
    world, curves = tg.World(0, 1, torch.device("cpu"), torch.bfloat16), {}
    for name, changes in dict(definitions={}, kernels=fused, other_seed=dict(seed=2)).items():
        cfg = tiny_config(**small, **changes)
        trainer = tg.Trainer(cfg, world, tg.Dataset.open(cfg, need_train=True), tg.choose_kernels(cfg, world))
        window = trainer.loader.next_step()
        curves[name] = torch.tensor([trainer.train_step(window, 32, step >= 4, 0.2, 0.9) for step in range(8)])
        trainer.loader.close()
    gap, noise = ((curves[name] - curves["definitions"]).abs() for name in ("kernels", "other_seed"))
    assert curves["definitions"][-1] < curves["definitions"][0] - 0.5  # it learns
    assert gap[0] < 0.01 and gap.mean() < noise.mean(), (gap, noise)


def test_kernels_compile_into_whole_graphs():
    """Forward and backward of a network with all kernels, no graph break, and the same numbers as without the compiler."""
    cfg = tiny_config(num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1, xsa_last_n=2, mlp_kernel="lsb", qk_kernel="triton",
                      xsa_kernel="triton", fused_ce_kernel="triton")
    world = tg.World(0, 1, torch.device("cpu"), torch.bfloat16)
    model = tg.build_model(cfg, world, tg.choose_kernels(cfg, world))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    tokens = torch.randint(4, 64, (1, 33), generator=torch.Generator().manual_seed(0))
    segments, results = tg.Segments(torch.tensor([0, 20, 32], dtype=torch.int32), 32), []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        nats = forward(tokens[:, :-1], tokens[:, 1:], layers=tg.layer_order(cfg, True), segments=segments, training=True)
        ((1 / 32) * nats.sum()).backward()
        results.append([nats.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    assert len(results[0]) > 20
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0.02, atol=2e-3)


def test_every_kernel_compiles_for_hopper_without_spilling():
    """sm_90a with no GPU: no stack, no spills, shared memory within a block's, tensor cores and the copy engine in use."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, ROOT / "bench" / "cubin.py", "triton"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(made) == 2 * (len(tg.MLP_KERNELS) - 1) + 7
    for line in made:
        assert line["stack_bytes"] == line["spills"] == 0 and line["shared_bytes"] <= 232_448 and line["registers"] <= 255
        assert not line["name"].startswith("mlp_") or (line["wgmma"] and line["tma_loads"])
