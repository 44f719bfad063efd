"""MODEL: one forward, held to a second implementation that was written from the specification with plain loops."""

import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_config
from spec_model import PlainNetwork, layer_order
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg

# Both sides run in fp64; what is left is the fp32 of rotary tables and cross-entropy: about 1e-6 nats at losses near 10.
CLOSE = dict(rtol=0, atol=2e-5)


def spec_nats(model, cfg, tokens, targets, segments, looping, adapter=None, see=None, context=0):
    """Score one row by tests/spec_model.py: tokens and targets (T,) -> nats (T,)."""
    return PlainNetwork(model.state_dict(), cfg, adapter, see).nats(tokens, targets, segments, looping, context)


def sample(T=50, seed=0, bos=(0, 11, 12, 30)):
    """T tokens with document starts at `bos`, and targets that continue them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 64, T + 1)
    tokens[list(bos)] = tg.BOS_ID
    return tokens.astype(np.uint16)


def packed_run(model, tokens, max_len, looping=True, **kwargs):
    """nats (T,) of one packed row in the model's own precision."""
    row = tg.packed_row(tokens, max_len, torch.device("cpu"))
    with torch.no_grad():
        return model(row.inputs, row.targets, layers=tg.layer_order(model.cfg, looping), segments=row.segments, **kwargs)[0]


def dense_run(model, tokens, looping=True, **kwargs):
    """nats (B, T) of rows without packing; tokens (B, T + 1)."""
    window = torch.from_numpy(np.atleast_2d(tokens).astype(np.int64))
    with torch.no_grad():
        return model(window[:, :-1], window[:, 1:], layers=tg.layer_order(model.cfg, looping), **kwargs)


def segments_of(tokens, max_len):
    """Documents cut every max_len tokens: section 1.4, by walking the tokens."""
    out, start = [], 0
    for t in range(1, len(tokens)):
        if t == len(tokens) - 1 or tokens[t] == tg.BOS_ID or t - start == max_len:
            out.append((start, t))
            start = t
    return out


