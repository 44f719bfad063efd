"""Verify the ledger of a run: that nobody edited it, and that the score follows from its receipts alone.

A line is {"n", "prev", "kind", ..., "hash"}; prev is the hash of the line before, hash is blake2b-128 of the line's canonical JSON
without "hash". The order of the keys between kind and hash means nothing and is not protected. Whoever recomputes the whole chain
leaves a whole chain: only a hash kept elsewhere (the log's result line, a submission.json) shows that, so the head of the ledger is
compared with it.
"""

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from rules import BUDGET_SECONDS, FAIL, PASS, UNKNOWN, Broken, Finding, digest, sha256, worst

RESULT_LINE = re.compile(r"^result: (.+)$", re.M)


# -- THE CHAIN ---------------------------------------------------------------------------------------------------------

def read_chain(path: Path) -> list[dict]:
    """Every line of a whole chain. Raises Broken at the first line that was edited, lost, added or moved."""
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")
    text, entries, last = path.read_bytes().decode("ascii"), [], ""
    if not text.endswith("\n"):
        raise Broken("the last line is cut off" if text else "the ledger is empty")
    for n, line in enumerate(text[:-1].split("\n")):
        try:
            entry = json.loads(line, parse_constant=refuse)
        except ValueError as error:
            raise Broken(f"line {n} is not JSON: {error}") from None
        if not isinstance(entry, dict) or json.dumps(entry, separators=(",", ":")) != line:
            raise Broken(f"line {n} is not written as a ledger writes it: edited")
        if list(entry)[:3] != ["n", "prev", "kind"] or list(entry)[-1] != "hash" or entry["hash"] != digest(entry):
            raise Broken(f"line {n} does not have the hash of its content: edited")
        if entry["n"] != n or entry["prev"] != last:
            raise Broken(f"line {n} does not follow the line before: a line was deleted, added or moved")
        entries.append(entry)
        last = entry["hash"]
    return entries


@dataclass
class Account:
    """One stretch of a ledger, from a "start" line to the next: one process. `passes` maps an evaluation to its lines."""

    entries: list[dict] = field(default_factory=list)
    before: "Account | None" = None

    def of(self, kind: str) -> list[dict]:
        return [e for e in self.entries if e["kind"] == kind]

    @cached_property
    def start(self) -> dict:
        return self.entries[0]

    @cached_property
    def end(self) -> dict:
        """Raises Broken without one."""
        if self.entries[-1]["kind"] != "end":
            raise Broken(f"the ledger ends with a line of kind {self.entries[-1]['kind']}, not with the end of a run")
        return self.entries[-1]

    @cached_property
    def passes(self) -> dict[str, list[dict]]:
        names = dict.fromkeys(e["pass"] for e in self.of("score"))
        return {name: [e for e in self.entries if e.get("pass") == name] for name in names}

    def seconds(self, name: str) -> float:
        """Time in a phase, by this run or the last before it that had the phase, with the interrupted runs that it went on from."""
        total = math.fsum(e["seconds"] for e in self.of("phase") if e["name"] == name)
        if self.before is None:
            return total
        interrupted = self.before.entries[-1]["kind"] != "end"
        return total + self.before.seconds(name) if interrupted or not total else total

    def probes(self) -> dict[str, dict]:
        """Probe -> its last line, in this run or one before it, of scripts that audited themselves; later ones leave that to probes.py."""
        return (self.before.probes() if self.before else {}) | {e["id"]: e for e in self.of("probe")}


def accounts(entries: list[dict]) -> list[Account]:
    """The runs in a ledger. Raises Broken when it does not begin with one."""
    if entries[0]["kind"] != "start":
        raise Broken("the first line is not the start of a run")
    out: list[Account] = []
    for e in entries:
        if e["kind"] == "start":
            out.append(Account(before=out[-1] if out else None))
        out[-1].entries.append(e)
    return out


# -- CHECKS: each returns evidence, or (verdict, evidence), and raises Broken on a violation ------------------------------

