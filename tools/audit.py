"""Audit a run or a record: a verdict for each rule, by probing it, from its files alone, or by scoring it again.

    python tools/audit.py run RUN_FOLDER                             # probe a run of our own script; keeps audit.json beside it
    python tools/audit.py RECORD                                     # rules R1 to R12 of a folder, ours or foreign, from its files
    python tools/audit.py RECORD --data DATA                         # and the clean room for R12
    python tools/audit.py rescore RECORD --data DATA --all           # the clean room alone
    python tools/audit.py verify ARTIFACT_DIR/ledger.jsonl           # was the ledger edited, does the score follow from it

PASS: the files show that the rule holds. FAIL: they show that it does not. NEEDS-RULING: the run used a method that no maintainer
has ruled on. NOT-MEASURED: they cannot show it. A method counts as used when the log says that it ran; source code is not searched.
Exit code 1 with any FAIL.
"""

import argparse
import ast
import base64
import contextlib
import json
import lzma
import math
import re
import statistics
import sys
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import brotli
from clean_room import TOLERANCE, overall, rescore
from foreign import Log, named, read_json, read_logs, seed_tables
from ledger import Account, accounts, probed, read_audit, read_chain, verify
from probes import judge, stored_audit
from record import spread
from rules import (
    BUDGET_SECONDS,
    CAP_BYTES,
    FAIL,
    PASS,
    RULES,
    RULING,
    UNKNOWN,
    Broken,
    Finding,
    table,
    verdict_lines,
    worst,
)

VALIDATION_TOKENS, VALIDATION_BYTES = 47_853_343, 151_080_645  # targets and bytes of the published CaseOps set, 50,000 documents
WRONG_SETS = {  # targets -> what they are
    9_662_464: "the first 10,000 documents only, the preparation's default",
    36_562_944: "made by parallel jobs that each began a validation set of their own",
}
WRONG_BYTES = {157_319_833: "byte-fallback tokens counted as 3 bytes"}
LEAKED_SHARDS = 1499  # of a preparation with 10,000 validation documents; the published set has 80
DIAGNOSTICS = 3e-4    # relative; upstream's diagnostics leave out part of the tail, and bytes per token vary along the text
CONTEXTS = (1024, 2048, 2560, 2816, 3072, 4096)


def on(value: str | None) -> bool:
    return value not in (None, "", "0", "0.0", "False", "None", "off", "no")


def above(log: Log, knob: str, least: float) -> bool:
    try:
        return float(log.knobs.get(knob, "nan")) > least
    except ValueError:
        return False


def knob_on(pattern: str):
    """Whether a log's configuration switches on a knob with such a name."""
    return lambda log: any(on(value) for name, value in log.knobs.items() if re.fullmatch(pattern, name))


def says(pattern: str):
    """Whether a line of a log begins like this."""
    return lambda log: re.search(f"^{pattern}", log.text, re.M) is not None


def future_gate(log: Log) -> bool:
    return knob_on("ngram_tilt_enabled")(log) and any(
        above(log, f"{kind}_boost", 0) and not above(log, f"{kind}_tau", 1) for kind in ("within", "word"))


METHODS = [  # rule, verdict, which logs show it, what it is; a ruling is cited by its pull request or issue
    ("R2", RULING, knob_on("ngram_hint_precompute_outside"), "n-gram hints computed outside the clock (#1967, contested)"),
    ("R3", FAIL, lambda log: "fineweb_val" in log.knobs.get("train_files", ""), "training on the validation shards (README)"),
    ("R4", RULING, lambda log: on(log.knobs.get("casefold")) or "casefold" in log.knobs.get("tokenizer_path", "").lower(),
     "a tokenizer that folds case (#1604 has no ruling)"),
    ("R5", RULING, lambda log: knob_on("(byte_)?ppm(_enabled|_mix|_order)?")(log) or says(r"(byte_)?ppm\w*[: ]")(log),
     "a byte-level PPM mixture (#1872 has no ruling)"),
    ("R5", RULING, knob_on(r"ngram_(cache|eval|hash)\w*"), "a hashed n-gram cache (#779 forbids the target in its key; no log shows that)"),
    ("R6", RULING, lambda log: log.knobs["slot"] != "off" if "slot" in log.knobs  # ours; elsewhere the number of steps switches it on
     else knob_on("slot(_enabled|_steps)?")(log) or says(r"slot\w*[: ]")(log),
     "SLOT (#1336 has no ruling; on the targets that it scores it fails every flip test, #1240)"),
    ("R6", FAIL, future_gate, "n-gram experts whose gate reads the token that they score (#1420)"),
    ("R6", RULING, knob_on(r"peer_lora\w*(enabled|_k)"), "an ensemble with other documents' final adapters (#2139 has no ruling)"),
    ("R7", FAIL, lambda log: knob_on("pre_?quant_ttt(_enabled|_epochs)?")(log) or says(r"pre_?quant_ttt\b")(log),
     "training on validation tokens before they are scored (ruled: #402, #677)"),
    ("R7", FAIL, says(r"(two_pass|second_pass|rescor)\w*[: ]"), "scoring twice (ruled: the sweep of #140)"),
    ("R9", FAIL, lambda log: "val" in re.split(r"[^a-z]+", log.knobs.get("gptq_calibration_mode", "")),
     "calibration on validation text (ruled: #1019)"),
]