VARIANTS = {
    "as S14": {},
    "no gate": dict(sparse_attn_gate_enabled=False),
    "output gate": dict(sparse_attn_gate_enabled=False, attn_out_gate_enabled=True),
    "output gate reads q": dict(sparse_attn_gate_enabled=False, attn_out_gate_enabled=True, attn_out_gate_src="q"),
    "dense gate": dict(sparse_attn_gate_enabled=False, gated_attn_enabled=True),
    "no xsa": dict(xsa_last_n=0),
    "xsa everywhere": dict(xsa_last_n=4),
    "plain skips": dict(skip_gates_enabled=False),
    "one lane": dict(parallel_start_layer=0),
    "two lanes from the start of the decoder": dict(parallel_start_layer=1, num_layers=5, loop_start=2, loop_end=3),
    "no smear": dict(smear_gate_enabled=False),
    "smear leaks": dict(smear_gate_bos_fix=False),
    "no ln scale": dict(ln_scale=False),
    "yarn": dict(rope_yarn=True, rope_train_seq_len=16),
    "no group": dict(num_kv_heads=4),
    "lower cap": dict(logit_softcap=8.0),
    "slope": dict(mlp_slope=0.3, mlp_mult=3.0),
    "windows": dict(window_pattern="SSL", window_size=5),
    "two loops, odd": dict(num_loops=2, loop_start=1, loop_end=1, num_layers=5),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_the_specification(name, random_model):
    cfg = tiny_config(**VARIANTS[name])
    model, tokens, max_len = random_model(cfg).double(), sample(), 17
    window = torch.from_numpy(tokens.astype(np.int64))
    segments = segments_of(tokens, max_len)
    assert len(segments) > 4  # a document is cut, one has a single token
    for looping in (True, False):
        expected = spec_nats(model, cfg, window[:-1], window[1:], segments, looping, context=max_len)
        torch.testing.assert_close(packed_run(model, tokens, max_len, looping).double(), expected, **CLOSE)
        expected = spec_nats(model, cfg, window[:-1], window[1:], None, looping, context=50)
        torch.testing.assert_close(dense_run(model, tokens, looping)[0].double(), expected, **CLOSE)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_in_pieces_with_a_cache_equal_whole_rows(name, random_model):
    """Keys, values, rotations, smear gate, skips, lanes, loops and windows at every position, however the rows are cut."""
    cfg = tiny_config(**VARIANTS[name])
    model = random_model(cfg).double()
    tokens = np.stack([sample(seed=1), sample(seed=2, bos=(3, 4, 20))])
    window = torch.from_numpy(tokens.astype(np.int64))
    for looping, cuts in ((True, range(51)), (False, (0, 1, 8, 9, 30, 50)), (True, (0, 50))):
        cache, pieces = tg.Cache(50), []
        for start, end in itertools.pairwise(cuts):
            x, y = window[:, start:end], window[:, start + 1 : end + 1]
            with torch.no_grad():
                pieces.append(model(x, y, layers=tg.layer_order(cfg, looping), cache=cache))
        torch.testing.assert_close(torch.cat(pieces, 1), dense_run(model, tokens, looping), **CLOSE)


def test_without_targets_the_forward_gives_the_logits_behind_the_loss(random_model):
    for changes in ({}, dict(logit_softcap=8.0)):
        model, tokens = random_model(tiny_config(**changes)).double(), sample()
        window = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad():
            logits = model(window[:, :-1], None, layers=tg.layer_order(model.cfg, True))
        assert logits.abs().max() <= model.cfg.logit_softcap
        nats = -logits.log_softmax(-1).gather(2, window[:, 1:, None])[..., 0]
        torch.testing.assert_close(nats, dense_run(model, tokens), **CLOSE)


def test_variants_really_differ(random_model):
    """A switch that changed nothing would pass the test above on both sides."""
    tokens, results = sample(), {}
    for name, changes in VARIANTS.items():
        results[name] = packed_run(random_model(tiny_config(**changes)).double(), tokens, 17)
    for name in set(VARIANTS) - {"as S14"}:
        assert (results[name] - results["as S14"]).abs().max() > 1e-4, name


def test_bf16_follows_fp32(random_model, world):
    """The recipe's precision: fp32 masters, bf16 embedding and activations."""
    cfg = tiny_config()
    exact = random_model(cfg)
    exact.tok_emb.weight.data = exact.tok_emb.weight.data.bfloat16().float()
    half = tg.GPT(cfg, torch.bfloat16, tg.DEFINITIONS._replace(attend=tg.document_attention_cpu))
    half.load_state_dict(exact.state_dict())
    assert half.tok_emb.weight.dtype == torch.bfloat16 and {p.dtype for n, p in half.named_parameters() if n != "tok_emb.weight"} == {
        torch.float32
    }
    a, b = packed_run(exact, sample(), 17), packed_run(half, sample(), 17)
    assert b.dtype == torch.float32
    assert (a - b).abs().max() < 0.3 and (a - b).mean().abs() < 0.05  # 8 bits over 6 applications; unbiased


def test_tap_sees_the_input_of_every_matrix(random_model):
    cfg, tokens = tiny_config(), sample()
    model = random_model(cfg).double()
    ours, spec = [], []
    packed_run(model, tokens, 17, tap=lambda site, x: ours.append((site, x[0].double())))
    window = torch.from_numpy(tokens.astype(np.int64))
    spec_nats(model, cfg, window[:-1], window[1:], segments_of(tokens, 17), True, see=lambda site, x: spec.append((site, x)))
    sites = {f"blocks.{i}.{s}" for i in range(4) for s in ("attn_in", "attn_out", "mlp_in", "mlp_mid")} | {"head"}
    assert {site for site, _ in ours} == sites
    assert sorted(s for s, _ in ours) == sorted(s for s, _ in spec) and len(ours) == 4 * len(layer_order(cfg, True)) + 1
    for site in sites:  # in the order of passes
        for (_, x), (_, expected) in zip([t for t in ours if t[0] == site], [t for t in spec if t[0] == site], strict=True):
            torch.testing.assert_close(x, expected, **CLOSE)
    seen = dict(ours)  # the last pass of each site
    mid = tg.leaky_relu_squared(seen["blocks.2.mlp_in"] @ model.mlp_up_bank[2].T, 0.5)
    torch.testing.assert_close(seen["blocks.2.mlp_mid"], mid.detach(), rtol=1e-12, atol=1e-12)


def test_layer_orders_of_the_record():
    """Section 3.4."""
    cfg = tg.Config()
    plain, looped = tg.layer_order(cfg, False), tg.layer_order(cfg, True)
    assert plain == tuple(range(11)) and len(plain) // 2 == 5
    assert looped[:8] == (0, 1, 2, 3, 4, 5, 3, 4) and looped[8:] == (5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert tg.layer_order(tiny_config(num_loops=0), True) == (0, 1, 2, 3)
    for layers, start, end, loops in [(5, 0, 4, 3), (4, 2, 2, 1), (6, 1, 3, 2)]:
        c = tiny_config(num_layers=layers, loop_start=start, loop_end=end, num_loops=loops)
        assert tg.layer_order(c, True) == tuple(layer_order(c, True))


def expected_shapes(L=11, D=512, H=8, kv=256, ff=2048, V=8192, skips=8) -> dict[str, tuple[int, ...]]:
    """Table of section 3.1."""
    shapes = {
        "tok_emb.weight": (V, D), "qo_bank": (2 * L, D, D), "kv_bank": (2 * L, kv, D), "mlp_up_bank": (L, ff, D),
        "mlp_down_bank": (L, D, ff), "skip_weights": (skips, D), "skip_gates": (skips, D),
        "parallel_post_lambdas": (L, 2, 2), "parallel_resid_lambdas": (L, 2),
        "smear_gate.weight": (1, 12), "smear_lambda": (1,),
    }
    for i in range(L):
        shapes |= {f"blocks.{i}.attn.q_gain": (H,), f"blocks.{i}.attn.attn_gate_w": (H, 12), f"blocks.{i}.attn_scale": (D,)}
        shapes |= {f"blocks.{i}.mlp_scale": (D,), f"blocks.{i}.resid_mix": (2, D)}
    return shapes


def test_names_shapes_and_size_of_the_record():
    """Golden test C.3: 35,945,671, all of them trained."""
    with torch.device("meta"):
        model = tg.GPT(tg.Config(), torch.bfloat16)
    tensors = model.state_dict()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes()
    assert [name for name, t in tensors.items() if t.dtype != torch.float32] == ["tok_emb.weight"]
    assert sum(t.numel() for t in tensors.values()) == 35_945_671
    assert sum(t.numel() for name, t in tensors.items() if name.endswith("_bank")) == 31_719_424
    assert all(p.requires_grad for p in model.parameters())


def test_a_published_checkpoint_loads(world, tmp_path):
    """A dict with upstream's names, strictly: with the two caps of S14, or without, as S55 has it. Other caps are refused."""
    cfg = tiny_config(gate_window=12)
    shapes = expected_shapes(L=4, D=32, H=4, kv=16, ff=128, V=64, skips=3)
    g = torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    file = tmp_path / "final_model.pt"
    for caps in ({}, dict(softcap_pos=torch.tensor(30.0), softcap_neg=torch.tensor(30.0))):
        torch.save(state | caps, file)
        model = tg.load_checkpoint_model(cfg, world, file)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    torch.save(state | dict(softcap_pos=torch.tensor(30.0), softcap_neg=torch.tensor(20.0)), file)
    with pytest.raises(tg.RunError, match="has softcap_neg 20.0, this run LOGIT_SOFTCAP=30 for logits of both signs"):
        tg.load_checkpoint_model(cfg, world, file)


def test_packed_documents_are_separate_documents(random_model):
    model, tokens = random_model(tiny_config()).double(), sample()
    packed = packed_run(model, tokens, 64)
    bounds = [0, 11, 12, 30, 50]
    for start, end in itertools.pairwise(bounds):
        alone = dense_run(model, tokens[start : end + 1])[0]
        torch.testing.assert_close(packed[start:end], alone, **CLOSE)  # rotary positions are shifted: fp32 tables


def test_padding_segments_change_nothing(random_model):
    model, tokens = random_model(tiny_config()), sample()
    row = tg.packed_row(tokens, 17, torch.device("cpu"))
    order, outputs = tg.layer_order(model.cfg, True), []
    for count in (int((row.segments.cu_seqlens < 50).sum()) + 1, 64, 192):
        cu_seqlens = torch.full((count,), 50, dtype=torch.int32)
        cu_seqlens[: min(count, 64)] = row.segments.cu_seqlens[:count]
        outputs.append(model(row.inputs, row.targets, layers=order, segments=tg.Segments(cu_seqlens, 17)))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_future_is_invisible(random_model, looping, packed):
    """Replacing every token after t leaves the nats up to t as they were, to the bit: same shapes, same kernels, same order of sums."""
    model, tokens = random_model(tiny_config()), sample()
    order = tg.layer_order(model.cfg, looping)
    row = tg.packed_row(tokens, 17, torch.device("cpu"))
    segments = row.segments if packed else None
    with torch.no_grad():
        before = model(row.inputs, row.targets, layers=order, segments=segments)
        for t in (0, 10, 11, 12, 29, 40, 48):
            forged = row.inputs.clone()
            forged[:, t + 1 :] = torch.where(forged[:, t + 1 :] == 1, 1, (forged[:, t + 1 :] + 7) % 60 + 4)
            after = model(forged, row.targets, layers=order, segments=segments)
            assert torch.equal(after[:, : t + 1], before[:, : t + 1]), t
            assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :]), t