def check_coverage(run: Account, folder: Path) -> str:
    """Every target of every evaluation scored once, all bytes counted."""
    tokens, sizes = run.start["val_tokens"], run.start["val_bytes"]
    for name, lines in run.passes.items():
        scores = [e for e in lines if e["kind"] == "score"]
        if any(len(e["ranges"]) != len(e[k]) for e in scores for k in ("nats", "bytes")):
            raise Broken(f"{name}: a receipt does not have one sum for each range")
        at = 0
        for a, b in sorted(r for e in scores for r in e["ranges"]):
            if b <= a or a < at:
                raise Broken(f"{name}: [{a}, {b}) is " + ("empty" if b <= a else "scored twice"))
            if a > at:
                raise Broken(f"{name}: [{at}, {a}) is not scored")
            at = b
        if at != tokens:
            raise Broken(f"{name}: {at} targets are scored, the validation set has {tokens}")
        if (counted := sum(sum(e["bytes"]) for e in scores)) != sizes:
            raise Broken(f"{name}: {counted} bytes are counted, the validation set has {sizes}")
    if run.end["pass"] not in run.passes:
        raise Broken(f"no receipts of the evaluation {run.end['pass']!r} that the score is said to come from")
    return f"{', '.join(run.passes)}: each of {tokens:,} targets once, {sizes:,} bytes"


def check_score(run: Account, folder: Path) -> str:
    """The headline from the receipts alone."""
    end = run.end
    scores = [e for e in run.passes[end["pass"]] if e["kind"] == "score"]
    nats, size = math.fsum(x for e in scores for x in e["nats"]), sum(sum(e["bytes"]) for e in scores)
    loss, bpb = nats / run.start["val_tokens"], nats / math.log(2) / size
    for name, value in (("val_loss", loss), ("val_bpb", bpb)):
        if not math.isclose(value, end[name], rel_tol=1e-9):
            raise Broken(f"{name} is {end[name]}, the receipts give {value:.10f}")
    if (end["tokens"], end["bytes"]) != (run.start["val_tokens"], size):
        raise Broken(f"the end counts {end['tokens']} targets and {end['bytes']} bytes, the receipts {run.start['val_tokens']} and {size}")
    return f"val_loss {loss:.8f}, val_bpb {bpb:.8f} from {len(scores)} receipts"


def check_order(run: Account, folder: Path) -> str:
    """Nothing was learned from before it was scored."""
    updates = 0
    for name, lines in run.passes.items():
        scored = np.zeros(run.start["val_tokens"], bool)
        for e in lines:
            for a, b in e["ranges"] if e["kind"] in ("score", "update") else ():
                if e["kind"] == "update" and not (0 <= a < b <= len(scored) and scored[a:b].all()):
                    raise Broken(f"{name}: line {e['n']} learns ({e['what']}) from [{a}, {b}) before it is scored")
                scored[a:b] = True
            updates += e["kind"] == "update"
            if e.get("early"):
                raise Broken(f"{name}: line {e['n']} says itself that it learns from targets before they are scored")
    early = [e for e in run.of("update") if e["pass"] not in run.passes]
    if early:
        raise Broken(f"line {early[0]['n']} learns in an evaluation {early[0]['pass']!r} that scores nothing")
    return f"{updates} update receipts, each within what was scored before"


def check_weights(run: Account, folder: Path) -> str | tuple[str, str]:
    """Between the artifact and the first score nothing has touched the weights."""
    found = {e["when"]: e for e in run.of("weights")}
    if missing := {"loaded", "first_score"} - found.keys():
        return UNKNOWN, "no hash of the weights at " + " and ".join(sorted(missing))
    if found["loaded"]["sha256"] != found["first_score"]["sha256"]:
        raise Broken("the weights at the first score are not those that were loaded from the artifact")
    return f"{found['loaded']['sha256'][:12]} when loaded and at the first score"