@dataclass(frozen=True)
class Case:
    """A record folder as far as it can be read."""

    folder: Path

    @cached_property
    def submission(self) -> dict:
        path = self.folder / "submission.json"
        if not path.exists() and (self.folder / "result.json").exists():
            path = self.folder / "result.json"
        return read_json(path) if path.exists() else {}

    @cached_property
    def logs(self) -> list[Log]:
        return read_logs(self.folder)

    @cached_property
    def code(self) -> Path | None:
        return next((p for p in (self.folder / "train_gpt.py", *sorted(self.folder.glob("train_gpt*.py"))) if p.exists()), None)

    @cached_property
    def ledgers(self) -> dict[str, list[Finding]]:
        """Ledger file -> its findings."""
        return {path.name: verify(path) for path in sorted(self.folder.glob("*ledger*.jsonl"))}

    def from_ledgers(self, *names: str) -> list[tuple[str, str]]:
        """What these checks found in every ledger; a broken chain stands for all."""
        return [(f.verdict, f"{file}: {f.name}: {f.evidence}" if f.verdict != PASS else f"{f.name}: {f.evidence}")
                for file, findings in self.ledgers.items() for f in findings
                if f.name in names or (f.name == "chain" and f.verdict == FAIL)]

    @cached_property
    def whole(self) -> list[Account]:
        """The last process of every ledger whose chain is whole."""
        files = [file for file, findings in self.ledgers.items() if findings[0].verdict == PASS]
        return [accounts(read_chain(self.folder / file))[-1] for file in files]

    def probed(self, *ids: str) -> list[tuple[str, str]]:
        """What the probes with these ids found."""
        probes = [probed(account, self.folder) for account in self.whole]
        return [(p[i][0], f"{i}: {p[i][1]}") for p in probes for i in ids if i in p]

    def judged(self, rule: str) -> list[tuple[str, str]]:
        """What was found against this rule by a trainer itself, or by the audit beside its ledger."""
        found = []
        for account in self.whole:
            audit = read_audit(self.folder, account.entries[-1]["hash"])
            sources = [("the run itself", line) for line in account.of("verdicts")]
            sources += [("its audit", audit["verdicts"])] if audit else []
            found += [(*judged[rule], name) for name, judged in sources if rule in judged]
        return [(verdict, f"{name}: {evidence}") for verdict, evidence, name in found if verdict in (FAIL, RULING)]

    def numbers(self, name: str) -> dict[str, float]:
        """Seed -> what its log prints."""
        found = {log.seed: log.number(name) for log in self.logs}
        return {seed: value for seed, value in found.items() if value is not None}


def payloads(code: bytes):
    """Yield what long strings of a script may stand for: bytes in base 85, in base 64, or one a Latin-1 character."""
    for text in re.findall(rb"[\"']([!-~]{400,}?)[\"']", code):
        for decode in (base64.b85decode, base64.b64decode):
            with contextlib.suppress(ValueError):
                yield decode(text)
    for text in re.findall(rb'(""".{400,}?""")\.encode\("latin-1"\)', code, re.DOTALL):
        with contextlib.suppress(ValueError, SyntaxError):
            yield ast.literal_eval(text.decode("latin-1")).encode("latin-1")


