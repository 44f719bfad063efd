"""Make, check and list record folders.

    python tools/record.py new RUN_DIR... --track track_10min_16mb --name TwoWords
    python tools/record.py validate records/track_10min_16mb/2026-01-31_TwoWords
    python tools/record.py index

Every number of a record is computed from the logs and files of its runs, and `validate` computes all of them again.
records/README.md says what is in a folder.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import brotli
import jsonschema
import pack_code
import python_minifier
from ledger import RESULT_LINE, read_chain
from probes import judge, stored_audit
from rules import BUDGET_SECONDS, CAP_BYTES, PASS, Broken, finding, severity, sha256, table, verdict_lines

TOKEN_NATS_BYTES = 4_000_000  # larger files of nats per token stay with the run; the ledger has their sums and hash
SCHEMA = json.loads(Path(__file__).with_name("record_schema.json").read_text())


def parse_json(text: str, definition: str | None = None) -> dict:
    """The JSON object in `text`, checked against the schema file or against one of its definitions."""
    def refuse(constant: str):
        raise Broken(f"{constant} is not a JSON number")
    schema = SCHEMA if definition is None else {"$ref": f"#/$defs/{definition}", "$defs": SCHEMA["$defs"]}
    value = json.loads(text, parse_constant=refuse)
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value))
    if problem is not None:
        raise Broken(f"{problem.json_path}: {problem.message[:300]}")
    return value


# -- RUNS: everything that is known about the layout of a run directory and the grammar of a log ----------------------

STAGES = {"pre_quant": "diagnostic pre-quantization post-ema", "quantized": "diagnostic quantized",
          "ttt": "quantized_ttt_phased"}
LOG_NUMBERS = {  # result key -> the line that prints it; the last such line counts
    "val_tokens": r"val_tokens: (\d+)",
    "model_params": r"model_params:(\d+)",
    "artifact_bytes": r"Serialized model quantized\S*: (\d+) bytes",
    "bytes_total": r"Total submission size quantized\S*: (\d+) bytes",
    **{f"{stage}_val_{unit}": rf"{words} .*?\bval_{unit}:(\S+)" for stage, words in STAGES.items() for unit in ("loss", "bpb")},
}
PROGRESS = re.compile(r"^(\d+)/\d+ (?:train|val)_loss: ", re.M)
TRAIN_LOSS = re.compile(r"^\d+/\d+ train_loss: (\S+) .*\bseconds:(\S+)", re.M)
EARLY_STOP = re.compile(r"^stopping_early: \S+ train_time: (\d+)ms step: (\d+)/", re.M)
TOTAL_EVAL_TIME = re.compile(r"^total_eval_time:(\S+)s$", re.M)
SHARED = ("config_hash", "code_sha256", "world_size", "model_params", "python_version", "torch_version", "triton_version")
NOT_SETTINGS = re.compile(r"SEED|RUN_ID|RESUME|\w*_(DIR|PATH|FILES?)")  # differ between runs and machines, not in config_hash


@dataclass(frozen=True)
class Run:
    log: Path
    text: str
    result: dict

    @functools.cached_property
    def audit(self) -> dict | None:
        """What an audit found: the run's own, or the one that stands beside the log. Raises Broken where that is of another ledger."""
        if "audit" in self.result or "ledger" not in self.result:
            return self.result.get("audit")
        names = (f"audit_seed{self.result['seed']}.json", "audit.json")
        path = next((self.log.with_name(name) for name in names if self.log.with_name(name).exists()), None)
        if path is None:
            return None
        audit = parse_json(path.read_text(), "audit")
        if audit["last_hash"] != self.result["ledger"]["last_hash"]:
            raise Broken(f"{path.name} is not the audit of the run with seed {self.result['seed']}")
        return audit

    @property
    def settings(self) -> dict[str, str]:
        return {name: value for name, value in sorted(self.result["overrides"].items()) if not NOT_SETTINGS.fullmatch(name)}

    @property
    def loss_curve(self) -> list[tuple[float, float]]:
        return [(float(seconds), float(loss)) for loss, seconds in TRAIN_LOSS.findall(self.text)]


def read_log(path: Path) -> Run:
    text = path.read_text()
    lines = RESULT_LINE.findall(text)
    if not lines:
        raise Broken(f"{path.name} has no result line: the run did not finish")
    run = Run(path, text, parse_json(lines[-1], "result"))
    check_run(run)
    return run


def load_run(folder: Path) -> tuple[Run, Path]:
    """The run in `folder` and its artifact, after checking that log, result and artifact belong together."""
    result = parse_json((folder / "result.json").read_text(), "result")
    run = read_log(folder / f"{result['run_id']}.txt")
    if run.result != result:
        raise Broken(f"{folder}: result.json is not the result line of {run.log.name}")
    artifact = folder / Path(result["artifact_file"]).name
    check_artifact(artifact, result)
    return run, artifact