def test_other_documents_are_invisible_thanks_to_the_smear_mask(random_model):
    tokens = sample()
    forged = tokens.copy()
    forged[1:11] = (forged[1:11] + 7) % 60 + 4  # the first document only
    forged[31:] = (forged[31:] + 7) % 60 + 4  # and the last
    for fix in (True, False):
        model = random_model(tiny_config(smear_gate_bos_fix=fix))
        before, after = packed_run(model, tokens, 64), packed_run(model, forged, 64)
        assert not torch.equal(before[:10], after[:10]) and not torch.equal(before[30:], after[30:])
        assert torch.equal(before[11:30], after[11:30]) == fix


def make_adapters(cfg, rows, sites, zero_b=False, rank=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    D, slots = cfg.model_dim, len(layer_order(cfg, True))
    n_out = dict(q=D, k=cfg.kv_dim, v=cfg.kv_dim, o=D, mlp=D, head=cfg.vocab_size)

    def lora(site):
        lead = (rows,) if site == "head" else (slots, rows)
        A, B = torch.randn(*lead, rank, D, generator=g), torch.randn(*lead, n_out[site], rank, generator=g) * 0.2
        return tg.Lora(A, B * 0 if zero_b else B, 1.8)

    return tg.Adapters(**{site: lora(site) for site in sites})


SITES = ("q", "k", "v", "o", "mlp", "head")


@pytest.mark.parametrize("gate", ["sparse_attn_gate_enabled", "gated_attn_enabled", "attn_out_gate_enabled", None])
@pytest.mark.parametrize(("looping", "sites", "scored"), [(False, (), 1), (True, (), 1), (True, SITES, 1), (True, SITES, 0.25)], ids=str)
def test_flops_of_matrices_equal_torchs_counter(random_model, looping, sites, scored, gate):
    """What torch counts while the forward, and then the backward, runs. The first token of a row has no predecessor to smear; the B of
    q, k and v are padded with zeros to the width of the merged projection."""
    gates = dict.fromkeys(("sparse_attn_gate_enabled", "gated_attn_enabled", "attn_out_gate_enabled"), False)
    cfg = tiny_config(**(gates | ({gate: True} if gate else {})))
    model, T = random_model(cfg), 24
    adapters = make_adapters(cfg, 1, sites)
    for lora in filter(None, adapters):
        lora.A.requires_grad_(), lora.B.requires_grad_()
    tokens = torch.from_numpy(sample(T, 0, bos=(0,)).astype(np.int64))
    at = torch.arange(T - round(scored * T), T)[None]
    how = dict(segments=tg.Segments(torch.tensor([0, T], dtype=torch.int32), T)) if scored == 1 else dict(positions=at)
    products = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}

    def counted(counter):
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in products)

    with FlopCounterMode(display=False) as counter:
        nats = model(tokens[None, :-1], tokens[1:][at], layers=tg.layer_order(cfg, looping), adapters=adapters, **how)
    flops = tg.flops_per_token(cfg, [T], looping, adapters, scored)
    zeros = 2 * T * 2 * adapters.q.A.shape[0] * adapters.q.A.shape[-2] * (cfg.model_dim + 2 * cfg.kv_dim) if sites else 0
    forward = T * (flops.matmul + flops.lora) - 2 * cfg.gate_window + zeros
    assert counted(counter) == forward
    with FlopCounterMode(display=False) as counter:
        nats.sum().backward()
    assert counted(counter) == 2 * forward


