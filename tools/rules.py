"""State the contest's rules, once for all tools: what each asks, what decides it, how verdicts are joined.

A finding is (verdict, evidence in one line). PASS: the rule holds. FAIL: it does not. NEEDS-RULING: no
maintainer has ruled on the method. NOT-MEASURED: nobody could know.
"""

import hashlib
import json
from typing import NamedTuple

PASS, FAIL, RULING, UNKNOWN = "PASS", "FAIL", "NEEDS-RULING", "NOT-MEASURED"
SEVERITY = (FAIL, RULING, UNKNOWN, PASS)
CAP_BYTES = 16_000_000  # decimal, model file plus code
BUDGET_SECONDS = 600    # of the ten-minute track, for training and for evaluation each

Outcome = tuple[str, str]  # verdict, evidence


class Broken(ValueError):
    """A run, a ledger or a record that contradicts itself. The message is for the user."""


class Finding(NamedTuple):
    """An outcome and what was looked at."""

    name: str
    verdict: str
    evidence: str


class Rule(NamedTuple):
    """State what a rule asks, in a few words and in a sentence, and the findings that decide it."""

    name: str
    asks: str
    findings: tuple[str, ...]


RULES = {
    "R1": Rule("files under the cap", "artifact and code fit the cap", ("bytes",)),
    "R2": Rule("time within the budgets", "training and evaluation in time", ("P7",)),
    "R3": Rule("no training on validation text", "no validation document in the training data", ("P9",)),
    "R4": Rule(
        "every target and byte once", "every target once, every byte of the text once", ("P4", "P5", "P10")),
    "R5": Rule("probabilities sum to one", "a distribution, fixed before its target", ("P2",)),
    "R6": Rule("no look at the future", "the past of a document alone", ("P1", "P3")),
    "R7": Rule("scored before learned from", "scored before learned from", ("order",)),
    "R8": Rule("warm-up changes nothing", "warm-up leaves no trace", ("P6",)),
    "R9": Rule("no forbidden data is read", "evaluation reads artifact and validation data alone", ("P11",)),
    "R10": Rule("seeds and statistics", "seeds declared before the first run", ("P12",)),
    "R11": Rule("score follows from receipts", "the score follows from the nats of its tokens", ("sum",)),
    "R12": Rule("clean room gives the same", "the artifact alone gives the same score elsewhere", ("P8",)),
}
UNRULED = (  # rule, when, what no maintainer has ruled on
    ("R7", lambda cfg: cfg.slot == "causal",
     "a shift of the hidden states learned from scored targets (SLOT, issue #1336)"),
    ("R4", lambda cfg: not cfg.caseops_enabled, "bytes are those of the normalized pieces, not of a sidecar"),
)


def severity(verdict: str) -> int:
    """Rank a verdict, 0 for the gravest."""
    return SEVERITY.index(verdict)


def finding(passed: bool, evidence: str, measurable: bool = True) -> Outcome:
    """Say PASS or FAIL, or NOT-MEASURED where nobody could know."""
    verdict = PASS if passed else FAIL
    return verdict if measurable else UNKNOWN, evidence


def worst(outcomes: list[Outcome], all_evidence: bool = False) -> Outcome:
    """Join several outcomes to the gravest verdict, with the evidence of those that share it, or of all."""
    ranked = sorted(outcomes, key=lambda outcome: severity(outcome[0]))
    verdict = ranked[0][0] if ranked else UNKNOWN
    texts = [text for v, text in ranked if text and (all_evidence or v == verdict)]
    return verdict, "; ".join(dict.fromkeys(texts))


def verdicts(cfg, findings: dict[str, Outcome]) -> dict[str, Outcome]:
    """Judge every rule by its findings; what nobody looked at is NOT-MEASURED. cfg: the Config of the run."""
    judged = {}
    for name, rule in RULES.items():
        outcomes = [findings.get(key, (UNKNOWN, "no part of this stage")) for key in rule.findings]
        for unruled, applies, why in UNRULED if findings else ():
            if unruled == name and applies(cfg):
                outcomes.append((RULING, why))
        judged[name] = worst(outcomes)
    return judged


# -- HASHES AND TABLES ---------------------------------------------------------------------------------------

def sha256(data: bytes) -> str:
    """Hash a file's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def digest(entry: dict) -> str:
    """Hash a line of a ledger without its "hash": blake2b-128, in hex, of the canonical JSON."""
    content = {key: value for key, value in entry.items() if key != "hash"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def table(head: list[str], rows: list[list[str]], align: str = "--:") -> str:
    """Write a Markdown table; `align` is for every column but the first."""
    rule = [":--"] + [align] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def verdict_lines(judged: dict[str, Outcome]) -> list[str]:
    """Write one line a rule: R1, its verdict, the evidence."""
    return [f"{rule:<4}{verdict:<14}{evidence}" for rule, (verdict, evidence) in judged.items()]
