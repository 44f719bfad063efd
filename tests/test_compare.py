"""tools/compare.py: the published comparisons recomputed, the planned power, and what it refuses."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import compare
from compare import power, seeds_needed, summary, welch

S14 = [1.05740567, 1.05730104, 1.05807084]  # PR #2014, seeds 42, 314, 0
RATIO = 2.18838  # nats per bit per byte of the published set
MARGIN = 0.005 / RATIO
# Means of three seeds are published; of the standard deviations each is pinned by one published p and must then yield the others.
def seeds(mean: float, std: float) -> list[float]:
    """Three values with this mean and sample standard deviation."""
    return [mean - std, mean, mean + std]


S55 = seeds(1.06108, 0.00111)   # PR #1855; "from its seeds the sample standard deviation is .0011"
P1945 = seeds(1.05943, 0.00078)  # pinned by p = .056 against PR #1855
P1953 = seeds(1.05855, 0.00035)  # pinned by p = .020 of PR #2014 against it
S35 = seeds(1.05651, 0.00035)    # PR #2135, pinned by p = .0138 against PR #2014
RERUN = seeds(1.05831, 0.00034)  # PR #2014 by somebody else, pinned by t = 4.13 against PR #1855


def p(a: list[float], b: list[float], margin: float = 0.0) -> float:
    return welch(a, b, margin).p


# ---- the recomputed significance of the last records


def test_sample_not_population():
    s = summary(S14)
    assert (round(s.mean, 5), round(s.std, 5)) == (1.05759, 0.00042)
    assert round(float(np.std(S14)), 5) == 0.00034, "what the record printed"


def test_the_margin_in_bits_per_byte():
    assert round(MARGIN, 5) == 0.00228


@pytest.mark.parametrize(("better", "worse", "published"), [
    (S14, S55, 0.0106), (S35, S14, 0.0138), (P1945, S55, 0.056), (P1953, P1945, 0.090),
    (S14, P1953, 0.020), (RERUN, S55, 0.020),
])
def test_recomputed_p_values(better, worse, published):
    assert p(better, worse) == pytest.approx(published, rel=0.04)
    assert p(better, worse) > 0.01, "none passes the contest's level"


def test_two_sided_is_twice_that():
    u = compare.compare_unit({str(i): v for i, v in enumerate(S14)}, {str(i): v for i, v in enumerate(P1953)}, None, 0.01)
    assert u["p_two_sided"] == pytest.approx(0.040, rel=0.04)


def test_recomputed_margin_tests():
    assert p(S14, S55, MARGIN) == pytest.approx(0.097, rel=0.03)
    assert p(S35, S55, MARGIN) == pytest.approx(0.030, rel=0.03)
    assert P1953[1] - summary(S14).mean < MARGIN and p(S14, P1953, MARGIN) > 0.5, "#2014 cannot beat #1953 by the margin"


def test_a_published_t_with_a_wrong_standard_deviation():
    assert welch(RERUN, S55).t == pytest.approx(4.13, abs=0.02)
    wrong = welch(RERUN, seeds(S55[1], 0.00066))
    assert wrong.t == pytest.approx(6.49, abs=0.04) and wrong.p > 0.003
    assert stats.norm.sf(wrong.t) < 0.0001, "the published p < 0.0001 is that of a z-value"


@pytest.mark.parametrize(("n", "difference", "published"), [
    (3, 0.0035, 0.82), (3, 0.002, 0.37), (3, 0.001, 0.09), (5, 0.0015, 0.64), (10, 0.0015, 0.98), (10, 0.001, 0.72),
    (3, 0.005 - 0.00228, 0.60),
])
def test_power_of_a_design(n, difference, published):
    assert power(difference, 0.0007, n) == pytest.approx(published, abs=0.012)


@pytest.mark.parametrize(("n", "difference"), [(5, 0.0041), (10, 0.0034)])
def test_power_to_prove_the_margin(n, difference):
    assert power(difference - 0.00228, 0.0007, n) == pytest.approx(0.8, abs=0.03)
    assert power(0.005 - 0.00228, 0.0007, 3) < 0.8, "with three seeds more than .005 is needed"


def test_power_is_that_of_simulated_experiments():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (40_000, 4)), rng.normal(1.5, 1, (40_000, 4))
    hits = stats.ttest_ind(b, a, axis=1, equal_var=False, alternative="greater").pvalue < 0.05
    assert power(1.5, 1, 4, 0.05) == pytest.approx(hits.mean(), abs=0.01)


# ---- properties

SCORES = st.lists(st.floats(0.5, 2.5), min_size=2, max_size=8).filter(lambda v: np.std(v) > 1e-6)


@given(SCORES, SCORES, st.floats(0, 0.1))
@settings(max_examples=60, deadline=None)
def test_welch_is_the_formula(a, b, margin):
    (va, vb), (ma, mb) = ([f(side) for side in (a, b)] for f in (lambda v: np.var(v, ddof=1) / len(v), np.mean))
    t = (mb - ma - margin) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    ours = welch(a, b, margin)
    assert (ours.t, ours.df, ours.p) == pytest.approx((t, df, stats.t.sf(t, df)), rel=1e-6, abs=1e-12)


@given(SCORES, st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_paired_is_a_test_of_the_differences(a, seed):
    b = np.array(a) + np.random.default_rng(seed).normal(0.01, 0.01, len(a))
    rows = [{str(i): float(v) for i, v in enumerate(side)} for side in (a, b)]
    test, d = compare.paired(*rows), b - a
    t = d.mean() / (d.std(ddof=1) / math.sqrt(len(d)))
    assert (test.t, test.df, test.p) == pytest.approx((t, len(a) - 1, stats.t.sf(t, len(a) - 1)), rel=1e-6, abs=1e-12)


@given(st.floats(0.2, 5))
@settings(max_examples=20, deadline=None)
def test_seeds_needed_is_the_least_number_with_that_power(ratio):
    n = seeds_needed(ratio, 1.0)
    assert power(ratio, 1.0, n) >= 0.8 and (n == 2 or power(ratio, 1.0, n - 1) < 0.8)


def test_seeds_that_no_one_can_pay():
    assert seeds_needed(1e-6, 1.0) is None and seeds_needed(-1.0, 1.0) is None and seeds_needed(100.0, 1.0) == 2


# ---- the command


def submission(path: Path, scores: dict[int, float], ratio: float | None = RATIO, **more) -> Path:
    rows = {str(s): {"val_bpb": v, **({"val_loss": v * ratio} if ratio else {}), **more} for s, v in scores.items()}
    path.mkdir()
    (path / "submission.json").write_text(json.dumps({"val_bpb": 1.0, "seeds": list(scores), "seed_results": rows}))
    return path


def run(capsys, *args) -> dict:
    assert compare.main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_records_are_compared_in_both_units_and_paired(tmp_path, capsys):
    a = submission(tmp_path / "a", {42: 1.0574, 314: 1.0573, 0: 1.0581})
    b = submission(tmp_path / "b", {42: 1.0674, 314: 1.0672, 1: 1.0681})
    c = run(capsys, a, b)
    assert c["nats_per_bpb"] == pytest.approx(RATIO) and c["units"]["bpb"]["common_seeds"] == 2
    assert c["units"]["bpb"]["tests"]["paired"]["df"] == 1
    assert c["units"]["nats"]["margin"] == 0.005 and c["units"]["bpb"]["margin"] == pytest.approx(MARGIN)
    for name in ("welch", "welch_margin", "paired_margin"):  # nats are bits per byte times a constant, and so is the margin
        assert c["units"]["nats"]["tests"][name]["p"] == pytest.approx(c["units"]["bpb"]["tests"][name]["p"], rel=1e-6)
    assert c["verdict"].startswith("Shown, and by the margin: A is 0.00997 bpb better than B")
    assert compare.main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "| A | 1.05760 ± 0.00044 | 3 |" in out and "by the margin, paired by seed" in out and out.endswith(c["verdict"] + "\n")


def test_verdicts(capsys):
    for a, start in (("1.061,1.062,1.063", "Not shown: A is 0.00100 bpb worse"),
                     ("1.060,1.061,1.0605", "Not shown: A is 0.00050 bpb better"),
                     ("1.059,1.0591,1.0592", "Shown, but not by the margin: A is 0.00190 bpb better")):
        c = run(capsys, a, "1.061,1.0611,1.0609", "--nats-per-bpb", RATIO)
        assert c["verdict"].startswith(start), c["verdict"]
        assert "paired" not in c["units"]["bpb"]["tests"], "numbers have no seeds"


def test_no_nats_no_margin(capsys):
    c = run(capsys, "1.05,1.0501", "1.06,1.0601")
    assert "welch_margin" not in c["units"]["bpb"]["tests"] and list(c["units"]) == ["bpb"]
    assert "cannot be turned into bits per byte" in c["notes"][0]


def test_nats_of_two_tokenizers_are_never_compared(tmp_path, capsys):
    a = submission(tmp_path / "a", {1: 1.05, 2: 1.051}, ratio=2.4)
    b = submission(tmp_path / "b", {1: 1.06, 2: 1.062})
    c = run(capsys, a, b)
    assert list(c["units"]) == ["bpb"] and c["units"]["bpb"]["margin"] == pytest.approx(MARGIN), "B's own ratio"
    assert "nats of other tokens" in c["notes"][0]


def test_another_validation_set_is_no_comparison(tmp_path, capsys):
    a = submission(tmp_path / "a", {1: 1.05, 2: 1.051}, val_bytes=100)
    b = submission(tmp_path / "b", {1: 1.06, 2: 1.062}, val_bytes=117)
    c = run(capsys, a, b)
    assert c["verdict"].startswith("Not comparable") and "val_bytes: [100] in A, [117] in B" in c["notes"]


def test_run_folders_and_results(tmp_path, capsys):
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "result.json").write_text(json.dumps({"seed": seed, "val_bpb": 1 + seed / 100, "val_loss": 2 + seed / 50}))
    both = f"{tmp_path / '1'},{tmp_path / '2' / 'result.json'}"
    c = run(capsys, both, "1.1,1.2,1.3")
    assert c["units"]["bpb"]["a"] == {"mean": pytest.approx(1.015), "std": pytest.approx(0.01 / math.sqrt(2)), "n": 2}
    assert compare.main([f"{both},{tmp_path / '1'}", "1,2"]) == 1 and "seed 1 comes twice" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "message"), [
    (["1.05", "1.06,1.07"], "a test needs at least 2 seeds"), (["1,1,1", "2,2"], "no spread on either side"),
    (["nowhere", "1,2"], "cannot be read as JSON"),
])
def test_refusals(args, message, capsys):
    assert compare.main(args) == 1
    assert message in capsys.readouterr().err


def test_a_submission_without_seeds_is_refused(tmp_path, capsys):
    (tmp_path / "submission.json").write_text('{"val_bpb": 1.05, "seeds": [1, 2, 3]}')
    assert compare.main([str(tmp_path), "1,2"]) == 1 and "no score per seed" in capsys.readouterr().err
