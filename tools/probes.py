"""Judge a finished run from outside: replay its scored pass on short streams, and read its ledger and files.

Here are the probes P1 to P12; tools/rules.py says which rule they decide, tools/audit.py is the command. The
script that ran is imported, so it has to be ours: the working copy, the packed one in build/, or one that the
caller names. Scripts of strangers run in the clean room alone. What only the running process could see, its
ledger keeps as facts: hashes around warm-ups, the order of what was scored and learned, files opened, clocks.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ledger import (
    Account,
    accounts,
    check_coverage,
    check_order,
    check_tokens,
    find_by_hash,
    head_of,
    read_audit,
    read_chain,
)
from rules import CAP_BYTES, FAIL, PASS, RULING, UNKNOWN, Broken, Outcome, finding, sha256, verdicts

ROOT = Path(__file__).resolve().parents[1]
OVERLAP_SECONDS = 6.0  # for the training data, if not looked at in full
SPANS = ((1, 64), (65, 32), (129, 32), (257, 32))  # P9: (first token, how many); the first decides
PROGRAMS = ("lrzip", "gcc", "g++", "cc", "c++", "clang", "ptxas", "ldconfig", "python")  # unpack and compile
LOCAL = ("127.0.0.1", "::1", "localhost")

Findings = dict[str, Outcome]


# -- THE RUN -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class FinishedRun:
    """A run folder, the script that ran in it, imported, and the data as that script reads it."""

    folder: Path
    script: Any     # the module
    cfg: Any        # its Config
    world: Any      # one rank
    files: Any      # its Dataset, without training shards
    data: Any       # its ValData
    train_shards: tuple[Path, ...]  # of this run or one before it in the folder
    account: Account                # of the last process
    lines: int      # of the ledger
    head: str       # its last hash

    @property
    def scored(self) -> bool:
        """Whether the last process scored an artifact."""
        return bool(self.account.of("artifact"))


def find_script(code_sha256: str, named: Path | None = None) -> Path:
    """Find the script that ran among ours, or take the named one. Raises Broken."""
    ours = [ROOT / "train_gpt.py", Path("build/train_gpt.py"), Path("train_gpt.py")]
    candidates = [named] if named else ours
    for path in candidates:
        if path.exists() and sha256(path.read_bytes()) == code_sha256:
            return path
    looked = ", ".join(map(str, candidates))
    raise Broken(f"none of {looked} is the script that ran ({code_sha256[:12]}): name one that you trust "
                 "with --script, because it is imported; a stranger's is only run in the clean room: "
                 "python tools/audit.py rescore")


def load_script(path: Path) -> ModuleType:
    """Import a script, readable or packed, as train_gpt, if it is not imported already."""
    loaded = sys.modules.get("train_gpt")
    if loaded is not None and Path(loaded.__file__).read_bytes() == path.read_bytes():
        return loaded
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def load_run(folder: Path, script: Path | None = None, data: Path | None = None) -> FinishedRun:
    """Read a run folder, and import what ran in it. Raises Broken where files contradict the ledger."""
    entries = read_chain(folder / "ledger.jsonl")
    processes = accounts(entries)
    account, head = processes[-1], entries[-1]["hash"]
    start = account.start
    if account.end and head_of(json.loads((folder / "result.json").read_text())) != head:
        raise Broken(f"{folder}/result.json does not keep the head of the ledger beside it: not of one run")
    module = load_script(find_script(start["code_sha256"], script))
    if not hasattr(module, "METHODS"):
        raise Broken(f"{folder}: this script audited itself; its verdicts stand in its ledger: "
                     "python tools/audit.py RECORD")

    try:
        cfg = module.config_from_env(start["overrides"] | ({"DATA_PATH": str(data)} if data else {}))
        files = module.Dataset.open(cfg, need_train=False)
        wrong = [path.name for path in files.val if files.hashes[path.name] != start["shards"].get(path.name)]
        if wrong:
            raise Broken(f"{', '.join(wrong)} in {cfg.shards_path} is not what the run scored: name its data "
                         "with --data")
        world = module.World.init(cfg, module.Launch(0, 0, 1))
        os.environ.update(module.compile_cache(cfg, world))
        val = module.ValData.load(cfg, files)
    except module.RunError as error:
        raise Broken(str(error)) from None
    names = {name for process in processes for name in process.start["shards"]}
    train_names = sorted(name for name in names if name.startswith("fineweb_train_"))
    train_shards = tuple(cfg.shards_path / name for name in train_names)
    return FinishedRun(folder, module, cfg, world, files, val, train_shards, account, len(entries), head)


# -- P1 TO P3: the scored pass on short streams, true and forged ---------------------------------------------

def make_probe_scorer(script, data, world, watch: int, vocab: int):
    """Make a Scorer that asks for the nats of the whole vocabulary where target `watch` is scored.

    It keeps them at that target as `row`, and as `excess` by how much probabilities anywhere in that batch do
    not add up to one.
    """
    torch = script.torch

    class ProbeScorer(script.Scorer):
        row = None
        excess = math.inf

        def score(self, targets: np.ndarray, forward):
            if (targets == watch).any():
                eager = torch.compiler.set_stance("force_eager")  # one shape, once: not worth a graph
                with torch.no_grad(), eager:
                    every = torch.arange(vocab, device=self.world.device).expand(*targets.shape, -1)
                    nats = script.graded(forward, every, self.hints_at(targets), self.boost)[1].cpu()
                sums = nats[torch.from_numpy(targets >= 0)].double().neg().exp().sum(-1)
                self.excess = float((sums - 1).abs().max())
                self.row = nats[torch.from_numpy(targets == watch)]
            return super().score(targets, forward)

    return ProbeScorer(data, world, "probe")


def short_stream(script, data, count: int, length: int, generator: np.random.Generator):
    """Cut the first `length` tokens of `count` random documents that have so many, or of the longest ones."""
    starts, ends = data.documents()
    sizes, count = ends - starts, min(count, len(starts))
    enough = max(count, (sizes >= length).sum())
    picked = generator.choice(np.argsort(sizes)[-enough:], count, replace=False)
    documents = [data.tokens[starts[i] : starts[i] + min(sizes[i], length)] for i in picked]
    tokens = np.append(np.concatenate(documents), script.BOS_ID)
    return script.ValData(tokens.astype(np.uint16), np.ones(len(tokens) - 1, np.int32))


def forge(tokens: np.ndarray, first: int, end: int, vocab: int, generator: np.random.Generator) -> np.ndarray:
    """Replace tokens [first, end) by others, none of which starts a document."""
    forged = tokens.astype(np.int64)
    shift = 1 + generator.integers(0, vocab - 3, end - first)
    forged[first:end] = 2 + (forged[first:end] - 2 + shift) % (vocab - 2)
    return forged.astype(np.uint16)


def probe_scoring(
    script, data, world, vocab: int, replay, count: int, length: int, rounds: int, seed: int,
    documents_masked: bool = True,
) -> Findings:
    """P1 forged future, P2 sum over the vocabulary, P3 neighbours, where documents are masked.

    replay(scorer), the scored pass from a fresh start, scores `count` short documents as they are, and with
    one forged from a random target on. All before that in the order of scoring, and the other documents, must
    keep the same bits; so must the distribution at the first forged target.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    past, others, row, excess = 0.0, 0.0, 0.0, 0.0
    for _ in range(rounds):
        true = short_stream(script, data, count, length, generator)
        starts, ends = true.documents()
        start, end = starts[len(starts) // 2], ends[len(starts) // 2]
        if end - start < 3:
            return dict.fromkeys(("P1", "P2", "P3"), (UNKNOWN, "the documents are too short"))
        cut = int(generator.integers(start + (end - start) // 3, end - 1))  # token cut + 1 is forged first
        forged = script.ValData(forge(true.tokens, cut + 1, end, vocab, generator), true.target_bytes)
        streams = (true, forged, true)
        a, b, again = (make_probe_scorer(script, stream, world, cut, vocab) for stream in streams)
        replay(a)
        replay(b)

        moved = (b.nats - a.nats).abs().cpu().numpy()
        scored_before = a.order[: int(np.flatnonzero(a.order == cut)[0])]
        before = np.concatenate((scored_before, np.arange(start, cut)))
        past = max(past, moved[before].max(initial=0.0))
        others = max(others, np.delete(moved, np.s_[start:end]).max(initial=0.0))
        row = max(row, float((b.row - a.row).abs().max()))
        excess = max(excess, a.excess)
        if max(row, past, others) > 0:
            replay(again)
            noise = float((again.nats - a.nats).abs().max())
            if noise:
                evidence = f"scoring the same text twice differs by {noise:.2g} nats here"
                return dict.fromkeys(("P1", "P2", "P3"), (UNKNOWN, evidence))
    looks_ahead = (f"a forged future moves the scores before it by {past:.3g}, its own distribution by "
                   f"{row:.3g} nats")
    looks_aside = f"a forged document moves scores of its {count - 1} neighbours by {others:.3g} nats"
    return dict(
        P1=finding(past == row == 0, looks_ahead),
        P2=finding(excess < 1e-4 and row == 0, f"sums over {vocab} tokens are off by {excess:.2g}"),
        P3=finding(others == 0, looks_aside, documents_masked))


def make_replay(run: FinishedRun):
    """Make replay(scorer) -> Score: the scored pass of the run, on the weights of its artifact.

    No training shard can be opened meanwhile.
    """
    tg, cfg = run.script, run.cfg
    small = tg.METHODS["ttt" if cfg.ttt_enabled else cfg.eval_method].small
    limits = {name: min(limit, getattr(cfg, name)) for name, limit in small.items()}
    probe_cfg = replace(cfg, **limits, max_eval_seconds=0.0, compile_allow_recompiles=True)
    artifact = run.account.of("artifact")[-1]
    path = find_by_hash(run.folder, artifact["sha256"], Path(artifact["file"]).suffix)
    if path is None:
        raise Broken(f"{run.folder} does not hold the artifact that was scored ({artifact['sha256'][:12]})")
    model = tg.load_artifact(cfg, run.world, path, tg.pick_kernels(cfg, run.world)[0])
    if cfg.ttt_enabled:
        engine = tg.TttEngine(probe_cfg, run.world, model, run.data)
    else:
        forward = tg.compile_forward(model, cfg, run.world)

    def replay(scorer):
        with tg.access_log():
            if cfg.ttt_enabled:
                return tg.TttRun(probe_cfg, engine, scorer, tg.Log(None)).run()
            return tg.evaluate(probe_cfg, run.world, forward, scorer)

    return replay


def probe_replay(run: FinishedRun, full: bool) -> Findings:
    """P1 to P3 of the run's own scored pass."""
    if not run.scored:
        return {}
    tg, cfg = run.script, run.cfg
    count, length = 3, 128
    if cfg.ttt_enabled:
        count, length = min(count, cfg.ttt_batch_size), 3 * tg.chunk_size(cfg, 2)
    method = tg.METHODS["ttt" if cfg.ttt_enabled else cfg.eval_method]
    masked = method.documents_masked and not cfg.ngram_tilt_enabled
    return probe_scoring(
        tg, run.data, run.world, cfg.vocab_size, make_replay(run), count, length, rounds=16 if full else 1,
        seed=cfg.seed, documents_masked=masked)


# -- P9 AND P10: training data and text ----------------------------------------------------------------------

def document_hashes(tokens: np.ndarray, bos: int, offset: int, length: int) -> np.ndarray:
    """Hash tokens [offset, offset + length) of every document to 64 bits, 0 where there are none."""
    starts = np.flatnonzero(tokens == bos)
    ends = np.append(starts[1:], len(tokens))
    h = np.zeros(len(starts), np.uint64)
    for position in (starts + offset + j for j in range(length)):
        token = tokens[np.minimum(position, len(tokens) - 1)]
        token = np.where(position < ends, token, 0).astype(np.uint64)
        h = (h ^ token ^ (h >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
    return np.where(starts + offset < ends, h, np.uint64(0))


def probe_overlap(script, shards: tuple[Path, ...], val: np.ndarray, seconds: float) -> Findings:
    """P9: validation documents whose first 64 tokens start a training document, others that share a part."""
    deadline, read = time.perf_counter() + seconds, 0
    hashes = [document_hashes(val, script.BOS_ID, *span) for span in SPANS]
    hits = np.zeros((len(SPANS), len(hashes[0])), bool)
    while read < len(shards) and time.perf_counter() < deadline:
        tokens = np.array(script.read_shard(shards[read]))
        read += 1
        for row, span in enumerate(SPANS):
            found = np.isin(hashes[row], document_hashes(tokens, script.BOS_ID, *span))
            hits[row] |= found & (hashes[row] > 0)
    exact, near = int(hits[0].sum()), int((hits[1:].any(0) & ~hits[0]).sum())
    verdict = FAIL if exact > 0.01 * len(hashes[0]) else RULING if exact else PASS
    text = f"{exact} of {len(hashes[0])} documents are in {read} of {len(shards)} training shards"
    return dict(P9=(verdict, f"{text}, {near} more in part"))


def probe_training_data(run: FinishedRun, full: bool) -> Findings:
    """P9 of the shards that a run in this folder trained on."""
    missing = [path.name for path in run.train_shards if not path.exists()]
    if missing:
        text = f"{len(missing)} of {len(run.train_shards)} training shards are not here, {missing[0]} for one"
        return dict(P9=(UNKNOWN, text))
    if not run.train_shards:
        return {}
    return probe_overlap(run.script, run.train_shards, run.data.tokens, math.inf if full else OVERLAP_SECONDS)


def probe_round_trip(script, cfg, data, count: int, seed: int) -> Outcome:
    """P10: documents decoded to text have the bytes that were counted, and encode to the same tokens."""
    try:
        import sentencepiece
        decode = importlib.import_module("lossless_caps").decode if cfg.caseops_enabled else str
        model = sentencepiece.SentencePieceProcessor(model_file=str(cfg.tokenizer_file))
    except (ImportError, OSError, RuntimeError) as error:
        return UNKNOWN, f"the text cannot be decoded here: {str(error).splitlines()[0]}"
    starts = data.documents()[0]
    ends = np.append(starts[1:], len(data.tokens))
    generator = np.random.Generator(np.random.PCG64(seed))
    picked = generator.choice(len(starts), min(count, len(starts)), replace=False)
    broken, lost, total = 0, 0, 0
    for start, end in zip(starts[picked].tolist(), ends[picked].tolist(), strict=True):
        ids = data.tokens[start + 1 : end].tolist()
        counted = int(data.target_bytes[start : end - 1].sum())
        coded = model.decode(ids)
        missing = abs(counted - len(decode(coded).encode()))
        broken += bool(missing or model.encode(coded) != ids)
        lost += missing
        total += counted
    text = f"{broken} of {len(picked)} documents and {lost} of {total} bytes do not come back"
    return RULING if broken else PASS, text


def probe_text(run: FinishedRun, full: bool) -> Findings:
    """P10 of some validation documents, or of all."""
    if not run.scored:
        return {}
    sys.path.append(str(ROOT))  # lossless_caps
    return dict(P10=probe_round_trip(run.script, run.cfg, run.data, 1 << 30 if full else 8, run.cfg.seed))


# -- WHAT THE LEDGER AND THE FILES SAY -----------------------------------------------------------------------

def says(check, account: Account, folder: Path, evidence: str = "") -> Outcome:
    """Turn a check of the ledger into an outcome.

    What it raises is a FAIL, what it returns the evidence, unless a better one is given.
    """
    try:
        outcome = check(account, folder)
    except Broken as error:
        return FAIL, str(error)
    return (PASS, evidence or outcome) if isinstance(outcome, str) else outcome


def judge_size(account: Account, compressor: str) -> Outcome:
    """Compare the artifact and the script that ran with the cap."""
    artifact = account.of("artifact")[-1]
    total = artifact["bytes"] + artifact["code_bytes"]
    return finding(total <= CAP_BYTES, f"{total:,} of {CAP_BYTES:,} bytes, packed by {compressor}")


def judge_order(account: Account, folder: Path) -> Outcome:
    """Compare the weights of the first score with the artifact's, what was learned with what was scored."""
    weights = {line["when"]: line["sha256"][:8] for line in account.of("weights")}
    loaded, first = weights.get("loaded"), weights.get("first_score")
    early = any(line["early"] for line in account.of("update") if line["pass"] == account.end["pass"])
    kind = "unscored" if early else "scored"
    text = f"weights {loaded} when loaded, {first} at the first score; learned from {kind} targets"
    outcome = finding(loaded == first and not early, text, None not in (loaded, first))
    return outcome if outcome[0] != PASS else says(check_order, account, folder, text)


def judge_coverage(account: Account, targets: int, text_bytes: int | None) -> Outcome:
    """P4: targets scored of those in the shards, bytes counted of the manifest's (None: it does not say)."""
    end = account.end
    whole = end["tokens"] == targets
    evidence = f"{end['tokens']} of {targets} targets, {end['bytes']} of {text_bytes or '?'} bytes"
    if whole and text_bytes is not None and end["bytes"] < text_bytes:
        return RULING, evidence  # a normalisation may lose text
    return finding(whole and end["bytes"] == text_bytes, evidence, bool(text_bytes) or not whole)


def judge_warm_ups(account: Account) -> Outcome:
    """P6: the state around every warm-up."""
    hashes = [(line["before"], line["after"]) for line in account.of("warmup")]
    shown = [(before[:8], after[:8]) for before, after in hashes]
    unchanged = all(before == after for before, after in hashes)
    return finding(unchanged, f"hashes of the state before and after: {shown}", bool(hashes))


def judge_time(account: Account) -> Outcome:
    """P7: what was on the clocks, against the run's budgets; in brackets whole phases."""
    end, late, known, texts = account.end, False, True, []
    trained = None if end["train_seconds"] is None else end["train_seconds"] + (end["calib_seconds"] or 0)
    for name, spent, budget, phases in (
        ("train", trained, end["train_budget_seconds"], ("train", "calibrate", "quantize")),
        ("eval", end["eval_seconds"], end["eval_budget_seconds"], ("unpack", "diagnostic eval", "eval")),
    ):
        strict = sum(line["seconds"] for line in account.of("phase") if line["name"] in phases)
        late |= bool(budget) and spent is not None and spent > budget
        known &= bool(budget) and spent is not None
        seconds = math.nan if spent is None else spent
        texts.append(f"{name} {seconds:.1f} of {budget:g} s (strict {strict:.1f})")
    return finding(not late, ", ".join(texts), late or known)


def expected(event: str, what: str) -> bool:
    """Whether an evaluation may do that: compile and unpack, talk to itself."""
    if event == "socket.connect":
        return what.startswith("/") or what in LOCAL
    return event != "open" and Path(what).name.startswith(PROGRAMS)


def judge_access(account: Account) -> Outcome:
    """P11: files beside the data and the run's own, other machines, programs."""
    lines = account.of("access")
    seen = [entry for line in lines for entry in line["seen"]]
    unexpected = [f"{event} {what}" for event, what in seen if not expected(event, what)]
    text = f"unexpected among the files, sockets and programs: {', '.join(unexpected[:3]) or 'none'}"
    return finding(not unexpected, text, bool(lines))


def judge_seed(account: Account) -> Outcome:
    """P12: the seed is one of those declared before the first run."""
    seed = account.start["seed"]
    declared = [int(s) for s in filter(None, account.start["seeds_declared"].split(","))]
    return finding(seed in declared, f"seed {seed}, declared: {declared}", bool(declared))


def judge_sum(account: Account, folder: Path) -> Outcome:
    """The score again, from the file of nats whose hash the ledger keeps."""
    end = account.end
    line = next(line for line in account.of("tokens") if line["pass"] == end["pass"])
    path = find_by_hash(folder, line["sha256"], ".npy")
    if path is None:
        there = (folder / line["file"]).exists()
        return finding(False, f"{line['file']} is not the file whose sha256 the ledger keeps", there)
    nats = float(np.load(path, allow_pickle=False).sum(dtype=np.float64))
    off = abs(nats / math.log(2) / account.start["val_bytes"] - end["val_bpb"])
    outcome = finding(off <= 1e-9, f"bits per byte from {line['file']} differ by {off:.1g}")
    return outcome if outcome[0] != PASS else says(check_tokens, account, folder, outcome[1])


def probe_facts(run: FinishedRun, full: bool = False) -> Findings:
    """Judge sizes, clocks, hashes, coverage, and the score computed again from its file."""
    if not run.scored:
        return {}
    account, folder = run.account, run.folder
    targets = sum(len(run.script.read_shard(path)) for path in run.files.val) - 1
    text_bytes = run.files.manifest.get("splits", {}).get("val", {}).get("bytes")
    scored = f"{account.end['tokens']:,} targets, each once, by the scorer"
    return dict(
        bytes=judge_size(account, run.cfg.compressor), order=judge_order(account, folder),
        P4=judge_coverage(account, targets, text_bytes), P5=says(check_coverage, account, folder, scored),
        P6=judge_warm_ups(account), P7=judge_time(account), P8=(UNKNOWN, "tools/audit.py rescore does it"),
        P11=judge_access(account), P12=judge_seed(account), sum=judge_sum(account, folder))


# -- THE AUDIT -----------------------------------------------------------------------------------------------

PROBES = (probe_training_data, probe_replay, probe_facts, probe_text)


def judge(folder: Path, script: Path | None = None, data: Path | None = None, full: bool = False) -> dict:
    """Probe a finished run and keep the audit as audit.json beside it. full: all training shards and
    documents, 16 rounds of replays.

    -> {mode, verdicts of R1 to R12, findings, seconds by probe, lines and last_hash of the ledger}. Raises
    Broken.
    """
    run = load_run(folder, script, data)
    findings: Findings = {}
    seconds = {}
    for probe in PROBES:
        start = time.perf_counter()
        found = probe(run, full)
        if found:
            seconds[", ".join(found)] = round(time.perf_counter() - start, 3)
        findings |= found
    audit = dict(
        mode="full" if full else "sample", verdicts=verdicts(run.cfg, findings), findings=findings,
        seconds=seconds, lines=run.lines, last_hash=run.head)
    draft = folder / f".audit.json.{os.getpid()}"
    draft.write_text(json.dumps(audit, indent=1) + "\n")
    os.replace(draft, folder / "audit.json")
    return audit


def stored_audit(folder: Path, full: bool = False) -> dict | None:
    """The audit that stands beside a ledger and belongs to its last line, if it looked at enough."""
    audit = read_audit(folder, read_chain(folder / "ledger.jsonl")[-1]["hash"])
    return audit if audit is not None and (audit["mode"] == "full" or not full) else None
