"""Score a record again from its counted files alone: a fresh process in an empty folder, without network, home or training data."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from foreign import Log, read_json
from ledger import accounts, find_by_hash, read_chain
from record import NOT_SETTINGS, STAGES
from rules import FAIL, PASS, UNKNOWN, Broken, Finding, sha256

TOLERANCE = 1e-3    # nats per target, across back ends; 0 is expected on the machine that made the record
BOS = 1
MACHINE = (  # all that comes along from the environment; ATEN_CPU_CAPABILITY=avx2 makes torch round like an older CPU
    "ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TRITON_INTERPRET")
HEADER = 256        # int32 of a shard; techniques, section 1.1

# Runs in the fresh process before the script: no network, no file outside the room and the installed software, no program but
# unpacker and compilers, because a child process is not guarded.
GUARD = """
import os, runpy, sys
roots = tuple(sys.argv[1].split(os.pathsep))
def guard(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind") and isinstance(args[-1], tuple) or event in (
            "socket.getaddrinfo", "socket.gethostbyname"):
        raise PermissionError(f"clean room: no network ({event} {args[1:]})")
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith(roots):
            raise PermissionError(f"clean room: {path} is not among the counted files")
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
        name = os.path.basename(os.fsdecode(args[0]))
        if event == "os.system" or name not in ("lrzip", "gcc", "g++", "cc", "c++", "clang", "ld", "ldconfig", "ptxas", "uname"):
            raise PermissionError(f"clean room: {name} is no program that unpacks or compiles")
sys.addaudithook(guard)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# -- WHAT IS SCORED ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Claim:
    """One run as its record keeps it."""

    folder: Path
    script: Path
    artifact: Path
    result: dict
    ledger: Path | None


def load_claim(record: Path, seed: int | None, script: Path | None) -> Claim:
    """The run of `seed` (the first whose artifact is there) in a record or run folder. Raises Broken where files contradict it."""
    if (record / "result.json").exists():
        result = read_json(record / "result.json")
        artifact = record / str(result.get("artifact_file"))
    else:
        logs = {log.seed: log.result for log in map(Log.read, sorted(record.glob("train_seed*.log"))) if log.result}
        found = {path.name.split(".")[0].removeprefix("artifact_seed"): path for path in sorted(record.glob("artifact_seed*"))}
        seeds = [s for s in map(str, read_json(record / "submission.json").get("seeds", [])) if s in logs and s in found]
        wanted = str(seed) if seed is not None else next(iter(seeds), None)
        if wanted not in seeds:
            raise Broken(f"{record} has no artifact with a log of seed {wanted}; artifacts of: {', '.join(sorted(found)) or 'none'}")
        result, artifact = logs[wanted], found[wanted]
    scripts = [script] if script else [record / "train_gpt.py", Path("build/train_gpt.py"), Path("train_gpt.py")]
    script = next((p for p in scripts if p.exists() and sha256(p.read_bytes()) == result["code_sha256"]), None)
    if script is None:
        raise Broken(f"none of {', '.join(map(str, scripts))} is the script that ran ({result['code_sha256'][:12]}): name it with --script")
    if not artifact.exists() or sha256(artifact.read_bytes()) != result["artifact_sha256"]:
        raise Broken(f"{artifact} is not the artifact that seed {result['seed']} scored")
    ledgers = [p for p in sorted(record.glob("*ledger*.jsonl")) if accounts(read_chain(p))[-1].start["seed"] == result["seed"]]
    return Claim(record, script, artifact, result, ledgers[0] if ledgers else None)


def token_files(claim: Claim) -> dict[str, np.ndarray]:
    """Evaluation -> nats of every target, from the files whose sha256 the ledger keeps."""
    if claim.ledger is None:
        return {}
    lines = accounts(read_chain(claim.ledger))[-1].of("tokens")
    paths = {e["pass"]: find_by_hash(claim.ledger.parent, e["sha256"], Path(e["file"]).suffix) for e in lines}
    return {name: np.load(path, allow_pickle=False) for name, path in paths.items() if path is not None}


# -- DATA --------------------------------------------------------------------------------------------------------------

def read_shard(path: Path) -> np.ndarray:
    return np.fromfile(path, "<u2", offset=4 * HEADER)


def write_shard(path: Path, tokens: np.ndarray, header: bytes) -> None:
    head = np.frombuffer(header, "<i4").copy()
    head[2] = len(tokens)
    path.write_bytes(head.tobytes() + tokens.astype("<u2").tobytes())