def check_artifact(artifact: Path, result: dict) -> None:
    data = artifact.read_bytes()
    if (len(data), sha256(data)) != (result["artifact_bytes"], result["artifact_sha256"]):
        raise Broken(f"{artifact.name} is not the artifact whose size and sha256 seed {result['seed']} logged")


def check_ledger(ledger: Path, result: dict) -> None:
    """The chain of hashes is whole, and its end is the result's."""
    try:
        lines = read_chain(ledger)
    except Broken as e:
        raise Broken(f"{ledger.name}: {e}") from None
    found = (len(lines), lines[-1]["hash"], lines[-1].get("val_bpb"))
    kept = result.get("ledger") or result["audit"]
    if found != (kept["lines"], kept["last_hash"], result["val_bpb"]):
        raise Broken(f"{ledger.name} is not the ledger of the run with seed {result['seed']}: it ends with {found}")


def check_run(run: Run) -> None:
    """Compare the result line with the rest of its log and with arithmetic."""
    result, problems = run.result, []
    for key, pattern in LOG_NUMBERS.items():
        printed, value = re.findall(f"^{pattern}", run.text, re.M), result[key]
        if bool(printed) != (value is not None) or (printed and not rounds_to(value, printed[-1])):
            problems.append(f"{key} is {value}, but the log prints {printed[-1] if printed else 'nothing'}")
    stop, progress = EARLY_STOP.findall(run.text), PROGRESS.findall(run.text)
    for step in {*(int(step) for _, step in stop[-1:]), *(int(step) for step in progress[-1:])} or {None}:
        if step != result["steps"]:
            problems.append(f"steps is {result['steps']}, but the log ends at step {step}")
    if stop and abs(int(stop[-1][0]) / 1000 - result["train_seconds"]) > 1:  # seconds; the clock is read twice
        problems.append(f"train_seconds is {result['train_seconds']}, but the log stops at {stop[-1][0]} ms")
    evaluated = TOTAL_EVAL_TIME.findall(run.text)
    if evaluated and not rounds_to(result["eval_seconds"], evaluated[-1]):
        problems.append(f"eval_seconds is {result['eval_seconds']}, but the log prints {evaluated[-1]}")
    bpb = result["val_loss"] / math.log(2) * result["target_tokens"] / result["val_bytes"]
    if abs(bpb - result["val_bpb"]) > 1e-6:
        problems.append(f"val_bpb is {result['val_bpb']}, but val_loss, target_tokens and val_bytes give {bpb:.8f}")
    scored = [result[f"{stage}_val_bpb"] for stage in STAGES if result[f"{stage}_val_bpb"] is not None]
    if scored and scored[-1] != result["val_bpb"]:
        problems.append(f"val_bpb is {result['val_bpb']}, but the last stage scored {scored[-1]}")
    if result["bytes_total"] != result["artifact_bytes"] + result["code_bytes"]:
        problems.append(f"bytes_total is {result['bytes_total']}, not artifact_bytes + code_bytes")
    if result["over_cap"] != (result["bytes_total"] > CAP_BYTES):
        problems.append(f"over_cap is {result['over_cap']} at {result['bytes_total']} bytes")
    if problems:
        raise Broken(f"{run.log.name}: " + "; ".join(problems))


def rounds_to(value: float, printed: str) -> bool:
    decimals = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.501 * 10 ** -decimals


def check_same_experiment(runs: list[Run]) -> None:
    seeds = [run.result["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise Broken(f"two runs have the same seed: {seeds}")
    identities = [{**{key: run.result[key] for key in SHARED}, **{f"data.{k}": v for k, v in run.result["data"].items()}}
                  for run in runs]
    for key in sorted(set().union(*identities)):
        values = [identity.get(key) for identity in identities]
        if any(value != values[0] for value in values):
            pairs = ", ".join(f"seed {seed} has {value}" for seed, value in zip(seeds, values, strict=True))
            raise Broken(f"the runs differ in {key}: {pairs}")


# -- SUBMISSION: submission.json as a function of the logs and files --------------------------------------------------

TYPED_BY_HAND = ("name", "author", "github_id", "date", "track", "blurb")
OWN_FILES = re.compile(r"(ledger|audit)_seed\d+\.jsonl?|token_nats_\w+_seed\d+\.npy|"
                       r"train_seed\d+\.log|artifact_seed\d+\S*|train_gpt(_readable)?\.py|requirements\.txt|run\.sh|\w+\.png")


def inventory(folder: Path) -> dict[str, dict]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("submission.json", "README.md"))
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p.read_bytes())} for p in files}


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def seed_result(run: Run, files: dict) -> dict:
    r = run.result
    return {
        "val_bpb": r["val_bpb"], "val_loss": r["val_loss"], "pre_quant_val_bpb": r["pre_quant_val_bpb"],
        "quantized_val_bpb": r["quantized_val_bpb"], "post_ttt_val_bpb": r["ttt_val_bpb"],
        "artifact_bytes": r["bytes_total"], "model_bytes": r["artifact_bytes"], "code_bytes": r["code_bytes"],
        "model_sha256": r["artifact_sha256"], "steps": r["steps"], "step_avg_ms": r["step_avg_ms"],
        "train_s": r["train_seconds"], "train_wallclock_ms": round(1000 * r["train_seconds"]),
        "calib_s": r["calib_seconds"], "eval_s": r["eval_seconds"], "eval_time_s": r["eval_seconds"],
        "wallclock_seconds": r["wall_seconds"], "peak_mem_mib": r["peak_mem_mib"], "val_tokens": r["val_tokens"],
        "target_tokens": r["target_tokens"], "val_bytes": r["val_bytes"],
        "log": run.log.name, "log_sha256": files[run.log.name]["sha256"],
    }


