"""Is A better than B? Welch and paired tests, the contest's margin, and how many seeds would settle it.

    python tools/compare.py records/track_demo/2026-11-22_Demo logs/mine_1,logs/mine_2,logs/mine_3
    python tools/compare.py 1.05741,1.05730,1.05807 1.0611,1.0600,1.0622 --nats-per-bpb 2.18838

A and B are record folders, run folders, result.json or submission.json files, or values of val_bpb, joined by commas. The
claim tested is that A has the lower mean; every p is one-sided and every standard deviation that of the sample.
"""

import argparse
import bisect
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from foreign import named, read_json, seed_tables
from record import mean_std, spread
from rules import Broken, table
from scipy import stats

ALPHA = 0.01          # the contest's rule: 0.005 nats better at p < 0.01
MARGIN_NATS = 0.005
POWER = 0.8
MOST_SEEDS = 1000


# -- TESTS: of the claim that a is lower than b --------------------------------------------------------------------------

TITLES = {"welch": "A lower than B", "welch_margin": "A lower by the margin", "paired": "the same, paired by seed",
          "paired_margin": "by the margin, paired by seed"}


class Summary(NamedTuple):
    mean: float
    std: float  # of the sample
    n: int


class Test(NamedTuple):
    t: float
    df: float
    p: float  # one-sided


def summary(values: list[float]) -> Summary:
    """Raises Broken below two values: a spread cannot be guessed."""
    if len(values) < 2:
        raise Broken(f"{len(values)} value(s): a test needs at least 2 seeds a side")
    return Summary(*spread(values), len(values))


def run_test(test, a: list[float], b: list[float], margin: float, **options) -> Test:
    """Run one of scipy's t-tests of the claim that mean(b) - mean(a) exceeds `margin`."""
    found = test(np.array(b) - margin, a, alternative="greater", **options)
    return Test(float(found.statistic), float(found.df), float(found.pvalue))


def welch(a: list[float], b: list[float], margin: float = 0.0) -> Test:
    """Welch's t-test; degrees of freedom by Welch and Satterthwaite. Raises Broken without spread."""
    if len(set(a)) == len(set(b)) == 1:
        raise Broken("no spread on either side: these are copies, not seeds")
    return run_test(stats.ttest_ind, a, b, margin, equal_var=False)


def paired(a: dict[str, float], b: dict[str, float], margin: float = 0.0) -> Test | None:
    """Student's t-test on the differences of equal seeds; None below two of them or without spread."""
    seeds = [seed for seed in a if seed in b and not seed.startswith("#")]
    if len(seeds) < 2 or len({b[seed] - a[seed] for seed in seeds}) == 1:
        return None
    return run_test(stats.ttest_rel, [a[seed] for seed in seeds], [b[seed] for seed in seeds], margin)


def power(difference: float, std: float, n: int, alpha: float = ALPHA) -> float:
    """Chance that Welch's test on n seeds a side, each with this standard deviation, shows a true difference at p < alpha.

    Welch's t is noncentral t with 2n - 2 degrees of freedom; the test looks its threshold up at fewer, which depend only on the share
    of the variance that the samples happen to put on one side. That share is Beta((n - 1)/2, (n - 1)/2), here at 200 quantiles.
    """
    share = stats.beta.ppf((np.arange(200) + 0.5) / 200, (n - 1) / 2, (n - 1) / 2)
    threshold = stats.t.isf(alpha, (n - 1) / (share**2 + (1 - share) ** 2))
    return float(stats.nct.sf(threshold, 2 * n - 2, difference / (std * math.sqrt(2 / n))).mean())


def seeds_needed(difference: float, std: float, alpha: float = ALPHA, wanted: float = POWER) -> int | None:
    """Seeds a side for that power; None where a thousand do not suffice."""
    if difference <= 0:
        return None
    n = 2 + bisect.bisect_left(range(2, MOST_SEEDS + 1), wanted, key=lambda n: power(difference, std, n, alpha))
    return n if n <= MOST_SEEDS else None


