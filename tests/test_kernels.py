"""KERNELS: each fast form equals its definition in values and gradients, and writes every cell it returns."""

import pytest
import torch

import train_gpt as tg

# Sizes of segments; zeros are the padding of cu_seqlens, ones are documents of one token (attention is then the identity on v).
SEGMENTS = [[1], [7], [1, 1, 1], [5, 13, 1, 31], [3, 0, 0, 9, 0], [33, 17, 64, 2, 0, 0]]


def cu_seqlens(sizes) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def qkv(tokens: int, heads: int, kv_heads: int, head_dim: int = 12, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, h, head_dim, generator=g).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def defined_ce(logits, targets, pos, neg):
    """Written out in fp64: log sum exp of the capped logits, minus the capped logit of the target."""
    z = logits.double()
    z = torch.where(z > 0, pos * torch.tanh(z / pos), neg * torch.tanh(z / neg))
    return z.exp().sum(-1).log() - z.gather(-1, targets[..., None])[..., 0]


@pytest.mark.parametrize(("pos", "neg"), [(30.0, 30.0), (30.0, 12.0), (5.0, 30.0)])
def test_softcapped_ce_equals_its_fp64_definition(pos, neg):
    g = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(3, 7, 41, generator=g)).requires_grad_()
    targets = torch.randint(0, 41, (3, 7), generator=g)
    wide = logits.detach().double().requires_grad_()
    nats, expected = tg.softcapped_ce(logits, targets, torch.tensor(pos), torch.tensor(neg)), defined_ce(wide, targets, pos, neg)
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
    cap = torch.tensor(30.0)
    exact = defined_ce(logits, targets, 30.0, 30.0)
    good, rounded = tg.softcapped_ce(logits, targets, cap, cap), tg.softcapped_ce(logits, targets, cap, cap, round_cap=True)
    assert (good - exact).abs().max() < 1e-5
    assert (rounded - exact).abs().max() > 1e-3
    z = (30 * torch.tanh(logits.float() / 30)).bfloat16().double()
    by_hand = z.exp().sum(-1).log() - z.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(rounded.double(), by_hand, rtol=0, atol=1e-5)
    plain = logits.float()
    assert torch.equal(tg.softcapped_ce(plain, targets, cap, cap, round_cap=True), tg.softcapped_ce(plain, targets, cap, cap))


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.5, 1.0])
def test_leaky_relu_squared(slope):
    x = torch.tensor([-3.0, -0.5, 0.0, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    y = tg.leaky_relu_squared(x, slope)
    expected = [p * p if p > 0 else (slope * p) ** 2 for p in x.tolist()]
    torch.testing.assert_close(y.tolist(), expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad.tolist(), [2 * p if p > 0 else 2 * slope**2 * p for p in x.tolist()])


@pytest.mark.parametrize("sizes", SEGMENTS, ids=str)
def test_reference_attention_equals_a_loop_over_heads_and_tokens(sizes):
    """The definition itself against softmax written out: token t of a segment sees the segment's tokens up to t, and nothing else."""
    bounds = cu_seqlens(sizes)
    q, k, v = (t.detach().double() for t in qkv(sum(sizes), 4, 2))
    out = tg.document_attention_reference(q, k, v, bounds, max(sizes))
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for t in range(start, end):
            for h in range(4):
                weights = torch.softmax(k[start : t + 1, h // 2] @ q[t, h] / 12**0.5, 0)
                torch.testing.assert_close(out[t, h], weights @ v[start : t + 1, h // 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("sizes", SEGMENTS, ids=str)
def test_cpu_attention_equals_the_reference(sizes, kv_heads):
    bounds, results = cu_seqlens(sizes), []
    for attend in (tg.document_attention_cpu, tg.document_attention_reference):
        inputs = qkv(sum(sizes), 4, kv_heads)
        out = attend(*inputs, bounds, max(sizes))
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad(out, inputs, direction)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=5e-6)  # two summation orders in fp32 over <= 64 tokens


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
        out, lse = tg._document_attention_cpu(inputs[0], *(t.repeat_interleave(2, dim=1) for t in inputs[1:]), cu_seqlens(sizes))
        assert out.isfinite().all() and lse.isfinite().all()
        for grad in torch.autograd.grad(out.sum(), inputs):
            assert grad.isfinite().all()
    assert len(calls) >= 5 * len(SEGMENTS)  # the poison was really there: two buffers forward, three backward


def test_custom_operators_are_well_formed():
    """Schema, fake shapes, autograd and AOT dispatch, as torch itself checks them."""
    sizes = [5, 13, 1, 0, 9]
    q, k, v = qkv(28, 4, 4)
    bounds = cu_seqlens(sizes)
    torch.library.opcheck(tg._document_attention_cpu, (q, k, v, bounds))
    with torch.no_grad():
        out, lse = tg._document_attention_cpu(q, k, v, bounds)
    plain = [t.detach() for t in (torch.randn_like(out), q, k, v, out, lse)]
    torch.library.opcheck(tg._document_attention_cpu_backward, (*plain, bounds))


def test_the_attention_of_a_cpu_is_the_cpu_kernel():
    for dtype in (torch.float32, torch.bfloat16):
        assert tg.choose_document_attention(tg.World(0, 1, torch.device("cpu"), dtype)) is tg.document_attention_cpu