def upstream_code_bytes(source: str) -> int:
    """Count code by the convention of published records: minified, compressed, in base85 with a stub, in a file that is never written."""
    small = python_minifier.minify(
        source, rename_locals=False, hoist_literals=False, remove_literal_statements=True, remove_asserts=True)
    return len(brotli.compress(small.encode(), quality=11)) * 5 // 4 + 67


def upstream_convention(run: Run) -> dict:
    """{"bytes_code_upstream_convention": n} of the readable script in a record; nothing where the run itself counted that."""
    if "code_bytes_upstream_convention" in run.result:
        return {}
    return {"bytes_code_upstream_convention": upstream_code_bytes((run.log.parent / "train_gpt_readable.py").read_text())}


def summarise(runs: list[Run], files: dict, typed: dict) -> dict:
    rows = {str(run.result["seed"]): seed_result(run, files) for run in runs}
    column = {key: [row[key] for row in rows.values()] for key in next(iter(rows.values()))}
    first, largest = runs[0].result, max(column["artifact_bytes"])
    bpb, bpb_std = spread(column["val_bpb"])
    loss, loss_std = spread(column["val_loss"])
    return {
        "schema_version": 1, **{key: typed[key] for key in TYPED_BY_HAND},
        "technique_summary": " ".join(f"{k}={v}" for k, v in runs[0].settings.items()) or "defaults",
        "val_bpb": bpb, "val_bpb_std": bpb_std, "val_loss": loss, "val_loss_std": loss_std,
        "seeds": [run.result["seed"] for run in runs], "seed_results": rows,
        "bytes_total": largest, "bytes_code": files["train_gpt.py"]["bytes"], **upstream_convention(runs[0]),
        "bytes_uncounted": {name: file["bytes"] for name, file in files.items() if not OWN_FILES.fullmatch(name)},
        "artifact_bytes_mean": statistics.fmean(column["artifact_bytes"]), "artifact_bytes_max": largest,
        "over_cap": largest > CAP_BYTES,
        "train_steps_mean": statistics.fmean(column["steps"]), "step_avg_ms_mean": statistics.fmean(column["step_avg_ms"]),
        "train_wallclock_ms_mean": statistics.fmean(column["train_wallclock_ms"]),
        "train_wallclock_ms_max": max(column["train_wallclock_ms"]),
        "eval_time_s_mean": statistics.fmean(column["eval_s"]), "eval_time_s_max": max(column["eval_s"]),
        "wallclock_seconds_mean": statistics.fmean(column["wallclock_seconds"]),
        "hardware": " / ".join(sorted({run.result["hardware"] for run in runs})),
        **{key: first[key] for key in SHARED}, "pytorch_version": first["torch_version"],
        "preset": first.get("preset"), "overrides": runs[0].settings,
        "data": {**first["data"], "note": typed["data"]["note"]},
        "compliance": {rule: verdict for rule, _, _, verdict in audit(runs)}, **judgement(runs),
        "logs": {f"seed{seed}": row["log"] for seed, row in rows.items()}, "files": files,
    }


def judgement(runs: list[Run]) -> dict:
    """{"audit": the gravest verdict of all seeds, by rule, and the end of each seed's ledger}; nothing for runs that were not audited."""
    seeds = {run.result["seed"]: run.audit for run in runs}
    if not all(seeds.values()):
        return {}
    verdicts = {}
    for rule in next(iter(seeds.values()))["verdicts"]:
        of_seed = {seed: audit["verdicts"][rule] for seed, audit in seeds.items()}
        gravest = min(of_seed, key=lambda seed: severity(of_seed[seed][0]))
        verdicts[rule] = [of_seed[gravest][0], f"seed {gravest}: {of_seed[gravest][1]}"]
    declared = sorted(int(seed) for seed in filter(None, runs[0].result["overrides"].get("SEEDS_DECLARED", "").split(",")))
    if declared and verdicts["R10"][0] == PASS:
        text = f"declared: {declared}, in this record: {sorted(seeds)}"
        verdicts["R10"] = list(finding(declared == sorted(seeds), text))
    return {"audit": {"modes": sorted({audit["mode"] for audit in seeds.values()}), "verdicts": verdicts,
                      "ledgers": {str(seed): audit["last_hash"] for seed, audit in seeds.items()}}}