def program(code: bytes) -> str:
    """The source of a script, unpacked if it is a compressed one in a string."""
    for payload in payloads(code):
        for inflate in (brotli.decompress, lzma.decompress, zlib.decompress):
            try:
                return inflate(payload).decode()
            except (ValueError, lzma.LZMAError, zlib.error, brotli.error, UnicodeDecodeError, EOFError):
                continue
    return code.decode(errors="replace")


def helpers(case: Case) -> dict[str, int]:
    """Files of the folder that the script imports or names: without them it does not run."""
    source = program(case.code.read_bytes())
    try:
        tree = ast.parse(source)
    except SyntaxError:
        tree = ast.Module(body=[], type_ignores=[])
    imported = {name.split(".")[0] for node in ast.walk(tree) for name in (
        [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])}
    return {p.name: p.stat().st_size for p in sorted(case.folder.iterdir()) if p != case.code and (
        (p.suffix == ".py" and p.stem in imported) or (p.suffix in (".c", ".cpp", ".cu", ".so") and p.name in source))}


# -- RULES: each returns its (verdict, evidence) findings ------------------------------------------------------------------

def rule_size(case: Case) -> list[tuple[str, str]]:
    logged = [log.result["code_bytes"] for log in case.logs if "code_bytes" in log.result]
    if not case.code and not logged:
        return [(UNKNOWN, "no train_gpt.py in the folder")]
    name, code, extra = (case.code.name, case.code.stat().st_size, helpers(case)) if case.code else ("code by the log", max(logged), {})
    files = [p for p in case.folder.iterdir() if re.fullmatch(r"artifact_seed\d+\..*|final_model\.int\d.*|.*\.ptz", p.name)]
    models = [p.stat().st_size for p in files] + [int(v) for v in case.numbers("artifact_bytes").values()]
    if not models:
        return [(UNKNOWN, f"code {code:,} bytes; neither a model file nor its size in a log")]
    total = max(models) + code + sum(extra.values())
    parts = {"model": max(models), name: code, **extra}
    text = " + ".join(f"{name} {size:,}" for name, size in parts.items()) + f" = {total:,} bytes"
    text += f", over the cap by {total - CAP_BYTES:,}" if total > CAP_BYTES else f" of {CAP_BYTES:,}"
    minified, claimed = (max(case.numbers(name).values(), default=0) for name in ("code_minified", "bytes_total"))
    if 0 < minified < code and claimed < total:
        text += f"; {claimed:,.0f} were counted, with the code minified and compressed to {minified:,.0f} in a file that is not shipped"
    if any(log.knobs.get("compressor") == "pergroup" for log in case.logs):
        text += "; unpacking needs the system's lrzip (accepted in #1855)"
    return [(FAIL if total > CAP_BYTES else PASS, text)]


def rule_time(case: Case) -> list[tuple[str, str]]:
    findings, longest = [], {"training + calibration": 0.0, "evaluation": 0.0}
    for log in case.logs:
        train, calibration, scored = log.train_seconds, log.number("calib_s") or 0.0, log.eval_seconds
        if train is None or scored is None:
            findings.append((UNKNOWN, f"seed {log.seed}: the log does not print both times"))
        strict = round((train or 0) + calibration, 6)
        if strict > BUDGET_SECONDS:
            text = f"seed {log.seed}: training {train:.1f} s + calibration {calibration:.1f} s = {strict:.1f} s, over {BUDGET_SECONDS} s"
            findings.append((FAIL, text + " by the calibration, which practice did not count" * (train <= BUDGET_SECONDS)))
        if (scored or 0) > BUDGET_SECONDS:
            findings.append((FAIL, f"seed {log.seed}: evaluation {scored:.1f} s, over {BUDGET_SECONDS} s"))
        longest = {k: max(v, x or 0) for (k, v), x in zip(longest.items(), (strict, scored), strict=True)}
    longest_text = ", ".join(f"{name} at most {seconds:.1f} s" for name, seconds in longest.items())
    return [*findings, (PASS, longest_text) if case.logs else (UNKNOWN, "no log"), *case.from_ledgers("time")]


def rule_overlap(case: Case) -> list[tuple[str, str]]:
    shards, targets = set(case.numbers("train_shards").values()), set(case.numbers("val_tokens").values())
    findings = case.probed("P9")
    if LEAKED_SHARDS in shards and any(t > 4 * min(WRONG_SETS) / 2 for t in targets):
        findings.append((FAIL, f"train_shards: {LEAKED_SHARDS} is a preparation that keeps 10,000 validation documents apart, but "
                         f"{max(targets):,.0f} targets are scored: most of the validation text is training text"))
    manifests = {log.result.get("data", {}).get("manifest_sha256") for log in case.logs} - {None}
    if not findings:
        known = f"manifest {', '.join(m[:12] for m in sorted(manifests))}" if manifests else "no hash of the data in the logs"
        findings.append((UNKNOWN, f"{known}; train_shards {', '.join(f'{s:.0f}' for s in sorted(shards)) or 'not printed'}"))
    return findings


