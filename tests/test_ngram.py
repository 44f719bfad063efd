"""The n-gram tilt: hints equal a plain dictionary's, come from what was scored before, and leave probabilities that sum to one."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, documents, tiny_config
from hypothesis import given, settings, strategies as st
from test_evaluation import METHODS, batches_of, per_target, some
from test_ttt import QUIET, forged, ready, run_batch, run_ttt

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import probes

TILT = dict(ngram_tilt_enabled=True, token_order=4, token_threshold=0.5)


def plain_hints(tokens, order, n: int, threshold: float) -> list[int]:
    """The definition: one pass in the order of scoring over a dictionary of the contexts seen so far."""
    table, hints = {}, [-1] * (len(tokens) - 1)
    for i in order:
        context = tuple(tokens[i - n + 1 : i + 1].tolist()) if i >= n - 1 else ()
        if tokens[: i + 1].tolist()[::-1].index(tg.BOS_ID) < n - 1:  # the document holds fewer than n tokens so far
            continue
        counts, total, best = table.get(context, ({}, 0, None))
        if total and counts[best] / total >= threshold:
            hints[i] = best
        y = int(tokens[i + 1])
        counts[y] = counts.get(y, 0) + 1
        table[context] = (counts, total + 1, y if best is None or counts[y] > counts[best] else best)
    return hints


def streams():
    """Few distinct tokens, so that contexts repeat, tie and overtake each other; or phrases over and over; with document starts."""
    small = st.integers(0, 5).flatmap(lambda top: st.lists(st.integers(0, top), min_size=1, max_size=150))
    phrases = st.lists(st.sampled_from([(2, 3, 2, 3, 4), (2, 3, 2, 3, 5), (65535,) * 4, (1, 0), (2,)]), min_size=1, max_size=40)
    return st.one_of(small, phrases.map(lambda picked: [t for p in picked for t in p])).map(lambda t: np.array([1, *t], np.uint16))


@settings(max_examples=400, deadline=None)
@given(streams(), st.integers(3, 18), st.sampled_from([0, 0.25, 0.5, 2 / 3, 0.8, 1]), st.randoms(use_true_random=False))
def test_hints_equal_a_dictionary(tokens, token_order, threshold, random):
    order = list(range(len(tokens) - 1))
    for shuffled in (False, True):
        if shuffled:
            random.shuffle(order)
        cfg = tiny_config(token_order=token_order, token_threshold=threshold)
        got = tg.ngram_hints(cfg, tokens, np.array(order), "cpu")
        assert got.tolist() == plain_hints(tokens, order, token_order - 1, threshold)


def test_hints_on_natural_repetition():
    tokens = np.concatenate(documents(40, 3, longest=200)).astype(np.uint16)
    for n, threshold in ((15, 0.8), (3, 0.6), (8, 0.8)):
        cfg = tiny_config(token_order=n + 1, token_threshold=threshold)
        got = tg.ngram_hints(cfg, tokens, np.arange(len(tokens) - 1), "cpu")
        assert got.tolist() == plain_hints(tokens, range(len(tokens) - 1), n, threshold)
        assert (got >= 0).sum() > 100, "there is something to compare"


def test_ties_keep_the_first_and_a_share_below_the_threshold_is_silent():
    a = [1, 9, 9]
    tokens = np.array([*a, 5, *a, 6, *a, 6, *a, 5, *a, 7], np.uint16)
    hints = [tg.ngram_hints(tiny_config(token_order=3, token_threshold=t), tokens, np.arange(len(tokens) - 1), "cpu") for t in (0, 0.6)]
    after = np.arange(2, len(tokens) - 1, 4)
    assert hints[0][after].tolist() == [-1, 5, 5, 6, 6], "one each: the first; then 6 leads, and a tie does not depose it"
    assert hints[1][after].tolist() == [-1, 5, -1, 6, -1]


@settings(max_examples=100, deadline=None)
@given(streams(), st.integers(3, 8), st.data())
def test_hints_do_not_know_the_future(tokens, token_order, data):
    cfg, order = tiny_config(token_order=token_order, token_threshold=0.5), np.arange(len(tokens) - 1)
    hints, cut = tg.ngram_hints(cfg, tokens, order, "cpu"), data.draw(st.integers(1, len(tokens)))
    other = tokens.copy()
    other[cut:] = (other[cut:] + data.draw(st.integers(1, 9))) % 7
    assert np.array_equal(tg.ngram_hints(cfg, other, order, "cpu")[:cut], hints[:cut])  # hint i may see tokens up to i


# ---------------------------------------------------------------------------------------------------- the tilt


def test_the_tilted_probabilities_sum_to_one_and_are_a_boosted_logit(world, random_model):
    """Every token of the vocabulary as the target in turn, hinted and not."""
    cfg, (V, n) = tiny_config(ngram_tilt_enabled=True), (64, 30)
    model, order = random_model(cfg), tg.layer_order(cfg, True)
    inputs = torch.randint(0, V, (1, n), generator=torch.Generator().manual_seed(0))
    hints = np.where(np.arange(n) % 3 == 0, -1, np.arange(n) % V)
    with torch.no_grad():
        score = tg.partial(model, inputs, layers=order)
        both = [tg.graded(score, torch.full((1, n), y), torch.from_numpy(hints)[None], cfg.token_boost) for y in range(V)]
    plain, tilted = (torch.stack([pair[i] for pair in both], -1)[0] for i in (0, 1))
    assert torch.allclose((-tilted).double().exp().sum(-1), torch.ones(n, dtype=torch.float64), atol=1e-5)  # fp32 log-softmax
    boosted = -plain.double()
    boosted[np.arange(n)[hints >= 0], hints[hints >= 0]] += cfg.token_boost
    assert torch.allclose(-tilted.double(), boosted.log_softmax(-1), atol=1e-5)
    assert torch.equal(tilted[hints < 0], plain[hints < 0]) and (tilted != plain)[hints >= 0].any(-1).all()


def expected_tilt(cfg, data, order, nats_of) -> np.ndarray:
    """The formula, by hand. nats_of(tokens): nats per target when these stand in the targets' places."""
    hints = np.array(plain_hints(data.tokens, order, cfg.token_order - 1, cfg.token_threshold))
    y, nats, hinted = data.tokens[1:], nats_of(data.tokens[1:]), nats_of(np.maximum(hints, 0))
    tilted = nats - cfg.token_boost * (y == hints) + np.log1p(np.exp(-hinted) * (math.exp(cfg.token_boost) - 1))
    assert (hints >= 0).sum() > 50 and (hints == y).any() and ((hints >= 0) & (hints != y)).any()
    return np.where(hints >= 0, tilted, nats)