def verdict_of(runs: list[Run], rule: str) -> tuple[str, bool | None]:
    """Evidence, and whether the rule holds, for all seeds."""
    block = judgement(runs).get("audit")
    if block is None:
        return "not in the logs; tests of the script", None
    verdict, evidence = block["verdicts"][rule]
    return evidence, {"PASS": True, "FAIL": False}.get(verdict)


def audit(runs: list[Run]) -> list[tuple[str, str, str, bool | None]]:
    """(rule, what it asks, what was measured, verdict); the verdict is None where logs and files cannot tell."""
    results = [run.result for run in runs]
    size = max(r["bytes_total"] for r in results)
    train = max(r["train_seconds"] + r["calib_seconds"] for r in results)
    evaluation = max(r["eval_seconds"] for r in results)
    every_target = all(r["target_tokens"] == r["val_tokens"] for r in results)
    docs, all_docs = results[0]["docs_val"], results[0]["data"]["docs_val"]
    every_doc = None if None in (docs, all_docs) else docs == all_docs
    world, hardware = results[0]["world_size"], results[0]["hardware"]
    manifest = results[0]["data"]["manifest_sha256"]
    return [
        ("artifact_under_16mb", f"model + code <= {CAP_BYTES:,} bytes", f"{size:,}", size <= CAP_BYTES),
        ("train_under_600s_strict", f"training + calibration <= {BUDGET_SECONDS} s", f"{train:.1f}", train <= BUDGET_SECONDS),
        ("eval_under_600s", f"scored evaluation <= {BUDGET_SECONDS} s", f"{evaluation:.1f}", evaluation <= BUDGET_SECONDS),
        ("three_seeds", "at least 3 seeds", str(len(runs)), len(runs) >= 3),
        ("val_tokens_equal_target_tokens", "every validation target scored once", f"{results[0]['target_tokens']:,} of "
         f"{results[0]['val_tokens']:,}", every_target),
        ("full_validation_targets", "every validation document scored", f"{cell(docs)} of {cell(all_docs)}",
         every_target and every_doc),
        ("data_manifest_known", "the data is named by a manifest", (manifest or "none")[:12], manifest is not None),
        ("official_hardware", "8 H100", hardware, world == 8 and "H100" in hardware),
        ("score_before_update", "a token is scored before it is learned from", *verdict_of(runs, "R7")),
        ("no_validation_training_leak", "no validation document in the training data", *verdict_of(runs, "R3")),
    ]


# -- README, run.sh and plots -----------------------------------------------------------------------------------------

def cell(value: float | None, decimals: int = 0) -> str:
    return "-" if value is None else f"{value:,.{decimals}f}"


def mean_std(mean: float, std: float | None) -> str:
    return f"{mean:.5f}" + ("" if std is None else f" ± {std:.5f}")


def run_script(run: Run) -> str:
    """run.sh: the environment of the runs, and the seed."""
    settings = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in run.settings.items())
    ranks = run.result["world_size"]
    launch = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    return f'#!/usr/bin/env bash\nset -euo pipefail\n{settings}SEED=$1 {launch} "$(dirname "$0")/train_gpt.py"\n'


def stage_tables(submission: dict) -> str:
    rows = [[seed, cell(r["steps"]), cell(r["step_avg_ms"], 1), cell(r["pre_quant_val_bpb"], 8),
             cell(r["quantized_val_bpb"], 8), cell(r["post_ttt_val_bpb"], 8), f"**{r['val_bpb']:.8f}**",
             cell(r["val_loss"], 8), cell(r["eval_s"], 1), cell(r["artifact_bytes"])]
            for seed, r in submission["seed_results"].items()]
    rows.append(["mean", cell(submission["train_steps_mean"]), cell(submission["step_avg_ms_mean"], 1), "", "", "",
                 f"**{mean_std(submission['val_bpb'], submission['val_bpb_std'])}**",
                 mean_std(submission["val_loss"], submission["val_loss_std"]), cell(submission["eval_time_s_mean"], 1),
                 cell(submission["artifact_bytes_mean"])])
    return table(["seed", "steps", "ms/step", "pre-quant bpb", "quantized bpb", "TTT bpb", "scored bpb", "val_loss (nats)",
                  "eval s", "bytes"], rows)