# -- SAMPLES -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sample:
    """Seeds and their scores; nats only where every seed has them. A seed without a name is '#1', '#2', ..."""

    name: str
    rows: dict[str, dict]

    def values(self, unit: str) -> dict[str, float]:
        found = {seed: named(row, {"bpb": "val_bpb", "nats": "val_loss"}[unit]) for seed, row in self.rows.items()}
        return found if None not in found.values() else {}

    @property
    def nats_per_bpb(self) -> float | None:
        """Nats per token that one bit per byte is worth on this validation set with this tokenizer."""
        nats, bpb = self.values("nats"), self.values("bpb")
        return sum(nats.values()) / sum(bpb.values()) if nats else None

    def facts(self, key: str) -> set:
        return {row[key] for row in self.rows.values() if key in row}


def load(text: str) -> Sample:
    """The sample that a command line argument names. Raises Broken."""
    rows: dict[str, dict] = {}
    for part in text.split(","):
        try:
            found = {f"#{len(rows) + 1}": {"val_bpb": float(part)}}
        except ValueError:
            path = Path(part)
            if path.is_dir():
                path = next((path / name for name in ("submission.json", "result.json") if (path / name).exists()), path / "result.json")
            found = seed_tables(read_json(path))
            if not found:
                raise Broken(f"{path} holds no score per seed") from None
        if double := rows.keys() & found.keys() - {"#1"}:
            raise Broken(f"{text}: seed {', '.join(sorted(double))} comes twice")
        rows |= {f"#{len(rows) + 1}" if seed == "#1" else seed: row for seed, row in found.items()}
    return Sample(text if len(text) < 60 else f"{text[:28]}...{text[-28:]}", rows)


# -- THE COMPARISON ----------------------------------------------------------------------------------------------------

def compare_unit(a: dict[str, float], b: dict[str, float], margin: float | None, alpha: float) -> dict:
    """Everything about one unit, as plain numbers."""
    values = list(a.values()), list(b.values())
    sa, sb = map(summary, values)
    std, gain = math.sqrt((sa.std**2 + sb.std**2) / 2), sb.mean - sa.mean
    tests = {"welch": welch(*values), "paired": paired(a, b)}
    if margin is not None:
        tests |= {"welch_margin": welch(*values, margin), "paired_margin": paired(a, b, margin)}
    tests = {name: tests[name] for name in TITLES if tests.get(name) is not None}
    return {
        "a": sa._asdict(), "b": sb._asdict(), "gain": gain, "margin": margin, "pooled_std": std,
        "common_seeds": len(a.keys() & b.keys()), "tests": {name: test._asdict() for name, test in tests.items()},
        "p_two_sided": 2 * min(tests["welch"].p, 1 - tests["welch"].p),
        "power_of_this_design": power(gain, std, min(sa.n, sb.n), alpha) if gain > 0 else None,
        "seeds_needed": seeds_needed(gain, std, alpha),
        "seeds_needed_margin": None if margin is None else seeds_needed(gain - margin, std, alpha)}


def compare(a: Sample, b: Sample, alpha: float = ALPHA, margin_nats: float = MARGIN_NATS, nats_per_bpb: float | None = None) -> dict:
    """Tests in bits per byte, and in nats where both tokenize alike. A nat is turned into bits per byte by B's own ratio."""
    ratio, notes, units, same_set = nats_per_bpb or b.nats_per_bpb, [], {}, True
    alike = ratio and a.nats_per_bpb and abs(a.nats_per_bpb / ratio - 1) < 1e-4
    if ratio is None:
        notes.append(f"no val_loss in B, so {margin_nats} nats cannot be turned into bits per byte: no margin test (--nats-per-bpb)")
    elif a.nats_per_bpb and not alike:
        notes.append(f"one bit per byte is {a.nats_per_bpb:.5f} nats in A and {ratio:.5f} in B: nats of other tokens, not compared")
    for key in ("val_bytes", "target_tokens"):
        if a.facts(key) and b.facts(key) and a.facts(key) != b.facts(key):
            notes.append(f"{key}: {sorted(a.facts(key))} in A, {sorted(b.facts(key))} in B")
            same_set = False
    units["bpb"] = compare_unit(a.values("bpb"), b.values("bpb"), ratio and margin_nats / ratio, alpha)
    if alike:
        units["nats"] = compare_unit(a.values("nats"), b.values("nats"), margin_nats, alpha)
    verdict = sentence(units["bpb"], alpha, margin_nats) if same_set else "Not comparable: A and B were not scored on the same text."
    return {"a": a.name, "b": b.name, "alpha": alpha, "margin_nats": margin_nats, "nats_per_bpb": ratio, "units": units,
            "notes": notes, "verdict": verdict}