def check_warmup(run: Account, folder: Path) -> str | tuple[str, str]:
    lines = run.of("warmup")
    if changed := [e for e in lines if e["before"] != e["after"]]:
        raise Broken(f"line {changed[0]['n']}: the warm-up changed {changed[0]['before'][:12]} to {changed[0]['after'][:12]}")
    return f"{len(lines)} warm-up(s) left everything as it was" if lines else (UNKNOWN, "no warm-up in this run")


def check_time(run: Account, folder: Path) -> str | tuple[str, str]:
    train, scored = run.seconds("train") + run.seconds("calibrate"), run.seconds("eval") or run.seconds("diagnostic eval")
    evidence = f"train + calibrate {train:.1f} s, eval {scored:.1f} s, {BUDGET_SECONDS} s each"
    if max(train, scored) > BUDGET_SECONDS:
        raise Broken(evidence)
    return evidence if train else (UNKNOWN, f"{evidence}; this run did not train")


def check_tokens(run: Account, folder: Path) -> str | tuple[str, str]:
    """The nats of every target lie beside the ledger, unchanged, and add up to the receipts."""
    read = []
    for line in run.of("tokens"):
        path = find_by_hash(folder, line["sha256"], Path(line["file"]).suffix)
        if path is None:
            if (folder / line["file"]).exists():
                raise Broken(f"{line['file']} is not the file whose sha256 the ledger keeps")
            continue
        nats = np.load(path, allow_pickle=False)
        if nats.dtype != np.float32 or nats.shape != (run.start["val_tokens"],):
            raise Broken(f"{path.name} holds {nats.dtype}{nats.shape}, not one float32 for each target")
        for e in run.passes[line["pass"]]:
            for (a, b), total in zip(e["ranges"], e["nats"], strict=True) if e["kind"] == "score" else ():
                if not math.isclose(nats[a:b].sum(dtype=np.float64), total, rel_tol=1e-9, abs_tol=1e-12):
                    raise Broken(f"{path.name}: [{a}, {b}) adds up to {nats[a:b].sum(dtype=np.float64)}, line {e['n']} says {total}")
        read.append(path.name)
    if not read:
        return UNKNOWN, "no file of nats per token beside the ledger"
    return f"{', '.join(read)}: sha256 and the sum of every receipt"


def check_files(run: Account, folder: Path) -> str | tuple[str, str]:
    """Artifact and script, where they lie beside the ledger."""
    found = []
    for line in run.of("artifact"):
        path = folder / Path(line["file"]).name
        if find_by_hash(folder, line["sha256"], "".join(path.suffixes)):
            found.append(line["file"])
        elif path.exists():
            raise Broken(f"{path.name} is not the artifact whose sha256 the ledger keeps")
    script = folder / "train_gpt.py"
    if script.exists():
        if sha256(script.read_bytes()) != run.start["code_sha256"]:
            raise Broken("train_gpt.py is not the script whose sha256 the ledger keeps")
        found.append(script.name)
    return f"{', '.join(found)}: the files of the ledger" if found else (UNKNOWN, "neither artifact nor script beside the ledger")


def check_seed(run: Account, folder: Path) -> str | tuple[str, str]:
    seed, declared = run.start["seed"], run.start["seeds_declared"]
    if not declared:
        return UNKNOWN, f"seed {seed}, no list of seeds was declared"
    if str(seed) not in [s.strip() for s in (declared.split(",") if isinstance(declared, str) else map(str, declared))]:
        raise Broken(f"seed {seed} is not among the declared {declared}")
    return f"seed {seed} of the declared {declared}"


def check_probes(run: Account, folder: Path) -> tuple[str, str]:
    """What the run's own probes found, or those of an audit that stands beside the ledger."""
    found = probed(run, folder)
    if not found:
        return UNKNOWN, "nobody has probed this run: python tools/audit.py run RUN_FOLDER"
    verdict, _ = worst([(verdict, "") for verdict, _ in found.values()])
    rest = "; ".join(f"{name} {v}: {evidence}" for name, (v, evidence) in found.items() if v != PASS)
    return verdict, f"{sum(v == PASS for v, _ in found.values())} of {len(found)} pass" + (f"; {rest}" if rest else "")