def copy_validation(data: Path, room: Path, fraction: float | None, seed: int) -> np.ndarray | None:
    """Validation shards and sidecars, or a random share of their documents. Returns the targets of that share, target t being token
    t + 1, or None for everything.

    A document's targets reach to the BOS of the next one, so the sample ends with a BOS of its own. The script cannot tell that it
    sees a sample.
    """
    room.mkdir()
    paths = sorted(data.glob("fineweb_val_*.bin"))
    shards, sidecars = [p for p in paths if "_bytes_" not in p.name], [p for p in paths if "_bytes_" in p.name]
    if not shards:
        raise Broken(f"no fineweb_val_*.bin in {data}: name the folder of the record's validation shards with --data")
    if fraction in (None, 1):
        for path in paths:
            shutil.copyfile(path, room / path.name)
        return None
    tokens = np.concatenate([read_shard(p) for p in shards])
    starts = np.flatnonzero(tokens == BOS)
    ends = np.append(starts[1:], len(tokens))
    starts = starts[starts < len(tokens) - 1]
    chosen = np.sort(np.random.default_rng(seed).choice(len(starts), max(1, round(fraction * len(starts))), replace=False))
    index = np.concatenate([np.arange(starts[i], ends[i]) for i in chosen])
    closed = ends[chosen[-1]] < len(tokens)
    for kind, files in (("fineweb_val_000000.bin", shards), ("fineweb_val_bytes_000000.bin", sidecars)):
        if files:
            values, last = np.concatenate([read_shard(p) for p in files]), [BOS if files is shards else 0]
            write_shard(room / kind, np.append(values[index], last if closed else []), files[0].read_bytes()[: 4 * HEADER])
    return index if closed else index[:-1]


# -- THE ROOM ----------------------------------------------------------------------------------------------------------

def isolation() -> tuple[list[str], str]:
    """A command prefix that takes the network away, and its name."""
    for prefix, name in ((["unshare", "--net"], "a network namespace of its own (unshare --net)"),
                         (["unshare", "--user", "--map-root-user", "--net"], "user and network namespaces of its own (unshare)")):
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix, name
    return [], "an audit hook alone (unshare is not permitted)"


def enter(claim: Claim, data: Path, fraction: float | None, sample_seed: int, timeout: float | None) -> dict:
    """Build the room, run the script in it and bring back result, nats per target and what the process said. Raises Broken."""
    result = claim.result
    settings = {k: v for k, v in result["overrides"].items() if not NOT_SETTINGS.fullmatch(k)} | {"MAX_EVAL_SECONDS": "0"}  # no hurry
    if fraction is not None:
        settings["TTT_ENABLED"] = "0"
    prefix, network = isolation()
    with tempfile.TemporaryDirectory(prefix="clean_room_") as name:
        room = Path(name).resolve()
        for folder in ("home", "tmp", "out"):
            (room / folder).mkdir()
        targets = copy_validation(data, room / "data", fraction, sample_seed)
        shutil.copyfile(claim.script, room / "train_gpt.py")
        shutil.copyfile(claim.artifact, room / "out" / result["artifact_file"])
        files = sorted(str(p.relative_to(room)) for p in room.rglob("*") if p.is_file())
        if settings.get("CASEOPS_ENABLED", "1") == "0":
            shutil.copyfile(data / "tokenizer.model", room / "data" / "tokenizer.model")
        environment = {k: os.environ[k] for k in MACHINE if k in os.environ} | settings | {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", "HOME": f"{room}/home", "TMPDIR": f"{room}/tmp",
            "PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "SEED": str(result["seed"]), "STAGE": "eval",
            "RUN_ID": "clean_room", "DATA_PATH": f"{room}/data", "ARTIFACT_DIR": f"{room}/out"}
        installed = (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())
        software = {os.path.realpath(p) + os.sep for p in installed if os.path.isdir(p)}
        roots = os.pathsep.join([f"{room}/", *sorted(software), "/proc/", "/sys/", "/dev/", "/usr/", "/lib", "/bin/", "/etc/"])
        command = [*prefix, sys.executable, "-c", GUARD, roots, str(room / "train_gpt.py")]
        try:
            process = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Broken(f"the clean room did not finish within {timeout:.0f} s") from None
        if process.returncode:
            raise Broken(f"the script ends with exit code {process.returncode} in the clean room: {process.stderr.strip()[-600:]}")
        out = {"result": read_json(room / "out" / "result.json"), "network": network, "files": files, "targets": targets, "nats": {}}
        if (room / "out" / "ledger.jsonl").exists():
            lines = accounts(read_chain(room / "out" / "ledger.jsonl"))[-1].of("tokens")
            out["nats"] = {e["pass"]: np.load(room / "out" / e["file"], allow_pickle=False) for e in lines}
        return out


# -- THE COMPARISON ----------------------------------------------------------------------------------------------------

def same_data(claim: Claim, data: Path) -> Finding:
    """Whether the validation shards are the record's, by the hashes that it kept."""
    manifest = read_json(data / "manifest.json") if (data / "manifest.json").exists() else {}
    kept = accounts(read_chain(claim.ledger))[-1].start.get("shards") if claim.ledger else None
    if kept:
        shards = kept if isinstance(kept, dict) else {e["file"]: e["sha256"] for e in kept}
        wrong = [p.name for p in sorted(data.glob("fineweb_val_*.bin")) if shards.get(p.name) != sha256(p.read_bytes())]
        return Finding("data", FAIL if wrong else PASS, f"sha256 of {', '.join(wrong) or 'every validation shard'} "
                       + ("is not that of the ledger" if wrong else "as in the ledger"))
    known = claim.result["data"]
    if known["tokenizer_sha256"] and known["tokenizer_sha256"] == manifest.get("tokenizer_sha256"):
        return Finding("data", UNKNOWN, "the record keeps no hash of its shards; its tokenizer is the one of --data")
    return Finding("data", UNKNOWN, "the record keeps no hash of its shards, and --data has another tokenizer: other tokens")