@pytest.mark.parametrize("method", METHODS)
def test_the_evaluation_is_tilted(method, random_model):
    cfg, data = tiny_config(eval_method=method, **TILT), some(12)
    model, plain = random_model(cfg), dataclasses.replace(cfg, ngram_tilt_enabled=False)

    @torch.no_grad()
    def nats_of(tokens):
        out = np.full(len(tokens), np.nan)
        for b in batches_of(cfg, data):
            targets = torch.from_numpy(tokens[b.targets].astype(np.int64))
            nats = model(b.inputs, targets, layers=tg.layer_order(cfg, True), segments=b.segments).numpy()
            out[b.targets[b.targets >= 0]] = nats[b.targets >= 0]
        return out

    expected = expected_tilt(cfg, data, range(len(data.target_bytes)), nats_of)
    got, untilted = (per_target(c, data, model) for c in (cfg, plain))
    assert np.abs(got - expected).max() < 1e-4 and np.abs(untilted - nats_of(data.tokens[1:])).max() < 1e-4  # fp32
    assert np.abs(got - untilted).max() > 1


def test_scoring_order_is_the_order_of_scoring(world, random_model):
    for changes in ({}, dict(ttt_lanes=3), dict(phased_ttt_num_phases=3)):
        cfg, data = tiny_config(**changes), some(14)
        order = tg.scoring_order(cfg, tg.split_at_phases(cfg, tg.document_batches(cfg, data)))
        ledger = run_ttt(cfg, world, random_model(cfg), data)
        assert sorted(order) == list(range(len(data.target_bytes)))
        assert (np.diff(ledger.when[order]) >= 0).all()


def test_test_time_training_is_tilted_and_learns_from_the_untilted_loss(world, random_model):
    cfg, data = tiny_config(**TILT), some(14)
    off, model = dataclasses.replace(cfg, ngram_tilt_enabled=False), random_model(cfg)
    order = tg.scoring_order(cfg, tg.split_at_phases(cfg, tg.document_batches(cfg, data)))
    hints = np.array(plain_hints(data.tokens, order, 3, 0.5))
    tilted, plain = run_ttt(cfg, world, model, data), run_ttt(off, world, model, data)
    assert np.abs(tilted.nats - plain.nats)[hints < 0].max() < 1e-3, "fp32 in another kernel; the adapters are the same"
    right, wrong = hints == data.tokens[1:], (hints >= 0) & (hints != data.tokens[1:])
    assert right.sum() > 50 and (tilted.nats < plain.nats + 1e-3)[right].all() and wrong.any()
    assert (tilted.nats > plain.nats - 1e-3)[wrong].all() and (plain.nats - tilted.nats)[right].max() > 1
    batch = tg.document_batches(cfg, data)[-1]
    _, a = run_batch(off, world, ready(model), data, batch)
    b, scorer = tg.AdapterChain(cfg, world, len(batch.sizes), seed=3), tg.announce_order(cfg, tg.Scorer(data, world), order)
    tg.score_batch(cfg, ready(model), scorer, batch, b)
    assert np.array_equal(scorer.hints, hints) and (scorer.hints[scorer.own > 0] >= 0).any()
    for x, y in zip(a.loras, b.loras, strict=True):
        assert (x.B - y.B).norm() <= 1e-3 * y.B.norm() and y.B.norm() > 0