CHECKS = {"coverage": check_coverage, "score": check_score, "score before update": check_order, "weights": check_weights,
          "warm-up": check_warmup, "time": check_time, "nats per token": check_tokens, "files": check_files, "seed": check_seed,
          "probes": check_probes}


def find_by_hash(folder: Path, digest: str, suffix: str) -> Path | None:
    """A file of the folder with this sha256: record folders rename what a run wrote."""
    return next((p for p in sorted(folder.glob(f"*{suffix}")) if p.is_file() and sha256(p.read_bytes()) == digest), None)


def read_audit(folder: Path, head: str) -> dict | None:
    """The audit of a run, as probes.py left it beside the ledger with this head: {mode, verdicts, findings, lines, last_hash}."""
    for path in sorted(folder.glob("audit*.json")):
        try:
            audit = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise Broken(f"{path} cannot be read as JSON: {error}") from None
        if isinstance(audit, dict) and audit.get("last_hash") == head:
            return audit
    return None


def probed(run: Account, folder: Path) -> dict[str, tuple[str, str]]:
    """Finding -> outcome: from the audit beside the ledger, or from the lines of a script that audited itself."""
    audit = read_audit(folder, run.entries[-1]["hash"])
    if audit is not None:
        return {name: tuple(outcome) for name, outcome in audit["findings"].items()}
    return {name: (line["verdict"], line["evidence"]) for name, line in run.probes().items()}


def head_of(result: dict) -> str | None:
    """The head of the ledger that a result keeps: under `ledger`, or under `audit` where the script audited itself."""
    return (result.get("ledger") or result.get("audit") or {}).get("last_hash")


def anchors(folder: Path) -> dict[str, str]:
    """Where -> the head of a ledger, as results, submissions and logs beside it keep it."""
    found = {}
    for path in [*folder.glob("result.json"), *folder.glob("*.log"), *folder.glob("*.txt")]:
        text = path.read_text(errors="replace")
        lines = [text] if path.suffix == ".json" else RESULT_LINE.findall(text)[-1:]
        kept = [head_of(json.loads(line)) for line in lines]
        found |= {path.name: kept[0]} if kept and kept[0] else {}
    submission = folder / "submission.json"
    if submission.exists():
        kept = (json.loads(submission.read_text()).get("audit") or {}).get("ledgers", {})
        found |= {f"submission.json seed {seed}": head for seed, head in kept.items()}
    return found


def verify(path: Path, anchor: str | None = None) -> list[Finding]:
    """Every check of a ledger. A broken chain is the only finding: nothing in it can be trusted."""
    try:
        entries = read_chain(path)
        runs = accounts(entries)
        run, head = runs[-1], entries[-1]["hash"]
        end = run.end
    except (Broken, OSError, UnicodeDecodeError) as error:
        return [Finding("chain", FAIL, str(error))]
    findings = [Finding("chain", PASS, f"{len(entries)} lines, {len(runs)} run(s), the last ends with {end['pass']}; head {head}")]
    known = {"--anchor": anchor} if anchor else anchors(path.parent)
    if not known:
        findings.append(Finding("anchor", UNKNOWN, "no head kept elsewhere: a chain recomputed as a whole would pass"))
    elif head in known.values():
        findings.append(Finding("anchor", PASS, f"the head is that of {', '.join(where for where, h in known.items() if h == head)}"))
    else:
        kept = ", ".join(f"{where} keeps {h}" for where, h in known.items())
        findings.append(Finding("anchor", FAIL, f"the head is {head}, but {kept}"))
    for name, check in CHECKS.items():
        try:
            outcome = check(run, path.parent)
            verdict, evidence = (PASS, outcome) if isinstance(outcome, str) else outcome
        except (Broken, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            verdict = FAIL  # a line without its fields is as good as an edited one
            evidence = str(error) if isinstance(error, Broken) else f"unreadable: {type(error).__name__} {error}"
        findings.append(Finding(name, verdict, evidence))
    return findings
