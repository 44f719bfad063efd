"""QUANT=s05 and GPTQ_CALIBRATION=self: mixed bits by trace, steps by percentile, pruning to a size, the model's own text."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings, strategies as st
from test_quantization import correlated, fake_hessians, normal

import train_gpt as tg


def s05_config(**changes) -> tg.Config:
    return tiny_config(**(dict(quant="s05", n_int6_layers=5, awq_lite_enabled=False, lqer_enabled=False) | changes))


@pytest.fixture(scope="module")
def tiny(random_model):
    """Configuration, state and Hessians of a tiny model with rows of every size, so that percentiles and the floor of 1 both matter."""
    cfg = s05_config()
    state = random_model(cfg).state_dict()
    for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"):
        bank = state[name]
        state[name] = bank * torch.linspace(0.5, 12, bank[0, :, 0].numel())[:, None]
        state[name][..., 3] *= 4  # outliers, worth clipping
    return cfg, state, fake_hessians(cfg, tg.gptq_inputs(cfg, tg.unbank(cfg, state)))


def s14_hessians(cfg, state) -> tg.Hessians:
    """Those of QUANT=s14, where the embedding has one too."""
    cfg = dataclasses.replace(cfg, quant="s14")
    return fake_hessians(cfg, tg.gptq_inputs(cfg, tg.unbank(cfg, state)))


def quantized(tiny, **changes) -> dict[str, tg.QuantizedTensor]:
    cfg, state, hessians = tiny
    return tg.quantize(dataclasses.replace(cfg, **changes), state, hessians, lambda line: None)


# ---- mixed bits


@pytest.mark.parametrize("kept", [0, 1, 5, 24, 66])
def test_the_largest_traces_keep_their_bits(tiny, kept):
    cfg, state, hessians = tiny
    inputs = tg.mixed_bits(dataclasses.replace(cfg, n_int6_layers=kept), tg.gptq_inputs(cfg, tg.unbank(cfg, state)), hessians)
    assert len(inputs) == 24 and {t.bits for t in inputs} <= {5, 6}
    traces = {bits: [float(hessians.H[t.site].trace()) for t in inputs if t.bits == bits] for bits in (5, 6)}
    assert len(traces[6]) == min(kept, 24)
    assert min(traces[6], default=np.inf) >= max(traces[5], default=0)
    plain = tg.S14.encode(tiny_config(), tg.unbank(cfg, state), s14_hessians(cfg, state))
    bits = {t.bits for name, t in plain.items() if name != "tok_emb.weight"}
    assert bits == {6}, "S14 gives every matrix MATRIX_BITS"


def test_integers_use_their_bits_and_the_embedding_is_int8_rows(tiny):
    cfg, state, hessians = tiny
    bits = {t.name: t.bits for t in tg.mixed_bits(cfg, tg.gptq_inputs(cfg, tg.unbank(cfg, state)), hessians)}
    stored = quantized(tiny)
    for name, n in bits.items():
        q = stored[name].parts["gptq", "q"]
        assert 2 ** (n - 2) <= q.abs().max() <= 2 ** (n - 1) - 1, "the last bit is used, and no other"
    expected = tg.Int8Rows.encode(state["tok_emb.weight"].float())
    assert all(torch.equal(stored["tok_emb.weight"].parts["int8_row", part], t) for part, t in expected.items())
    gates = quantized(tiny, gated_attn_quant_gate=False)
    assert "tok_emb.weight" not in bits and ("int8_row", "q") in gates["tok_emb.weight"].parts
    assert ("float16", "w") in gates["blocks.0.attn.attn_gate_w"].parts


# ---- steps by percentile


def test_the_chosen_percentile_is_the_best_of_one_sweep_each(tiny):
    """Candidates run as extra rows of one batch; here each runs alone."""
    cfg, state, hessians = tiny
    inputs = tg.mixed_bits(cfg, tg.gptq_inputs(cfg, tg.unbank(cfg, state)), hessians)
    stored, wins = tg.run_gptq(cfg, inputs, hessians, tg.clips_by_percentile, damping=0.01), set()
    for task in inputs:
        H = hessians.H[task.site].clone()
        H.diagonal().add_(0.01 * H.diagonal().mean())
        none, top, errors, scales = torch.zeros(1, H.shape[0], dtype=torch.bool), 2 ** (task.bits - 1) - 1, [], []
        for p in tg.PERCENTILES:
            clip = torch.from_numpy(np.quantile(task.W.abs().numpy(), p, axis=1)).float().clamp_min(1)
            q, scale, _ = tg.gptq(task.W[None], H[None], clip[None], task.bits, none, 8)
            assert np.allclose(scale[0].numpy(), np.maximum(clip.numpy() / top, 1 / top).astype(np.float16), rtol=2**-10)
            errors.append(float((task.W - q[0] * scale[0].float()[:, None]).square().sum()))
            scales.append(scale[0])
        best = int(np.argmin(errors))
        wins.add(best)
        error = float((task.W - stored[task.name].decode()).square().sum())
        assert error == pytest.approx(errors[best], rel=1e-3), task.name  # batched products sum in another order: ties fall elsewhere
        torch.testing.assert_close(stored[task.name].parts["gptq", "scale"], scales[best], rtol=2**-10, atol=0)
    assert len(wins) > 1, "if one percentile won everywhere, the search was not tested"


def test_small_rows_share_the_floor():
    clips = tg.clips_by_percentile(0.05 * normal(2, 6, 32), 1.0)
    assert clips.shape == (2, len(tg.PERCENTILES), 6) and clips.eq(1).all()
    big = 50 * normal(2, 6, 32)
    clips = tg.clips_by_percentile(big, 1.0)
    assert torch.equal(clips[:, -1], big.abs().amax(-1)) and (clips.diff(dim=1) >= 0).all()


def test_protected_columns_work_with_percentiles(tiny):
    stored = quantized(tiny, awq_lite_enabled=True, lqer_enabled=True)
    (name,) = [n for n, s in stored.items() if ("gptq", "hi_start") in s.parts]
    parts = stored[name].parts
    start = int(parts["gptq", "hi_start"][0])
    fine = parts["gptq", "q"][:, start : start + 8]
    bits = {t.name: t.bits for t in tg.mixed_bits(tiny[0], tg.gptq_inputs(tiny[0], tg.unbank(*tiny[:2])), tiny[2])}[name]
    ratio = parts["gptq", "scale"].float() / parts["gptq", "hi_scale"].float()
    assert torch.allclose(ratio, torch.tensor(127 / (2 ** (bits - 1) - 1)), rtol=2e-3), "both grids end where the percentile says"
    assert fine.abs().max() > 2 ** (bits - 1) - 1


# ---- pruning


def costs_by_hand(stored) -> list[tuple[float, str, int, int]]:
    return sorted((float(np.square(np.float32(s.parts["gptq", "scale"][r]))), name, r, c) for name, s in stored.items()
                  if ("gptq", "q") in s.parts for r, c in (s.parts["gptq", "q"].abs() == 1).nonzero().tolist())  # fmt: skip


def test_pruning_zeroes_the_cheapest_ones_and_nothing_else(tiny):
    stored = quantized(tiny)
    pruning, costs = tg.Pruning(stored), costs_by_hand(stored)
    assert len(pruning.ranked) == len(costs)
    for count in (0, 1, 1000, len(costs)):
        pruned, gone = pruning.apply(count), []
        for name, s in pruned.items():
            for key, t in s.parts.items():
                changed = (t != stored[name].parts[key]).nonzero().tolist()
                assert not changed or key == ("gptq", "q")
                for r, c in changed:
                    assert t[r, c] == 0 and stored[name].parts[key][r, c].abs() == 1
                    gone.append(float(np.square(np.float32(stored[name].parts["gptq", "scale"][r]))))
        assert np.allclose(sorted(gone), [cost for cost, *_ in costs[:count]])


def test_predicted_bits_are_the_entropy_of_what_is_left(tiny):
    pruning = tg.Pruning(quantized(tiny))
    for count in (0, 7, 900, len(pruning.ranked)):
        bits = 0.0
        for s in pruning.apply(count).values():
            if ("gptq", "q") in s.parts:
                _, n = np.unique(s.parts["gptq", "q"].numpy(), return_counts=True)
                bits -= (n * np.log2(n / n.sum())).sum()
        assert pruning.code_bits(count) == pytest.approx(bits, rel=1e-9)
    assert pruning.zeros_for(pruning.code_bits(0)) == 0 and pruning.zeros_for(0) == len(pruning.ranked)
    middle = pruning.zeros_for(pruning.code_bits(500))
    assert pruning.code_bits(middle) <= pruning.code_bits(500) and middle <= 500


def noise(size: int, seed: int, compressor: str = "brotli") -> tuple[tg.Config, dict[str, tg.QuantizedTensor]]:
    """A model of Gaussian matrices coarse enough for int5, as a large model would have them."""
    cfg = s05_config(compressor=compressor, model_dim=size, num_layers=2, loop_end=1, parallel_start_layer=1, vocab_size=8, xsa_last_n=2)
    generator, stored = torch.Generator().manual_seed(seed), {}
    for name, shape in tg.tensor_shapes(cfg).items():
        W = torch.randn(shape, generator=generator)
        parts = {("float16", key): t for key, t in tg.Float16.encode(W).items()}
        if W.ndim == 2 and min(shape) > 32:
            W *= torch.rand(shape[0], 1, generator=generator)
            clip, none = 6 * W.std(-1), torch.zeros(1, shape[1], dtype=torch.bool)
            q, scale, hi = (t[0] for t in tg.gptq(W[None], torch.eye(shape[1])[None], clip[None], 5, none, 8))
            parts = {("gptq", key): t for key, t in tg.Gptq.encode(q, scale, hi, [], 8).items()}
        stored[name] = tg.QuantizedTensor(parts)
    return cfg, stored


@given(st.floats(0.9, 0.999), st.integers(0, 99), st.sampled_from(["brotli", "range"]))
@settings(max_examples=3, deadline=None)
def test_the_artifact_lands_just_below_its_target(share, seed, compressor):
    cfg, stored = noise(64, seed, compressor)
    full, lines = len(tg.pack(cfg, stored)), []
    code = 1000 + seed  # the script counts too
    cfg = dataclasses.replace(cfg, target_bytes=code + int(share * full))
    pruned, blob = tg.prune_to_fit(cfg, stored, code, lines.append)
    assert 0.99 * cfg.target_bytes < len(blob) + code <= cfg.target_bytes  # 40 kB: a byte of the coder's whims is 0.003 %
    assert blob == tg.pack(cfg, pruned) and len(lines) <= 5


def test_without_need_nothing_is_pruned_and_without_hope_the_smallest_size_is_named(tiny):
    cfg, stored = noise(48, 0)
    for same in (cfg, dataclasses.replace(cfg, target_bytes=0)):
        assert tg.prune_to_fit(same, stored, 500, print)[0] is stored
    smallest = len(tg.pack(cfg, tg.Pruning(stored).apply(10**9)))
    with pytest.raises(tg.RunError, match=f"TARGET_BYTES=1000.*{smallest + 500}"):
        tg.prune_to_fit(dataclasses.replace(cfg, target_bytes=1000), stored, 500, lambda line: None)


def test_s14_is_never_pruned(tiny):
    _, state, _ = tiny
    cfg = tiny_config(quant="s14", target_bytes=1000)
    hessians = s14_hessians(cfg, state)
    stored, blob = tg.quantize_to_fit(cfg, state, hessians, 500, lambda line: None)
    assert blob == tg.pack(cfg, stored) == tg.pack(cfg, tg.quantize(cfg, state, hessians, lambda line: None))


def test_the_whole_is_deterministic_and_survives_packing(tiny):
    cfg = dataclasses.replace(tiny[0], target_bytes=32_000)
    blobs = [tg.prune_to_fit(cfg, quantized(tiny), 0, lambda line: None)[1] for _ in range(2)]
    assert blobs[0] == blobs[1] and len(blobs[0]) <= 32_000
    back = tg.unpack(cfg, blobs[0])
    assert ("int8_row", "q") in back["tok_emb.weight"].parts
    tg.GPT(cfg).load_state_dict(tg.dequantized_state(cfg, back))


# ---- the model's own text


def test_the_model_writes_what_its_uncached_self_would(world, random_model):
    cfg = tiny_config(seed=3)
    model = random_model(cfg)
    text = tg.write_sequences(cfg, world, model, count=6, length=40)
    assert text.shape == (6, 41)
    draws = torch.rand(6, 41, generator=torch.Generator().manual_seed(3))
    tokens = torch.from_numpy(text)
    assert torch.equal(tokens[:, 0], (draws[:, 0] * 64).long())
    with torch.no_grad():
        logits = model(tokens[:, :-1], None, layers=tg.layer_order(cfg, True))
    odds = (logits / 0.8).softmax(-1).cumsum(-1)
    above = odds.gather(2, tokens[:, 1:, None])[..., 0]
    below = torch.nn.functional.pad(odds, (1, 0)).gather(2, tokens[:, 1:, None])[..., 0]
    assert ((below - 1e-5 < draws[:, 1:]) & (draws[:, 1:] < above + 1e-5)).all()  # fp32: the cache sums in another order
    assert len(np.unique(text)) > 20


def test_ranks_share_the_sequences_out(world, random_model):
    cfg = tiny_config()
    model = random_model(cfg)
    whole = tg.write_sequences(cfg, world, model, count=5, length=20)
    shares = [tg.write_sequences(cfg, dataclasses.replace(world, rank=r, size=2), model, count=5, length=20) for r in range(2)]
    assert np.array_equal(whole[0::2], shares[0]) and np.array_equal(whole[1::2], shares[1])
    assert not np.array_equal(whole, tg.write_sequences(dataclasses.replace(cfg, seed=1), world, model, count=5, length=20))
    assert tg.write_sequences(cfg, world, model, count=2).shape == (2, cfg.train_seq_len + 1)


def test_own_text_feeds_the_same_hessians(dataset, world, random_model):
    cfg = tiny_config(data_path=str(dataset), gptq_calibration="self")
    model, lines, expected = random_model(cfg), [], tg.Hessians()
    got = tg.collect_hessians(cfg, world, model, tg.Dataset.open(cfg, need_train=True), lines.append)
    for tokens in tg.write_sequences(cfg, world, model):
        row = tg.packed_row(tokens, cfg.train_seq_len, world.device)
        with torch.no_grad():
            model(row.inputs, row.targets, layers=tg.layer_order(cfg, True), segments=row.segments, tap=expected)
    assert got.H.keys() == expected.H.keys() and all(torch.equal(got.H[site], expected.H[site]) for site in got.H)
    assert got.count["head"] == 64 * cfg.train_seq_len and any("wrote 64 sequences" in line for line in lines)


def test_own_text_needs_no_training_budget():
    given = dict(max_wallclock_seconds=100.0, gptq_reserve_seconds=8.0)
    assert tiny_config(**given).train_budget_seconds == 92 and tiny_config(**given, gptq_calibration="self").train_budget_seconds == 100


# ---- configuration


def test_the_preset_and_what_it_refuses():
    cfg = tg.config_from_env({"PRESET": "s05"})
    assert (cfg.quant, cfg.gptq_calibration, cfg.n_int6_layers, cfg.compressor, cfg.eval_method) == ("s05", "self", 10, "brotli", "sliding")
    assert not (cfg.lqer_enabled or cfg.awq_lite_enabled or cfg.ttt_enabled or cfg.num_loops)
    with pytest.raises(ValueError, match="TARGET_BYTES"):
        tg.config_from_env({"TARGET_MB": "15.9"})
    with pytest.raises(ValueError, match="MATRIX_BITS=2"):
        tg.config_from_env({"QUANT": "s05", "MATRIX_BITS": "2"})
    notes = tg.without_effect(cfg, dict.fromkeys(("EMBED_BITS", "MLP_CLIP_SIGMAS", "GPTQ_RESERVE_SECONDS", "N_INT6_LAYERS"), "1"))
    assert len(notes) == 3 and not any("N_INT6" in note for note in notes)
    assert len(tg.without_effect(tg.Config(quant="s14"), {"N_INT6_LAYERS": "1", "TARGET_BYTES": "1"})) == 2


def test_uncorrelated_inputs_make_the_choice_plain():
    """H = c I: no error is passed on, so the best percentile of a matrix is the best of plain rounding."""
    task = tg.GptqInput("blocks.0.mlp.fc.weight", 3 * normal(12, 64), 5, 0.0, "site")
    hessians = tg.Hessians()
    hessians.H["site"], hessians.count["site"] = 7 * torch.eye(64), 1
    stored = tg.run_gptq(s05_config(), [task], hessians, tg.clips_by_percentile, damping=0.01)[task.name]
    errors = []
    for p in tg.PERCENTILES:
        scale = tg.step_size(task.W.abs().quantile(p, dim=1), 15).float()[:, None]
        errors.append(float((task.W - (task.W / scale).round().clamp(-15, 15) * scale).square().sum()))
    assert float((task.W - stored.decode()).square().sum()) == pytest.approx(min(errors), rel=1e-6)


def test_a_correlated_hessian_still_beats_rounding():
    H, task = correlated(64), tg.GptqInput("blocks.0.mlp.fc.weight", 3 * normal(12, 64), 5, 0.0, "site")
    hessians = tg.Hessians()
    hessians.H["site"], hessians.count["site"] = H, 1
    stored = tg.run_gptq(s05_config(), [task], hessians, tg.clips_by_percentile, damping=0.01)[task.name]
    scale = stored.parts["gptq", "scale"].float()[:, None]
    plain = (task.W / scale).round().clamp(-15, 15) * scale
    ours, rounding = (torch.einsum("ri,ij,rj->", e, H, e) for e in (task.W - stored.decode(), task.W - plain))
    assert ours < rounding