def size_table(submission: dict, runs: list[Run]) -> str:
    """The parts of the first seed's artifact, whatever the container adds to them, and the code."""
    result = runs[0].result
    parts = sorted(result["bytes_by_part"].items(), key=lambda part: (-part[1], part[0]))
    container = result["artifact_bytes"] - sum(size for _, size in parts)
    parts += [("container", container)] * (container != 0) + [("code (train_gpt.py)", result["code_bytes"])]
    total = result["bytes_total"]
    rows = [[name, cell(size), f"{100 * size / total:.2f} %"] for name, size in [*parts, ("total", total)] if size]
    rows.append(["left under the cap", cell(CAP_BYTES - total), ""])
    return table([f"part (seed {result['seed']})", "bytes", "share"], rows)


def phase_table(runs: list[Run]) -> str:
    rows, seeds = {}, [run.result["seed"] for run in runs]
    for run in runs:
        for phase in run.result["phases"]:
            seconds, peaks = rows.setdefault(phase["name"], ({}, []))
            seconds[run.result["seed"]] = seconds.get(run.result["seed"], 0.0) + phase["seconds"]
            peaks.append(phase["peak_mib"])
    peak = {name: max((p for p in peaks if p is not None), default=None) for name, (_, peaks) in rows.items()}
    body = [[name, *(cell(seconds.get(s), 1) for s in seeds), cell(peak[name])] for name, (seconds, _) in rows.items()]
    body.append(["whole run", *(cell(run.result["wall_seconds"], 1) for run in runs),
                 cell(max(run.result["peak_mem_mib"] or 0 for run in runs))])
    return table(["phase", *(f"seed {s}, s" for s in seeds), "peak MiB"], body)


def render_readme(submission: dict, runs: list[Run]) -> str:
    s, result, rules = submission, runs[0].result, audit(runs)
    here = f"records/*/{s['date']}_{s['name']}"
    words = {True: "yes", False: "**no**", None: "not computed"}
    caveats = [f"- {asks}: {'no' if verdict is False else 'not computed'} ({measured})."
               for _, asks, measured, verdict in rules if not verdict]
    caveats += [f"- Data: {s['data']['note']}"] * bool(s["data"]["note"])
    caveats += [f"- {name} ({size:,} bytes) is in this folder and not in the counted size."
                for name, size in s["bytes_uncounted"].items()]
    judged = table(["rule", "verdict", "evidence"], [[rule, *v] for rule, v in s.get("audit", {"verdicts": {}})["verdicts"].items()], ":--")
    settings = table(["environment variable", "value"], [[f"`{k}`", f"`{v}`"] for k, v in s["overrides"].items()], ":--")
    data = {key: value if isinstance(value, str) else cell(value) for key, value in s["data"].items() if key != "note"}
    data |= {"val_tokens": cell(result["val_tokens"]), "target_tokens": cell(result["target_tokens"]),
             "val_bytes": cell(result["val_bytes"]), "docs scored": cell(result["docs_val"])}
    versions = f"Python {s['python_version']}, torch {s['torch_version']}, triton {s['triton_version'] or 'absent'}"
    return "\n\n".join([
        f"# {s['name']}: val_bpb {mean_std(s['val_bpb'], s['val_bpb_std'])}",
        s["blurb"],
        f"{s['date']}, track {s['track']}, {len(runs)} seed(s), {s['model_params']:,} parameters, "
        f"{s['bytes_total']:,} bytes, {s['hardware']}, {versions}. Standard deviations are of the sample.",
        "## Results", stage_tables(s), "![bits per byte by stage](bpb_by_stage.png)",
        "![training loss](loss_over_time.png)",
        "## How to reproduce", "From the folder that holds `data/`, the root of the repository:",
        f"```bash\npip install -r {here}/requirements.txt\n"
        + "\n".join(f"bash {here}/run.sh {seed}" for seed in s["seeds"]) + "\n```",
        "`train_gpt.py` is the packed script that ran; `train_gpt_readable.py` is the same program to read.",
        "## Settings changed", settings if s["overrides"] else "None: the script's defaults.",
        "## Coverage", table(["data", "value"], [[key, value] for key, value in data.items()], ":--"),
        "## Size", size_table(s, runs), "## Time and memory", phase_table(runs),
        "## Compliance", table(["rule", "measured", "holds"], [[asks, m, words[v]] for _, asks, m, v in rules], ":--"),
        *["## Audit", "What the audits of the runs found, the gravest of all seeds; tools/validity.md says what each rule asks.",
          judged][: 3 * ("audit" in s)],
        "## Caveats", "\n".join(caveats) or "None of the rules above fails.",
    ]) + "\n"