def implied_bytes(log: Log, targets: float) -> list[tuple[str, float]]:
    """Stage -> bytes that its nats and bits per byte agree on."""
    return [(stage, loss * targets / math.log(2) / bpb) for stage, (loss, bpb) in log.scores.items() if bpb > 0]


def rule_coverage(case: Case) -> list[tuple[str, str]]:
    findings = case.from_ledgers("coverage") + case.probed("P4", "P5", "P10")
    for log in case.logs:
        val, scored, subset = log.number("val_tokens"), log.number("target_tokens"), log.number("subset")
        scored = scored or log.result.get("target_tokens") or val
        if subset:
            findings.append((FAIL, f"seed {log.seed}: a subset of {subset:,.0f} targets is scored"))
        if val is None:
            findings.append((UNKNOWN, f"seed {log.seed}: the log does not say how many targets there are"))
            continue
        if scored != val:
            findings.append((FAIL, f"seed {log.seed}: {scored:,.0f} of {val:,.0f} targets are scored"))
        cut = next((c for c in CONTEXTS if VALIDATION_TOKENS // c * c == val), None)
        if int(val) in WRONG_SETS:
            findings.append((FAIL, f"seed {log.seed}: {val:,.0f} targets are {WRONG_SETS[int(val)]}"))
        elif cut:
            findings.append((FAIL, f"seed {log.seed}: {val:,.0f} targets are the published {VALIDATION_TOKENS:,} cut to a multiple of "
                             f"{cut}: {VALIDATION_TOKENS - val:,.0f} are left out, as by upstream's baseline"))
        if val == VALIDATION_TOKENS and log.knobs.get("caseops_enabled") in ("0", "False"):
            findings.append((FAIL, f"seed {log.seed}: CaseOps is said to be off, but {val:,.0f} is the CaseOps set's number of targets"))
        findings += [f for f in bytes_findings(log, scored) if f[0] != UNKNOWN or not case.probed("P4")]
    return findings or [(UNKNOWN, "no log")]


def bytes_findings(log: Log, targets: float) -> list[tuple[str, str]]:
    found = implied_bytes(log, targets)
    if not found:
        return []
    size, (low, high) = found[-1][1], (min(b for _, b in found), max(b for _, b in found))
    ratio = size / VALIDATION_BYTES
    if high / low > 1 + DIAGNOSTICS + 4 * log.rounding:
        return [(FAIL, f"seed {log.seed}: the stages of the log disagree on the bytes, {low:,.0f} to {high:,.0f}: nats and bits per byte "
                 "are not of the same targets")]
    known = next((why for b, why in WRONG_BYTES.items() if abs(size / b - 1) < 1e-3), None)
    if known or 1.02 < ratio < 1.35:
        return [(FAIL, f"seed {log.seed}: nats and bits per byte imply {size:,.0f} bytes, {100 * (ratio - 1):+.1f} % against the published "
                 f"set's {VALIDATION_BYTES:,}: {known or 'bytes are counted twice'}")]
    if targets == VALIDATION_TOKENS and abs(ratio - 1) < 1e-6 + 2 * log.rounding:
        return [(PASS, f"seed {log.seed}: {targets:,.0f} targets and {VALIDATION_BYTES:,} bytes, the published CaseOps set")]
    claimed = log.result.get("val_bytes")
    return [(UNKNOWN, f"seed {log.seed}: {targets:,.0f} targets, {claimed or size:,.0f} bytes"
             + ("" if claimed else " by nats and bits per byte") + "; the text is not at hand")]


def rule_order(case: Case) -> list[tuple[str, str]]:
    return case.from_ledgers("score before update", "weights") or [(UNKNOWN, "no ledger: logs say only what they were written to say")]


def rule_seeds(case: Case) -> list[tuple[str, str]]:
    """Mean and standard deviation from the logs against the submission; one configuration; at least three seeds."""
    logs = {log.seed: log for log in case.logs if log.final}
    scores = {seed: log.result.get("val_bpb", log.final[1]) for seed, log in logs.items()}
    if not scores:
        return [(UNKNOWN, "no log with a score")]
    (mean, std), s, findings = spread(list(scores.values())), case.submission, case.from_ledgers("seed")
    if len(scores) < 3:
        findings.append((UNKNOWN if "run_id" in s else FAIL, f"{len(scores)} seed(s) with a log"))
    elif std is not None:
        findings.append((PASS, f"{mean:.5f} ± {std:.5f} (sample) over seeds {', '.join(scores)}"
                         + "; no log shows whether they were declared before the first run" * (not case.ledgers)))
    claimed = named(s, "val_bpb")
    if claimed is not None and abs(claimed - mean) > 5.1e-6:
        findings.append((FAIL, f"val_bpb {claimed} is claimed, the logs give {mean:.6f}"))
    claimed = named(s, "val_bpb_std")
    if claimed is not None and std is not None and abs(claimed - std) > 5.1e-6:
        population = statistics.pstdev(scores.values())
        what = "the population's" if abs(claimed - population) <= 5.1e-6 else "neither the sample's nor the population's"
        findings.append((FAIL, f"the standard deviation {claimed} is {what}; the sample's is {std:.5f}"))
    rows = seed_tables(s)
    for seed, row in rows.items():
        if seed in scores and abs(row["val_bpb"] - scores[seed]) > 5.1e-6:
            findings.append((FAIL, f"seed {seed}: val_bpb {row['val_bpb']} is claimed, its log says {scores[seed]:.6f}"))
        elif seed not in scores and len(rows) > 1:
            findings.append((FAIL, f"seed {seed} is claimed and has no log"))
    return findings + same_settings(list(logs.values()))


def same_settings(logs: list[Log]) -> list[tuple[str, str]]:
    """Seeds of one experiment differ in the seed; names of files and folders are no settings."""
    dumps = [{k: v for k, v in log.knobs.items() if not re.search(r"seed|run_id|(dir|path|files?)$|^logfile$", k)} for log in logs]
    for log, dump in zip(logs[1:], dumps[1:], strict=True):
        if changed := sorted(k for k in dumps[0].keys() | dump.keys() if dumps[0].get(k) != dump.get(k)):
            return [(FAIL, f"seeds {logs[0].seed} and {log.seed} differ in {', '.join(changed[:4])}: not one configuration")]
    hashes = {(log.result["config_hash"], log.result["code_sha256"]) for log in logs if log.result}
    return [(FAIL, "the seeds ran different settings or scripts")] if len(hashes) > 1 else []


def rule_receipts(case: Case) -> list[tuple[str, str]]:
    return case.from_ledgers("score", "nats per token", "anchor", "files") or [(UNKNOWN, "no ledger: the sum cannot be repeated")]


CHECKS = {
    "R1": rule_size, "R2": rule_time, "R3": rule_overlap, "R4": rule_coverage,
    "R5": lambda case: case.probed("P2") or [(UNKNOWN, "no probe of sums in a ledger")],
    "R6": lambda case: case.probed("P1", "P3") or [(UNKNOWN, "no probe with a forged future in a ledger")],
    "R7": rule_order, "R8": lambda case: case.from_ledgers("warm-up") or [(UNKNOWN, "no ledger")],
    "R9": lambda case: case.probed("P11") or [(UNKNOWN, "no account of files opened in evaluation")],
    "R10": rule_seeds, "R11": rule_receipts,
}


def join_seeds(findings: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What several seeds share is said once."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for verdict, text in findings:
        seed, _, what = text.partition(": ") if re.match(r"seed \w+: ", text) else ("", "", text)
        seeds.setdefault((verdict, what), []).append(seed.removeprefix("seed "))
    return [(verdict, (f"seed{'s' * (len(names) > 1)} {', '.join(names)}: " if names[0] else "") + what)
            for (verdict, what), names in seeds.items()]


def audit(folder: Path, clean_room: tuple[str, str] = (UNKNOWN, "not run: give --data")) -> list[Finding]:
    """A verdict for each rule. Raises Broken when there is nothing to audit."""
    case = Case(folder)
    if not case.logs and not case.submission:
        raise Broken(f"{folder} holds neither a submission.json nor a log with a score")
    seen = [(rule, verdict, f"{what}, in {log.path.name}") for log in case.logs for rule, verdict, shows, what in METHODS if shows(log)]
    found = {rule: check(case) + case.judged(rule) + [(v, text) for r, v, text in seen if r == rule] for rule, check in CHECKS.items()}
    outcomes = {rule: worst(join_seeds(findings), all_evidence=True) for rule, findings in found.items()}
    outcomes["R12"] = clean_room
    return [Finding(f"{rule} {RULES[rule].name}", *outcome) for rule, outcome in outcomes.items()]


# -- MAIN --------------------------------------------------------------------------------------------------------------

def render(findings: list[Finding]) -> str:
    rows = [[f.name, f.verdict, f.evidence.replace("|", "/").replace("\n", " ")] for f in findings]
    return table(["rule", "verdict", "evidence"], rows, ":--")


def run_rescore(args: argparse.Namespace) -> list[Finding]:
    fraction = None if args.all else args.fraction
    if not 0 < args.fraction <= 1:
        raise Broken(f"--fraction {args.fraction} is no share of the documents: give a number above 0, at most 1")
    return rescore(args.record, args.data, args.seed, fraction, args.sample_seed, args.script, args.tolerance, args.timeout)


def run_probes(args: argparse.Namespace) -> list[Finding]:
    """Judge a finished run, or show the audit that stands beside it."""
    audit = None if args.again else stored_audit(args.folder, args.full)
    shown = "" if audit is None else ", as judged before (--again judges it anew)"
    audit = audit or judge(args.folder, args.script, args.data, args.full)
    if not args.json:
        print("\n".join(verdict_lines(audit["verdicts"])))
    print(f"audit: {sum(audit['seconds'].values()):.1f} s, apart from the evaluation's clock{shown}: {args.folder / 'audit.json'}",
          file=sys.stderr)
    return [Finding(f"{rule} {RULES[rule].name}", *outcome) for rule, outcome in audit["verdicts"].items()]


def run_audit(args: argparse.Namespace) -> list[Finding]:
    if args.data is None:
        return audit(args.record)
    return audit(args.record, overall(run_rescore(args)))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] not in ("run", "verify", "rescore", "record", "-h", "--help"):
        argv.insert(0, "record")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    probe = commands.add_parser("run", help="probe a finished run and judge it by every rule")
    probe.set_defaults(command=run_probes)
    probe.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    probe.add_argument("--script", type=Path, help="the script that ran, where it is not the working copy or build/train_gpt.py")
    probe.add_argument("--data", type=Path, help="folder with the data (default: the run's own DATA_PATH)")
    probe.add_argument("--full", action="store_true", help="all training shards, all documents, 16 rounds of replays")
    probe.add_argument("--again", action="store_true", help="judge anew where an audit.json is there")
    check = commands.add_parser("verify", help="the hash chain of a ledger, and the score from its receipts")
    check.add_argument("ledger", type=Path)
    check.add_argument("--anchor", help="hash of the last line, kept elsewhere (default: from the result beside the ledger)")
    check.set_defaults(command=lambda args: verify(args.ledger, args.anchor))
    room = commands.add_parser("rescore", help="score again from the counted files alone and compare")
    room.set_defaults(command=run_rescore)
    whole = commands.add_parser("record", help="every rule of a record folder (the word may be left out)")
    whole.set_defaults(command=run_audit)
    for p in (room, whole):
        p.add_argument("record", type=Path, help="record or run folder")
        p.add_argument("--data", type=Path, required=p is room, help="folder with the validation shards")
        p.add_argument("--seed", type=int, help="which run (default: the first whose artifact is there)")
        p.add_argument("--fraction", type=float, default=0.05, help="share of documents, weights fixed (default %(default)s)")
        p.add_argument("--all", action="store_true", help="every document, test-time training included")
        p.add_argument("--sample-seed", type=int, default=0, help="which documents")
        p.add_argument("--script", type=Path, help="the script that ran, where it is not in the folder")
        p.add_argument("--tolerance", type=float, default=TOLERANCE, help="nats per target (default %(default)s)")
        p.add_argument("--timeout", type=float, help="seconds until the clean room is given up")
    for p in commands.choices.values():
        p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    try:
        findings = args.command(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([f._asdict() for f in findings], indent=1))
    elif args.command is not run_probes:
        print(render(findings))
    return int(any(f.verdict == FAIL for f in findings))


if __name__ == "__main__":
    raise SystemExit(main())