def test_flops_of_attention_are_its_causal_pairs():
    cfg, lengths = tiny_config(), [5, 13, 1, 31]
    pairs = sum(1 for n in lengths for query in range(n) for key in range(n) if key <= query)
    applications = len(tg.layer_order(cfg, True))
    flops = tg.flops_per_token(cfg, lengths, True)
    assert flops.attention * sum(lengths) == pytest.approx(pairs * applications * cfg.num_heads * cfg.head_dim * 2 * 2)
    windowed = tiny_config(window_pattern="SL", window_size=4)
    seen = sum(min(query + 1, cap) for layer in tg.layer_order(windowed, True) for cap in [4 if layer % 2 == 0 else 999]
               for n in lengths for query in range(n))
    ours = tg.flops_per_token(windowed, lengths, True).attention * sum(lengths)
    assert ours == pytest.approx(seen * cfg.num_heads * cfg.head_dim * 2 * 2)
    spared = sum(min(query + 1, cap) for cap in [4 if tg.layer_order(windowed, True)[-1] % 2 == 0 else 999] for query in range(12))
    ours -= tg.flops_per_token(windowed, [16], True, scored=0.25).attention * 16
    seen -= sum(min(query + 1, 4 if layer % 2 == 0 else 999) for layer in tg.layer_order(windowed, True) for query in range(16)) - spared
    assert ours == pytest.approx(seen * cfg.num_heads * cfg.head_dim * 2 * 2)
    record = tg.flops_per_token(tg.Config(), [2048], True)  # spec/performance 1.1: 106.43 MFLOP/token without attention, 17 applications
    assert record.matmul / 1e6 == pytest.approx(106.43, abs=0.01)
    work = tg.FlopCount()
    work.add(record, "train", 100, 60)
    assert work.model == pytest.approx(300 * (record.matmul + record.attention)) and work.useful == pytest.approx(0.6 * work.model)
    assert work.hardware == pytest.approx(work.model + 100 * record.attention / 2)