def draw_plots(folder: Path, name: str, runs: list[Run]) -> None:
    loss = {f"seed {run.result['seed']}": run.loss_curve for run in runs}
    stages = {f"seed {run.result['seed']}": [(words, run.result[f"{stage}_val_bpb"]) for stage, words in
              zip(STAGES, ("pre-quant", "quantized", "TTT"), strict=True) if run.result[f"{stage}_val_bpb"] is not None]
              for run in runs}
    plot(folder / "loss_over_time.png", loss, "-", title=name, xlabel="training seconds", ylabel="loss (nats per token)")
    plot(folder / "bpb_by_stage.png", stages, "o-", title=name, ylabel="bits per byte")


def plot(path: Path, curves: dict[str, list[tuple]], style: str, **labels: str) -> None:
    from matplotlib.figure import Figure  # here, because checking a folder draws nothing

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, linewidth=1)
    axes.set(**labels)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


# -- NEW --------------------------------------------------------------------------------------------------------------

def new(args: argparse.Namespace) -> int:
    target = args.records_dir / args.track / f"{args.date}_{args.name}"
    datetime.date.fromisoformat(args.date)
    if target.exists():
        raise Broken(f"{target} exists already")
    loaded = [load_run(folder) for folder in args.run_dirs]
    check_same_experiment([run for run, _ in loaded])
    for folder, (run, _) in zip(args.run_dirs, loaded, strict=True):
        if "ledger" in run.result:
            show_audit(folder, args)
    places = {f"{name}={value}" for run, _ in loaded for name, value in run.result["overrides"].items() if Path(value).is_absolute()}
    if places:
        print("warning: logs and ledgers are handed in as they are, and these say where files lie on this machine: "
              f"{', '.join(sorted(places))}; runs with relative paths do not", file=sys.stderr)
    code = args.script.read_bytes() if args.script else pack_code.pack(args.readable.read_text())
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        (draft / "train_gpt.py").write_bytes(code)
        shutil.copyfile(args.readable, draft / "train_gpt_readable.py")
        fill(draft, loaded, args)
        failures = [line for passed, line in run_checks(draft, args.allow_over_cap) if not passed]
        if failures:
            raise Broken("no record made, because it would not pass: " + "; ".join(failures))
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft)
        raise
    print(target)
    return 0


def show_audit(folder: Path, args: argparse.Namespace) -> None:
    """Print the verdicts on a run, judging it first where nobody has: audit.json stands beside it then. Raises Broken."""
    script = args.script
    if script is None and sha256(args.readable.read_bytes()) == json.loads((folder / "result.json").read_text())["code_sha256"]:
        script = args.readable
    audit = stored_audit(folder) or judge(folder, script, args.data)
    print(f"{folder}:", *verdict_lines(audit["verdicts"]), sep="\n", file=sys.stderr)


def fill(folder: Path, loaded: list[tuple[Run, Path]], args: argparse.Namespace) -> None:
    root = args.readable.parent
    helpers = [root / name for name in ("lossless_caps.py", "prepare_caseops_data.py", "requirements.txt")]
    for file in [*(h for h in helpers if h.exists()), *args.include]:
        shutil.copyfile(file, folder / file.name)
    runs = []
    for index, (run, artifact) in enumerate(loaded):
        seed = run.result["seed"]
        shutil.copyfile(run.log, folder / f"train_seed{seed}.log")
        runs.append(read_log(folder / f"train_seed{seed}.log"))
        kept = ["ledger.jsonl", "audit.json", *(f"token_nats_{stage}.npy" for stage in STAGES if stage != "pre_quant")]
        for source, name in ((run.log.parent / file, f"{Path(file).stem}_seed{seed}{Path(file).suffix}") for file in kept):
            if run.audit and source.exists() and (source.suffix != ".npy" or source.stat().st_size <= TOKEN_NATS_BYTES):
                shutil.copyfile(source, folder / name)
        if index == 0 or args.artifacts == "all":
            shutil.copyfile(artifact, folder / f"artifact_seed{seed}{''.join(artifact.suffixes)}")
    typed = {**{key: getattr(args, key) for key in TYPED_BY_HAND}, "data": {"note": args.data_note}}
    typed |= {"track": args.track.removeprefix("track_"), "blurb": args.blurb or args.name}
    (folder / "run.sh").write_text(run_script(runs[0]))
    draw_plots(folder, args.name, runs)
    submission = summarise(runs, inventory(folder), typed)
    (folder / "submission.json").write_text(json.dumps(submission, indent=2) + "\n")
    notes = "\n## Notes\n\n" + args.notes.read_text() if args.notes else ""
    (folder / "README.md").write_text(render_readme(submission, runs) + notes)


# -- VALIDATE ---------------------------------------------------------------------------------------------------------

