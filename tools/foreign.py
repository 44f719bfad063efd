"""What others hand in: a submission.json under any of its names, and the logs of the contest's family of trainers."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ledger import RESULT_LINE
from record import EARLY_STOP, STAGES, TOTAL_EVAL_TIME
from rules import Broken

NAMES = {  # one quantity and what public submissions call it
    "val_bpb": ("val_bpb", "mean_val_bpb", "val_bpb_mean", "val_bpb_exact"),
    "val_loss": ("val_loss", "mean_val_loss", "val_loss_mean"),
    "val_bpb_std": ("val_bpb_std", "std_val_bpb", "bpb_std"),
    "val_loss_std": ("val_loss_std", "std_val_loss"),
    "bytes_total": ("bytes_total", "artifact_bytes_max", "artifact_bytes", "artifact_size_bytes"),
    "target_tokens": ("target_tokens", "val_tokens"),
}


def named(table: dict, quantity: str):
    """The number that `table` holds under one of the quantity's names, or None."""
    values = (table.get(name) for name in NAMES.get(quantity, (quantity,)))
    return next((v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)), None)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Broken(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise Broken(f"{path} holds no JSON object")
    return value


def seed_tables(table: dict) -> dict[str, dict]:
    """Seed -> its numbers, from a submission.json (of one or several runs) or a result.json."""
    rows = table.get("seed_results") or table.get("per_seed") or {}
    if isinstance(rows, list):
        rows = {str(row.get("seed", f"#{i}")): row for i, row in enumerate(rows, 1) if isinstance(row, dict)}
    rows = {str(seed).removeprefix("seed_").removeprefix("seed"): row if isinstance(row, dict) else {"val_bpb": row}
            for seed, row in rows.items()}
    if rows := {seed: row for seed, row in rows.items() if named(row, "val_bpb") is not None}:
        return rows
    seeds = table.get("seeds") if isinstance(table.get("seeds"), list) else [table.get("seed", "#1")]
    return {str(seeds[0]): table} if len(seeds) == 1 and named(table, "val_bpb") is not None else {}


# -- LOGS --------------------------------------------------------------------------------------------------------------

SCORED = re.compile(r"^(\S.*?),? val_loss: ?(\d+\.\d+),? val_bpb: ?(\d+\.\d+)(.*)$", re.M)
NUMBERS = {  # what a log prints; the last match counts
    "train_shards": r"\btrain_shards: ?(\d+)",
    "val_tokens": r"^(?:val_tokens: ?|val_loader:.*\btokens:)(\d+)",
    "target_tokens": r"\btarget_tokens:(\d+)",
    "subset": r"\bsubset=(\d+)",
    "train_ms": r"\btrain_time:(\d+)ms",
    "calib_s": r"^GPTQ:collected \d+ Hessians in ([\d.]+)s",
    "reserve_s": r"^gptq:reserving ([\d.]+)s",
    "artifact_bytes": r"^Serialized model (?:quantized|int)\S*: (\d+) bytes",
    "code_minified": r"^Code size \(compressed\): (\d+) bytes",
    "bytes_total": r"^Total submission size \S*: (\d+) bytes",
}


def without_source(text: str) -> str:
    """The log without the program that it quotes, at its top or between rules of '=': code that did not run is no evidence."""
    rules = [m for m in re.finditer(r"^=+\n", text, re.M) if len(m[0]) > 20]
    if not rules:
        return text
    from_the_top = re.match(r'\s*(?:"""|#|import |from )', text)
    return text[: 0 if from_the_top else rules[0].start()] + text[rules[-1].end() :]


@dataclass(frozen=True)
class Log:
    """One training log, ours or foreign. Numbers that it does not print are None."""

    path: Path
    text: str  # without the quoted program

    @staticmethod
    def read(path: Path) -> "Log":
        return Log(path, without_source(path.read_text(errors="replace")))

    @cached_property
    def result(self) -> dict:
        """Our result line, or {}."""
        lines = RESULT_LINE.findall(self.text)
        return json.loads(lines[-1]) if lines else {}

    @cached_property
    def knobs(self) -> dict[str, str]:
        """The dump of the configuration, lower case names."""
        block = re.search(r"^Hyperparameters:\n((?:  .*\n)+)", self.text, re.M)
        return dict(re.findall(r"^  (\w+): (.*)$", block[1], re.M)) if block else {}

    def number(self, name: str) -> float | None:
        found = re.findall(NUMBERS[name], self.text, re.M)
        return float(found[-1]) if found else None

    @property
    def seed(self) -> str:
        in_name = re.search(r"seed_?(\d+)", self.path.name)
        return self.knobs.get("seed") or (in_name[1] if in_name else self.path.stem)

    @cached_property
    def scores(self) -> dict[str, tuple[float, float]]:
        """Stage -> nats and bits per byte, in the order of the log; training's own checks are left out."""
        found = ((stage, loss, bpb) for stage, loss, bpb, _ in SCORED.findall(self.text) if not re.match(r"(step:)?\d+/", stage))
        return {stage: (float(loss), float(bpb)) for stage, loss, bpb in found}

    @cached_property
    def rounding(self) -> float:
        """The largest relative error that the printed decimals of a score can have."""
        values = [value for _, loss, bpb, _ in SCORED.findall(self.text) for value in (loss, bpb) if float(value) > 0]
        return max((0.5 * 10 ** -len(value.partition(".")[2]) / float(value) for value in values), default=0.0)

    @property
    def final(self) -> tuple[float, float] | None:
        ttt = self.scores.get(STAGES["ttt"])
        return ttt or (list(self.scores.values())[-1] if self.scores else None)

    @property
    def train_seconds(self) -> float | None:
        stop = EARLY_STOP.findall(self.text)
        milliseconds = float(stop[-1][0]) if stop else self.number("train_ms")
        return self.result.get("train_seconds") or (milliseconds and milliseconds / 1000)

    @property
    def eval_seconds(self) -> float | None:
        total = TOTAL_EVAL_TIME.findall(self.text)
        times = re.findall(r"\beval_time: ?(\d+)ms", self.text)
        return self.result.get("eval_seconds") or (float(total[-1]) if total else float(times[-1]) / 1000 if times else None)


def read_logs(folder: Path) -> list[Log]:
    """Every log of a record folder that carries a score."""
    return [log for path in sorted(folder.glob("*.log")) + sorted(folder.glob("*.txt")) if (log := Log.read(path)).scores]