def compare_score(name: str, claimed: dict, again: dict, tolerance: float) -> Finding | None:
    """Mean nats and bits per byte of one evaluation, where both have it."""
    loss = [r.get(f"{name}_val_loss") for r in (claimed, again)]
    if None in loss:
        return None
    bpb = [r[f"{name}_val_bpb"] for r in (claimed, again)]
    counts = [(r["target_tokens"], r["val_bytes"]) for r in (claimed, again)]
    text = (f"val_loss {loss[1]:.10f} (record {loss[0]:.10f}, {loss[1] - loss[0]:+.1e}), "
            f"val_bpb {bpb[1]:.8f} (record {bpb[0]:.8f}, {bpb[1] - bpb[0]:+.1e})")
    if counts[0] != counts[1]:
        return Finding(f"{name} score", FAIL, f"{text}; targets and bytes {counts[1]}, in the record {counts[0]}")
    return Finding(f"{name} score", PASS if abs(loss[1] - loss[0]) <= tolerance else FAIL, ("equal: " if loss[0] == loss[1] else "") + text)


def compare_nats(name: str, claimed: np.ndarray, again: np.ndarray, tolerance: float) -> Finding:
    """Nats of each target. The mean absolute difference must be within the tolerance: a score cannot be off by more than that."""
    if claimed.shape != again.shape:
        return Finding(f"{name} nats", FAIL, f"{len(again)} targets, the record has {len(claimed)}")
    off = np.abs(claimed.astype(np.float64) - again)
    text = (f"{len(off):,} targets, {np.mean(off == 0):.1%} equal, mean |difference| {off.mean():.1e}, largest {off.max():.1e} nats "
            f"at target {off.argmax()}")
    return Finding(f"{name} nats", PASS if off.mean() <= tolerance else FAIL, text)


def rescore(record: Path, data: Path, seed: int | None = None, fraction: float | None = None, sample_seed: int = 0,
            script: Path | None = None, tolerance: float = TOLERANCE, timeout: float | None = None) -> list[Finding]:
    """Score a run of `record` again in the clean room and compare. fraction None: everything, test-time training too.

    A share of the documents is scored by the quantized model alone: what test-time training learns depends on the whole batch, so
    only the evaluation with fixed weights can be compared document by document, and below 1 only with the nats that a ledger keeps.
    """
    claim = load_claim(record, seed, script)
    nats = token_files(claim)
    if fraction is not None and fraction < 1 and "quantized" not in nats:
        raise Broken(f"{record} keeps no nats per token of the quantized model, so a share of the documents has nothing to be compared "
                     "with: use --all, or --fraction 1 for everything with fixed weights")
    if fraction is not None and fraction < 1 and claim.result["overrides"].get("EVAL_METHOD", "packed") != "packed":
        raise Broken("EVAL_METHOD=sliding: documents see their neighbours, so a share of them scores differently: use --all")
    findings = [same_data(claim, data)]
    room = enter(claim, data, fraction, sample_seed, timeout)
    again, targets = room["result"], room["targets"]
    what = f"{again['docs_val']} random documents ({again['target_tokens']:,} targets)" if targets is not None else "all documents"
    what += ", fixed weights" * (fraction is not None)
    findings.append(Finding("room", PASS, f"seed {claim.result['seed']}, {what}, from {', '.join(room['files'])} and {again['hardware']}; "
                            f"network: {room['network']}; files: an audit hook"))
    if targets is None:
        findings += filter(None, (compare_score(name, claim.result, again, tolerance) for name in STAGES if name != "pre_quant"))
        findings += [compare_nats(name, nats[name], room["nats"][name], tolerance) for name in nats if name in room["nats"]]
    elif "quantized" in room["nats"]:
        findings.append(compare_nats("quantized", nats["quantized"][targets], room["nats"]["quantized"], tolerance))
    if len(findings) == 2:
        findings.append(Finding("scores", FAIL, "the clean room produced nothing that the record claims"))
    if claim.result["world_size"] != again["world_size"]:
        findings.append(Finding("ranks", UNKNOWN, f"{claim.result['world_size']} in the record, {again['world_size']} in the room"))
    return findings


def overall(findings: list[Finding]) -> tuple[str, str]:
    """Rule R12: FAIL if any score differs, else PASS with the largest difference found."""
    scores = [f for f in findings if f.name.endswith(("score", "nats", "scores"))]
    failed = [f for f in findings if f.verdict == FAIL]
    return (FAIL if failed else PASS), "; ".join(f"{f.name}: {f.evidence}" for f in (failed or scores))