def sentence(u: dict, alpha: float, margin_nats: float) -> str:
    p, gain, needed = u["tests"]["welch"]["p"], u["gain"], u["seeds_needed"]
    better = f"A is {abs(gain):.5f} bpb {'better' if gain > 0 else 'worse'} than B"
    if p >= alpha:
        more = f"; if the difference is real, {needed} seeds a side show it with power {POWER}" if needed else ""
        return f"Not shown: {better}, p = {p:.3g} (needs < {alpha}){more}."
    if "welch_margin" not in u["tests"]:
        return f"Shown: {better}, p = {p:.3g}; the margin was not tested."
    pm, needed = u["tests"]["welch_margin"]["p"], u["seeds_needed_margin"]
    if pm < alpha:
        return f"Shown, and by the margin: {better}, p = {p:.3g}; more than {margin_nats} nats ({u['margin']:.5f} bpb): p = {pm:.3g}."
    more = f"; {needed} seeds a side would show it if the difference is real" if needed else ""
    return f"Shown, but not by the margin: {better}, p = {p:.3g}; more than {margin_nats} nats ({u['margin']:.5f} bpb): p = {pm:.3g}{more}."


def render(c: dict) -> str:
    lines = [f"A: {c['a']}", f"B: {c['b']}"]
    for unit, u in c["units"].items():
        rows = [[side.upper(), mean_std(u[side]["mean"], u[side]["std"]), str(u[side]["n"])] for side in "ab"]
        lines += ["", table([unit, "mean ± sample sd", "seeds"], rows), ""]
        rows = [[TITLES[name], f"{test['t']:.3f}", f"{test['df']:.2f}", f"{test['p']:.4g}"] for name, test in u["tests"].items()]
        lines.append(table([f"test ({unit})", "t", "df", "one-sided p"], rows))
        margin = "" if u["margin"] is None else f", margin {u['margin']:.5f} {unit}"
        shown = "-" if u["power_of_this_design"] is None else f"{u['power_of_this_design']:.2f}"
        lines.append(f"B - A = {u['gain']:.5f} {unit}{margin}; power of {min(u['a']['n'], u['b']['n'])} seeds a side for that difference: "
                     f"{shown}; seeds a side for power {POWER}: {u['seeds_needed'] or '-'}, for the margin: "
                     f"{u['seeds_needed_margin'] or '-'}")
    return "\n".join([*lines, "", *(f"note: {note}" for note in c["notes"]), c["verdict"]])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="the candidate")
    parser.add_argument("b", metavar="B", help="what it is compared with")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="level of the tests (default %(default)s)")
    parser.add_argument("--margin-nats", type=float, default=MARGIN_NATS, help="(default %(default)s)")
    parser.add_argument("--nats-per-bpb", type=float, help="where B has no val_loss; 2.18838 for the published CaseOps set")
    parser.add_argument("--json", action="store_true", help="print every number as JSON instead")
    args = parser.parse_args(argv)
    try:
        c = compare(load(args.a), load(args.b), args.alpha, args.margin_nats, args.nats_per_bpb)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(c, indent=1) if args.json else render(c))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