@pytest.mark.parametrize("sites", [SITES, *((site,) for site in SITES)], ids=lambda s: "+".join(s))
def test_adapters_act_at_their_site_row_by_row(random_model, sites):
    """Section 10.4: per slot of the looped order and per document."""
    cfg = tiny_config()
    model = random_model(cfg).double()
    rows = np.stack([sample(20, seed, bos=(0,)) for seed in range(3)])
    adapters = make_adapters(cfg, 3, sites)
    nats = dense_run(model, rows, adapters=adapters)
    plain = dense_run(model, rows)
    for b in range(3):
        window = torch.from_numpy(rows[b].astype(np.int64))

        def lora(site, slot, b=b):
            found = getattr(adapters, site)
            return found and ((found.A[b], found.B[b], 1.8) if slot is None else (found.A[slot, b], found.B[slot, b], 1.8))

        expected = spec_nats(model, cfg, window[:-1], window[1:], None, True, lora)
        torch.testing.assert_close(nats[b].double(), expected, **CLOSE)
        assert (nats[b] - plain[b]).abs().max() > 1e-3


def test_fresh_adapters_change_nothing(random_model):
    cfg = tiny_config()
    model = random_model(cfg)
    rows = np.stack([sample(20, seed, bos=(0,)) for seed in range(3)])
    assert torch.equal(dense_run(model, rows, adapters=make_adapters(cfg, 3, SITES, zero_b=True)), dense_run(model, rows))