class Record:
    """A record folder as the checks see it. A part that cannot be read raises in every check that needs it."""

    def __init__(self, folder: Path, allow_over_cap: bool):
        self.folder, self.allow_over_cap = folder, allow_over_cap

    @functools.cached_property
    def submission(self) -> dict:
        return parse_json((self.folder / "submission.json").read_text())

    @functools.cached_property
    def runs(self) -> list[Run]:
        return [read_log(self.folder / f"train_seed{seed}.log") for seed in self.submission["seeds"]]


def check_submission(record: Record) -> str:
    return f"fits the schema, {len(record.submission)} fields"


def check_logs(record: Record) -> str:
    check_same_experiment(record.runs)
    for log in record.folder.glob("train_seed*.log"):
        if log.name not in [run.log.name for run in record.runs]:
            raise Broken(f"{log.name} is not among the seeds of submission.json")
    return f"{len(record.runs)} result line(s) agree with their logs and with arithmetic"


def check_ledgers(record: Record) -> str:
    kept = [run for run in record.runs if "audit" in run.result or "ledger" in run.result]
    for run in kept:
        check_ledger(record.folder / f"ledger_seed{run.result['seed']}.jsonl", run.result)
    return f"{len(kept)} of {len(record.runs)} runs have one, whole and of that run"


def check_numbers(record: Record) -> str:
    expected = summarise(record.runs, inventory(record.folder), record.submission)
    if problems := list(differences(expected, record.submission)):
        raise Broken("; ".join(problems))
    return "every field of submission.json follows from the logs and files"


def differences(expected, found, path: str = "submission.json"):
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            yield from differences(expected.get(key, "nothing"), found.get(key, "nothing"), f"{path}: {key}")
    elif expected != found:
        yield f"{path} is {found!r}, logs and files give {expected!r}"


def check_scripts(record: Record) -> str:
    code = (record.folder / "train_gpt.py").read_bytes()
    for run in record.runs:
        if (sha256(code), len(code)) != (run.result["code_sha256"], run.result["code_bytes"]):
            raise Broken(f"train_gpt.py is not the script that seed {run.result['seed']} ran")
    readable = (record.folder / "train_gpt_readable.py").read_text()
    if pack_code.pack(readable, pack_code.dropped_parts(code), pack_code.is_base85(code)) != code:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("python-minifier", "brotli"))
        raise Broken(f"train_gpt_readable.py does not pack to train_gpt.py (with {versions})")
    return f"train_gpt.py is the script that ran, {len(code):,} bytes, and its readable twin packs to it"


def check_artifacts(record: Record) -> str:
    checked = []
    for run in record.runs:
        for artifact in record.folder.glob(f"artifact_seed{run.result['seed']}.*"):
            check_artifact(artifact, run.result)
            checked.append(artifact.name)
    if not checked:
        raise Broken("there is no artifact_seed file")
    return ", ".join(checked)


def check_cap(record: Record) -> str:
    code = (record.folder / "train_gpt.py").stat().st_size
    size = max(run.result["artifact_bytes"] for run in record.runs) + code
    if size > CAP_BYTES and not record.allow_over_cap:
        raise Broken(f"{size:,} bytes are over the cap of {CAP_BYTES:,} (--allow-over-cap accepts that)")
    return f"{size:,} of {CAP_BYTES:,} bytes" + " (over, as allowed)" * (size > CAP_BYTES)


def check_run_sh(record: Record) -> str:
    if (record.folder / "run.sh").read_text() != run_script(record.runs[0]):
        raise Broken("run.sh does not set exactly the overrides of the runs")
    return "sets exactly the overrides of the runs"


def check_readme(record: Record) -> str:
    """The title and all tables; the prose may be edited."""
    lines = (record.folder / "README.md").read_text().splitlines()
    for line in render_readme(record.submission, record.runs).splitlines():
        if line.startswith(("# ", "| ")) and line not in lines:
            raise Broken(f"README.md lacks the line: {line}")
    return "title and tables show the numbers of submission.json"


def check_help(record: Record) -> str:
    packed, readable = ((record.folder / name).read_bytes() for name in ("train_gpt.py", "train_gpt_readable.py"))
    pack_code.check_help(packed, readable, record.folder / "train_gpt.py")
    return "train_gpt.py --help runs and prints what the readable twin prints"


CHECKS = {"submission.json": check_submission, "logs": check_logs, "ledgers": check_ledgers, "numbers": check_numbers,
          "scripts": check_scripts, "artifacts": check_artifacts, "cap": check_cap, "run.sh": check_run_sh, "README.md": check_readme,
          "smoke": check_help}


def run_checks(folder: Path, allow_over_cap: bool) -> list[tuple[bool, str]]:
    record, outcome = Record(folder, allow_over_cap), []
    for name, check in CHECKS.items():
        try:
            outcome.append((True, f"{name}: {check(record)}"))
        except Exception as error:  # a broken folder may fail in any way, and every way is a finding
            outcome.append((False, f"{name}: {' '.join(str(error).split()) or type(error).__name__}"))
    return outcome