# ---------------------------------------------------------------------------------------------------- causality


@pytest.mark.parametrize("method", METHODS)
def test_no_tilted_score_depends_on_the_future(method, random_model):
    """The real loop, bit for bit: tokens behind a cut are forged."""
    cfg, data = tiny_config(eval_method=method, **TILT), some(5)
    model, total = random_model(cfg), len(data.target_bytes)
    base = per_target(cfg, data, model)
    for cut in (30, total // 3, total - 2):
        other = per_target(cfg, forged(data, cut + 1, total + 1, cut), model)
        assert np.array_equal(other[:cut], base[:cut]) and not np.array_equal(other[cut:], base[cut:])


@pytest.mark.parametrize("nth", [0, 5, 10, 13])
def test_no_tilted_score_of_test_time_training_depends_on_what_is_scored_later(nth, world, random_model):
    """Documents are not scored in the order of the file, and neither are hints collected in it."""
    cfg, data = tiny_config(**TILT), some(14)
    model = random_model(cfg)
    base = run_ttt(cfg, world, model, data)
    starts, ends = data.documents()
    token = int(starts[nth] + (ends[nth] - starts[nth]) // 3) + 1
    other = run_ttt(cfg, world, model, forged(data, token, int(ends[nth])))
    before = base.when < base.when[token - 1]
    assert np.array_equal(other.nats[before], base.nats[before])
    assert not np.array_equal(other.nats[~before], base.nats[~before])


# ---------------------------------------------------------------------------------------------------- what the audit says


def probed(cfg, world, model, tilt=None) -> dict:
    """P1 and P2 through the real evaluation. tilt: replaces the hints of `ngram_hints`."""

    def replay(scorer):
        if cfg.ttt_enabled:
            quiet = dataclasses.replace(cfg, **QUIET)
            engine = tg.TttEngine(quiet, world, ready(model), scorer)
            return tg.TttRun(quiet, engine, scorer, lambda line: None).run()
        return tg.evaluate(cfg, world, model, scorer)

    with pytest.MonkeyPatch.context() as patch:
        if tilt:
            patch.setattr(tg, "ngram_hints", lambda cfg, tokens, order, device: tilt(tokens))
        return probes.probe_scoring(tg, some(12), world, cfg.vocab_size, replay, 4, 60, 3, 0, documents_masked=False)


PATHS = [dict(ttt_enabled=False), dict(ttt_enabled=False, eval_method="sliding", eval_seq_len=32), dict(ttt_lora_lr=0.02)]


@pytest.mark.parametrize("path", PATHS)
def test_the_audit_passes_the_tilt(path, world, random_model):
    cfg = tiny_config(**TILT, **path)
    found = probed(cfg, world, random_model(cfg))
    assert [found[p][0] for p in ("P1", "P2")] == ["PASS", "PASS"], found


@pytest.mark.parametrize("path", PATHS)
def test_the_audit_fails_a_hint_that_knows_its_target(path, world, random_model, monkeypatch):
    """Whether there is a hint depends on the realised token, as in the within-word gates (validity A4, V7); each sum is one."""
    cfg, gated = tiny_config(**TILT, **path), lambda tokens: np.where(tokens[1:] % 2, 7, -1).astype(np.int32)
    model = random_model(cfg)
    with pytest.raises(tg.RunError, match="a hint depends on its target"):
        probed(cfg, world, model, gated)

    def trusting(scorer, order, guess, boost):
        scorer.hints, scorer.boost = guess(scorer._data.tokens, order), boost

    monkeypatch.setattr(tg.Scorer, "set_hints", trusting)
    found = probed(cfg, world, model, gated)
    assert found["P1"][0] == "FAIL" and found["P2"][0] == "FAIL", found


def test_the_audit_fails_a_boost_that_is_not_divided_out(world, random_model, monkeypatch):
    cfg = tiny_config(**TILT, ttt_enabled=False)
    model = random_model(cfg)
    monkeypatch.setattr(torch, "log1p", torch.zeros_like)
    found = probed(cfg, world, model, lambda tokens: np.full(len(tokens) - 1, 7, np.int32))
    assert found["P1"][0] == "PASS" and found["P2"][0] == "FAIL", found