def test_adapters_of_a_row_are_private(random_model):
    """Values and gradients: other rows' adapters change nothing here, and this row's loss does not reach theirs."""
    cfg = tiny_config()
    model = random_model(cfg)
    rows = np.stack([sample(20, seed, bos=(0,)) for seed in range(3)])
    one, other = make_adapters(cfg, 3, SITES, seed=0), make_adapters(cfg, 3, SITES, seed=1)
    mixed = tg.Adapters(*(tg.Lora(a.A.clone(), a.B.clone(), a.scale) for a in other))
    for a, b in zip(mixed, one, strict=True):
        a.A[..., 1, :, :], a.B[..., 1, :, :] = b.A[..., 1, :, :], b.B[..., 1, :, :]
    assert torch.equal(dense_run(model, rows, adapters=mixed)[1], dense_run(model, rows, adapters=one)[1])
    alone = dense_run(model, rows[1:2], adapters=one.rows(1, 2))
    torch.testing.assert_close(alone, dense_run(model, rows, adapters=one)[1:2], rtol=1e-4, atol=1e-4)  # batch of 1: other fp32 kernels
    for lora in one:
        lora.A.requires_grad_(), lora.B.requires_grad_()
    window = torch.from_numpy(rows.astype(np.int64))
    model(window[:, :-1], window[:, 1:], layers=tg.layer_order(cfg, True), adapters=one)[1].sum().backward()
    for lora in one:
        for t in lora[:2]:
            assert t.grad[..., 1, :, :].abs().sum() > 0
            assert t.grad[..., 0, :, :].abs().sum() == 0 and t.grad[..., 2, :, :].abs().sum() == 0


@pytest.mark.parametrize("changes", [
    {}, dict(parallel_start_layer=0), dict(window_pattern="S", window_size=5), dict(num_layers=1, num_loops=0, parallel_start_layer=0),
    dict(sparse_attn_gate_enabled=False, attn_out_gate_enabled=True, attn_out_gate_src="q"),
    dict(sparse_attn_gate_enabled=False, xsa_last_n=0)], ids=str)  # fmt: skip
def test_positions_equal_slicing(random_model, changes):
    """Behind its attention the last slot computes nothing but these positions, and they see what they saw."""
    model = random_model(tiny_config(**changes)).double()
    rows = np.stack([sample(24, seed, bos=(0,)) for seed in range(2)])
    window = torch.from_numpy(rows.astype(np.int64))
    positions = torch.tensor([[3, 4, 5, 23], [0, 9, 9, 1]])
    adapters = make_adapters(model.cfg, 2, SITES)
    whole = dense_run(model, rows, adapters=adapters)
    with torch.no_grad():
        some = model(
            window[:, :-1],
            window[:, 1:].gather(1, positions),
            layers=tg.layer_order(model.cfg, True),
            adapters=adapters,
            positions=positions,
        )
    torch.testing.assert_close(some, whole.gather(1, positions), rtol=0, atol=1e-6)


def test_initial_values(world):
    """Table of section 3.1; the output projections are zero, so a fresh network predicts from the embedding alone."""
    cfg = tiny_config()
    model = tg.build_model(cfg, world)
    p, L = model.state_dict(), 4
    eye = dict(rtol=0, atol=1e-5)  # QR in fp32
    for i in range(L):
        for square in (p["qo_bank"][i], p["kv_bank"][i], p["kv_bank"][L + i]):
            torch.testing.assert_close(square @ square.T, torch.eye(len(square)), **eye)
        torch.testing.assert_close(p["mlp_up_bank"][i].T @ p["mlp_up_bank"][i], torch.eye(32), **eye)
        assert torch.equal(p[f"blocks.{i}.resid_mix"], torch.tensor([[1.0], [0.0]]).expand(2, 32))
        for name, value in dict(attn_scale=1, mlp_scale=1).items():
            assert (p[f"blocks.{i}.{name}"] == value).all()
        assert (p[f"blocks.{i}.attn.q_gain"] == 5.25).all() and (p[f"blocks.{i}.attn.attn_gate_w"] == 0).all()
    assert not torch.equal(p["qo_bank"][0], p["qo_bank"][1])
    assert (p["qo_bank"][L:] == 0).all() and (p["mlp_down_bank"] == 0).all()
    values = dict(
        skip_weights=1, skip_gates=0, parallel_post_lambdas=1, parallel_resid_lambdas=1.1, smear_lambda=0
    )
    for name, value in values.items():
        assert (p[name] == torch.tensor(float(value))).all(), name
    assert (p["smear_gate.weight"] == 0).all()
    emb = p["tok_emb.weight"]
    assert (
        emb.std().item() == pytest.approx(0.005, rel=0.1) and abs(emb.mean().item()) < 0.0005
    )  # 2,048 draws: 1.6 % and 1e-4 are one sigma
    dense = tg.build_model(tiny_config(sparse_attn_gate_enabled=False, gated_attn_enabled=True), world)
    assert dense.blocks[0].attn.attn_gate_w.std().item() == pytest.approx(0.01, rel=0.4)
    out = tg.build_model(tiny_config(sparse_attn_gate_enabled=False, attn_out_gate_enabled=True), world)
    assert (out.blocks[0].attn.attn_gate_proj.weight == 0).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_an_initial_value(name):
    """`torch.empty` must not survive: poisoned with NaN first, everything is finite afterwards."""
    cfg = tiny_config(**VARIANTS[name])
    model = tg.GPT(cfg)
    with torch.no_grad():
        for row in tg.parameters(cfg):
            p = model.get_parameter(row.name).fill_(float("nan"))
            row.init(p)
            assert p.isfinite().all(), row.name