def validate(args: argparse.Namespace) -> int:
    outcome = run_checks(args.folder, args.allow_over_cap)
    for passed, line in outcome:
        print(f"[{'PASS' if passed else 'FAIL'}] {line}")
    return int(not all(passed for passed, _ in outcome))


# -- INDEX ------------------------------------------------------------------------------------------------------------

INDEX = re.compile(r"(<!-- index: begin -->\n).*(<!-- index: end -->)", re.S)


def render_index(records_dir: Path) -> str:
    """The history table: one row per record, the newest first."""
    rows = []
    for path in records_dir.glob("*/[!.]*/submission.json"):
        try:
            s = parse_json(path.read_text())
        except ValueError as error:
            raise Broken(f"{path}: {error}") from error
        rows.append([s["date"], s["track"], s["name"], mean_std(s["val_bpb"], s["val_bpb_std"]), str(len(s["seeds"])),
                     cell(s["bytes_total"]), s["hardware"],
                     f"[folder]({path.parent.relative_to(records_dir).as_posix()})"])
    if not rows:
        return "No record has been made yet."
    return table(["date", "track", "name", "bpb", "seeds", "bytes", "hardware", "link"], sorted(rows, reverse=True), ":--")


def render_front(records_dir: Path) -> str:
    """Render the table of the front page: what was reached, with how many bytes and seeds, on what."""
    rows = []
    for path in records_dir.glob("*/[!.]*/submission.json"):
        s = parse_json(path.read_text())
        link = f"[{s['name']}]({path.parent.relative_to(records_dir.parent).as_posix()}), {s['track']}"
        bpb = mean_std(s["val_bpb"], s["val_bpb_std"])
        row = [link, bpb, cell(s["bytes_total"]), str(len(s["seeds"])), s["hardware"]]
        rows.append((s["date"], s["track"], row))
    head = ["record", "bits per byte", "bytes", "seeds", "hardware"]
    return table(head, [row for *_, row in sorted(rows, reverse=True)], ":--")


def rewrite_block(page: Path, text: str) -> None:
    """Put a text between the index markers of a page. Raises Broken where there are none."""
    old = page.read_text()
    if not INDEX.search(old):
        raise Broken(f"{page} has no index markers")
    pack_code.write_atomically(page, INDEX.sub(lambda m: f"{m[1]}{text}\n{m[2]}", old).encode())


def index(args: argparse.Namespace) -> int:
    """Rewrite the table of all records, and that of the front page beside the records folder, if it has one."""
    rewrite_block(args.records_dir / "README.md", render_index(args.records_dir))
    front = args.records_dir.parent / "README.md"
    if front.exists() and INDEX.search(front.read_text()):
        rewrite_block(front, render_front(args.records_dir))
    return 0


# -- MAIN -------------------------------------------------------------------------------------------------------------

def file_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain folder name")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("new", help="write a record folder from run directories, one per seed")
    make.set_defaults(command=new)
    make.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    make.add_argument("--track", required=True, type=file_name, help="folder under the records directory")
    make.add_argument("--name", required=True, type=file_name, help="what is new, in two words")
    make.add_argument("--records-dir", type=Path, default=Path("records"))
    make.add_argument("--script", type=Path, help="the packed script that ran (default: pack --readable again)")
    make.add_argument("--readable", type=Path, default=Path("train_gpt.py"))
    make.add_argument("--data", type=Path, help="data of the runs, to judge them (default: their own DATA_PATH)")
    make.add_argument("--author", default="anonymous")
    make.add_argument("--github-id", default="anonymous")
    make.add_argument("--blurb", help="the claim in one sentence (default: the name)")
    make.add_argument("--date", default=datetime.date.today().isoformat(), metavar="YYYY-MM-DD")
    make.add_argument("--data-note", default="", help="what the data is, where it is not the official set")
    make.add_argument("--include", nargs="+", type=Path, default=[], metavar="FILE", help="more files for the folder")
    make.add_argument("--notes", type=Path, metavar="FILE.md", help="prose to append to the README")
    make.add_argument("--artifacts", choices=["first", "all"], default="first", help="whose model files to keep")
    make.add_argument("--allow-over-cap", action="store_true", help="record a run that is too large, as too large")
    check = commands.add_parser("validate", help="compute everything in a record folder again")
    check.set_defaults(command=validate)
    check.add_argument("folder", type=Path)
    check.add_argument("--allow-over-cap", action="store_true")
    history = commands.add_parser("index", help="rewrite the tables in the README.md of the records and beside them")
    history.set_defaults(command=index)
    history.add_argument("--records-dir", type=Path, default=Path("records"))
    args = parser.parse_args(argv)
    try:
        return args.command(args)
    except (ValueError, OSError) as error:  # includes Broken, and files that cannot be read or decoded
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