ROW = dict(
    name="value_embed", shape=(8, 4), init=torch.nn.init.zeros_, optimizer="scalars", roles=tg.ELEMENTWISE, present=True)


@pytest.mark.parametrize("column", [name for name in ROW if name != "name"])
def test_a_tensor_that_leaves_out_a_column_is_an_error(column):
    with pytest.raises(TypeError, match=column):
        tg.Parameter(**{name: value for name, value in ROW.items() if name != column})


@pytest.mark.parametrize("column", ["codec", "bits", "clip_sigmas", "site", "stream", "sort_rows"])
def test_a_stored_form_that_leaves_out_a_column_is_an_error(column):
    with pytest.raises(TypeError, match=column):
        tg.StoredAs(**{name: value for name, value in tg.HALF._asdict().items() if name != column})
    with pytest.raises(TypeError, match="stored"):
        tg.Role("", "")


def test_a_new_row_reaches_model_optimizer_artifact_and_size(world, monkeypatch):
    """One row, nothing else: the tensor is made, initialised, learned, stored, read back and counted."""
    cfg, rows = tiny_config(), tg.parameters
    heads = dict(name="heads_bank", shape=(4, 8, 4), optimizer="matrices", roles=(tg.Role("ahead", "every", None),))
    unstored = dict(name="for_training", roles=(tg.Role("", "", None),))
    new = (tg.Parameter(**ROW), tg.Parameter(**ROW | unstored), tg.Parameter(**ROW | heads))
    monkeypatch.setattr(tg, "parameters", lambda cfg: (*rows(cfg), *new))
    tg.matrices.cache_clear()
    try:
        model = tg.build_model(cfg, world)
        assert (model.value_embed == 0).all() and (model.for_training == 0).all()
        optimizer = tg.TrainOptimizer(model, cfg, world)
        assert any(p is model.value_embed for p in optimizer.replicated)
        assert tg.tensor_shapes(cfg)["value_embed"] == (8, 4) and not {"for_training", "heads_bank"} & set(tg.tensor_shapes(cfg))
        tensors = tg.unbank(cfg, model.state_dict())
        stored = {name: tg.QuantizedTensor({("float16", "w"): t.half()}) for name, t in tensors.items()}
        back = tg.unpack(cfg, tg.pack(cfg, stored))
        model.load_state_dict(tg.dequantized_state(cfg, back))
        assert model.heads_bank.shape == (4, 8, 4) and len(optimizer.banks) == 5
    finally:
        tg.matrices.cache_clear()


def test_rows_name_what_there_is():
    for name in VARIANTS:
        cfg = tiny_config(**VARIANTS[name])
        for row in tg.parameters(cfg):
            assert row.optimizer in ("matrices", "scalars", "embedding")
            for role in row.roles:
                assert role.products in ("", "scored", "every") and role.stored.codec in tg.CODECS
                assert role.stored.stream in tg.STREAMS


def test_weights_depend_on_the_seed_alone(world):
    torch.manual_seed(5)
    first = tg.build_model(tiny_config(seed=3), world).state_dict()
    torch.randn(17)
    again, other = (tg.build_model(tiny_config(seed=s), world).state_dict() for s in (3, 4))
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    assert not torch.equal(first["qo_bank"], other["qo_bank"]) and not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])
