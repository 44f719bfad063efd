"""Rate and distortion: every way to quantize and code, on the same trained checkpoints.

    python bench/rate_distortion.py logs/SEED1 logs/SEED2 ... --out bench/results/rd      # rd.jsonl and rd.png
    python bench/rate_distortion.py logs/SEED1 --methods s14+brotli,s05 --docs 0.25
    python bench/rate_distortion.py --keep --out bench/results/rd                         # table and picture of the points there are

A checkpoint is the folder of a run (result.json, final_model.pt); seeds of one configuration. Each point is quantized, packed,
read back and compared, and what was read back is scored without test-time training. One JSON line a point, then a table (Markdown)
and the picture: bytes of the artifact against bits per byte, and against what quantization costs. Hessians are collected once a seed.
A method that this script or machine lacks is skipped, with the reason. --keep: points already in the file are not done again.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tools")]
from size import run_result

import train_gpt as tg

S14_CLIPS = dict(MLP_CLIP_SIGMAS=11.5, ATTN_CLIP_SIGMAS=13.0, EMBED_CLIP_SIGMAS=14.0)
S05 = dict(QUANT="s05", AWQ_LITE_ENABLED=0, LQER_ENABLED=0, COMPRESSOR="brotli", TARGET_BYTES=0)


def s14(compressor: str) -> list[dict]:
    """S14 with its clips, and with all of them times a factor: coarser steps, fewer bytes."""
    return [dict(QUANT="s14", COMPRESSOR=compressor) | {name: round(f * clip, 3) for name, clip in S14_CLIPS.items()}
            for f in (1.0, 0.8, 1.4, 2.0, 3.0)]


METHODS = {  # method: the variables of its points; TARGET_BYTES in percent of the seed's first s14 point
    "s14+brotli": s14("brotli"),
    "s14+pergroup": s14("pergroup"),
    "s14+range": s14("range"),
    "s05": [S05 | dict(N_INT6_LAYERS=n) for n in (10, 0, 20, 999)],
    "s05+range": [S05 | dict(N_INT6_LAYERS=n, COMPRESSOR="range") for n in (10, 0, 20, 999)],
    "s05 pruned": [S05 | dict(N_INT6_LAYERS=n, TARGET_BYTES=t) for n, t in ((999, "100%"), (10, "90%"), (10, "80%"))],
    "rd": [dict(QUANT="rd", COMPRESSOR="range", RD_LOSS=1e-6, TARGET_BYTES=t) for t in ("100%", "85%", "70%", "55%", "115%")],
}
COLOURS = dict(zip(METHODS, ("#9aa1ab", "#4a8fbd", "#2f6690", "#e0a35c", "#d9822b", "#b04a2f", "#7a5195"), strict=True))
STANDARD = "s14+brotli"  # what the others are compared with, at its first point


class Checkpoint:
    """One trained seed: weights, data, and what has to be computed once for it."""

    def __init__(self, folder: Path, docs: float):
        result = run_result(folder)
        if not result:
            raise tg.RunError(f"{folder} has no result.json: train first, with STAGE=train or all")
        drop = ("STAGE", "ARTIFACT_DIR", "RUN_ID", "RESUME")
        self.env = {k: v for k, v in result["overrides"].items() if k not in drop} | dict(VAL_DOC_FRACTION=str(docs), DEVICE="cpu")
        self.cfg, self.seed = tg.config_from_env(self.env), result["seed"]
        self.world = tg.World(0, 1, torch.device("cpu"), torch.float32)
        self.files = tg.Dataset.open(self.cfg, need_train=True)
        self.data = tg.ValData.load(self.cfg, self.files)
        self.model = tg.load_checkpoint_model(self.cfg, self.world, folder / "final_model.pt")
        self.state = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.hessians, self.stored, self.scores = {}, {}, {}
        self.before, self.standard_bytes = self.score(self.state), 0

    def score(self, state: dict) -> tg.Score:
        """Score of these weights; equal weights are scored once."""
        digest = hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in state.values())).digest()
        if digest not in self.scores:
            self.model.load_state_dict(state)
            self.scores[digest] = tg.evaluate(self.cfg, self.world, self.model, tg.Scorer(self.data, self.world))
        return self.scores[digest]

    def calibration(self, cfg: tg.Config) -> tg.Hessians:
        key = cfg.gptq_calibration, cfg.gptq_calibration_batches, cfg.quant == "rd"  # which wants gradients as well
        if key not in self.hessians:
            self.model.load_state_dict(self.state)
            self.hessians[key] = tg.collect_hessians(cfg, self.world, self.model, self.files, lambda line: None)
        return self.hessians[key]

    def squeeze(self, cfg: tg.Config, variables: dict) -> tuple[dict[str, tg.QuantizedTensor], bytes, float, float]:
        """Tensors and artifact, and the seconds for either; settings that differ in the coder or the target alone share the former.
        The search of QUANT=rd has packing inside: its seconds are for all of that, and for the last pack again."""
        hessians, start = self.calibration(cfg), time.perf_counter()
        if cfg.quant == "rd":
            (stored, _), searched = tg.quantize_to_fit(cfg, self.state, hessians, 0, lambda line: None), time.perf_counter()
            return stored, tg.pack(cfg, stored), searched - start, time.perf_counter() - searched
        key = json.dumps({k: v for k, v in variables.items() if k not in ("COMPRESSOR", "TARGET_BYTES")})
        if key not in self.stored:
            self.stored[key] = tg.quantize(cfg, self.state, hessians, lambda line: None), time.perf_counter() - start
        stored, seconds = self.stored[key]
        start = time.perf_counter()
        if cfg.quant == "s05":
            stored, blob = tg.prune_to_fit(cfg, stored, 0, lambda line: None)
        else:
            blob = tg.pack(cfg, stored)
        return stored, blob, seconds, time.perf_counter() - start

    def point(self, method: str, variables: dict) -> dict:
        """One configuration: quantize, pack, write nothing, unpack, compare, score."""
        given = {k: str(round(float(v[:-1]) / 100 * self.standard_bytes) if str(v).endswith("%") else v) for k, v in variables.items()}
        cfg = tg.config_from_env(self.env | given)
        stored, blob, quantize_seconds, encode_seconds = self.squeeze(cfg, variables)
        start = time.perf_counter()
        state = tg.dequantized_state(cfg, tg.unpack(cfg, blob))
        decode_seconds = time.perf_counter() - start
        if broken := [name for name, t in tg.dequantized_state(cfg, stored).items() if not torch.equal(t, state[name])]:
            raise tg.RunError(f"{method} {given}: {', '.join(broken)} do not survive packing")
        self.standard_bytes, score = self.standard_bytes or len(blob), self.score(state)
        return dict(method=method, seed=self.seed, variables=variables, bytes=len(blob),
                    bits_per_weight=8 * len(blob) / sum(t.numel() for t in state.values()), error=self.error(cfg, stored),
                    val_bpb_before=self.before.bpb, val_bpb=score.bpb, loss_rise=score.loss - self.before.loss,
                    quantize_seconds=round(quantize_seconds, 2), encode_seconds=round(encode_seconds, 2),
                    decode_seconds=round(decode_seconds, 2))

    def error(self, cfg: tg.Config, stored: dict[str, tg.QuantizedTensor]) -> float:
        """tr(E H E^T) / tr(W H W^T), the share of the output's energy that is error: mean over the matrices. Every method with one H."""
        shares, cfg = [], dataclasses.replace(cfg, quant="s14")
        for task in tg.gptq_inputs(cfg, tg.unbank(cfg, self.state)):
            H, E = self.calibration(cfg).H[task.site], task.W - stored[task.name].decode()
            shares.append(float(((E @ H) * E).sum() / ((task.W @ H) * task.W).sum()))
        return float(np.mean(shares))


def unavailable(checkpoint: Checkpoint, method: str) -> str:
    """Why a method cannot run here; blank if it can."""
    try:
        cfg = tg.config_from_env(checkpoint.env | {k: str(v).rstrip("%") for k, v in METHODS[method][0].items()})
        tg.require_coders(cfg.compressor)
    except (ValueError, tg.RunError) as e:
        return str(e).splitlines()[0]
    return ""


def means(points: list[dict]) -> dict[str, list[dict]]:
    """By method, each of its points averaged over the seeds, in the order of their bytes. rd: at those bytes, the loss that QUANT=rd
    costs as a share of what this point costs, smallest and largest over the seeds; blank where a seed's rd points do not reach."""
    groups, curves, out = defaultdict(list), defaultdict(list), defaultdict(list)
    for p in points:
        groups[p["method"], json.dumps(p["variables"])].append(p)
        if p["method"] == "rd":
            curves[p["seed"]].append(p)
    numbers = ("bytes", "bits_per_weight", "error", "val_bpb_before", "val_bpb", "loss_rise", "quantize_seconds", "encode_seconds",
               "decode_seconds")
    for (method, variables), group in groups.items():
        mean = {key: float(np.mean([p[key] for p in group])) for key in numbers}
        shares = [at(curves[p["seed"]], "bytes", "loss_rise", p["bytes"]) / p["loss_rise"] for p in group] if method != "rd" else [math.nan]
        out[method].append(mean | dict(variables=json.loads(variables), seeds=len(group), rd=(float(np.min(shares)), float(np.max(shares))),
                                       spread=float(np.std([p["loss_rise"] for p in group]))))
    return {method: sorted(rows, key=lambda r: r["bytes"]) for method, rows in out.items()}


def at(rows: list[dict], x: str, y: str, value: float) -> float:
    """y of a curve where x has this value, linear in their logarithms between points; NaN outside the curve."""
    pairs = sorted((r[x], r[y]) for r in rows if r[x] > 0 and r[y] > 0)
    if len(pairs) < 2 or not pairs[0][0] <= value <= pairs[-1][0]:
        return math.nan
    return float(np.exp(np.interp(np.log(value), *np.log(np.array(pairs)).T)))


def setting(variables: dict) -> str:
    """What tells a point from the others of its method."""
    if "MLP_CLIP_SIGMAS" in variables:
        return f"clips times {variables['MLP_CLIP_SIGMAS'] / S14_CLIPS['MLP_CLIP_SIGMAS']:g}"
    return ", ".join(f"{k}={v}" for k, v in variables.items() if k == "N_INT6_LAYERS" or (k == "TARGET_BYTES" and v))


def table(curves: dict[str, list[dict]]) -> list[str]:
    """Markdown: the points, means over the seeds, then each method against the standard one."""
    heads = ("method", "setting", "bytes", "bits a weight", "error", "bpb before", "after", "loss rise, nats", "+-", "rd at these bytes",
             "quantize s", "encode s", "decode s")
    cells = []
    for method, rows in curves.items():
        for r in rows:
            low, high = (100 * share for share in r["rd"])
            cells.append((
                method, setting(r["variables"]), f"{r['bytes']:,.0f}", f"{r['bits_per_weight']:.3f}", f"{r['error']:.5f}",
                f"{r['val_bpb_before']:.5f}", f"{r['val_bpb']:.5f}", f"{r['loss_rise']:.5f}", f"{r['spread']:.5f}",
                f"{low:.0f} to {high:.0f} %" if high == high else "", f"{r['quantize_seconds']:.1f}", f"{r['encode_seconds']:.1f}",
                f"{r['decode_seconds']:.2f}"))
    wide = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(n) if i < 2 else c.rjust(n) for i, (c, n) in enumerate(zip(row, wide, strict=True))) + " |"
             for row in (heads, *cells)]
    lines.insert(1, "|" + "|".join("-" * (n + 2) if i < 2 else "-" * (n + 1) + ":" for i, n in enumerate(wide)) + "|")
    standard = next((r for r in curves.get(STANDARD, ()) if r["variables"] == METHODS[STANDARD][0]), None)
    if standard:
        told = f"{standard['bytes']:,.0f} bytes, {standard['loss_rise']:.5f} nats"
        lines += ["", f"against {STANDARD} with S14's clips ({told}), on mean curves:", ""]
        for method, rows in curves.items():
            cost, size = at(rows, "bytes", "loss_rise", standard["bytes"]), at(rows, "loss_rise", "bytes", standard["loss_rise"])
            told = (f"loss at equal bytes {100 * (cost / standard['loss_rise'] - 1):>+8.1f} %" if cost == cost else "sizes do not reach it",
                    f"bytes at equal loss {100 * (size / standard['bytes'] - 1):>+8.2f} %" if size == size else "losses do not reach it")
            lines.append(f"    {method:<14}{told[0]:<32}{told[1]}")
    return lines


def draw(points: list[dict], path: Path) -> None:
    """Score and loss of quantization over bytes: a seed a dot, the mean a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, curves = Figure(figsize=(13, 6), facecolor="white", layout="constrained"), means(points)
    left, right = figure.subplots(1, 2)
    for method, rows in curves.items():
        style = dict(color=COLOURS[method], zorder=4 if method == "rd" else 3)
        for axes, key in ((left, "val_bpb"), (right, "loss_rise")):
            own = [p for p in points if p["method"] == method]
            axes.scatter([p["bytes"] for p in own], [p[key] for p in own], s=13, alpha=0.4, linewidth=0, **style)
            axes.plot([r["bytes"] for r in rows], [r[key] for r in rows], linewidth=3 if method == "rd" else 1.7, marker="o",
                      markersize=5, markeredgecolor="white", markeredgewidth=0.8, label=method, **style)
    left.axhline(np.mean([p["val_bpb_before"] for p in points]), color="#555b65", linewidth=1.1, linestyle=(0, (1, 2)), zorder=2,
                 label="before quantization")
    left.set_title("Score of the artifact, bits per byte", loc="left", weight="bold", size=12)
    right.set_title("What quantization costs, nats per token", loc="left", weight="bold", size=12)
    if all(p["loss_rise"] > 0 for p in points):
        right.set_yscale("log")
        for which in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "125" else ""))
    for axes in (left, right):
        axes.set_xlabel("artifact without script, kB", color="#3a3f47")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(8))
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors="#3a3f47", length=0, which="both")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#b9bec6")
    left.legend(frameon=False, fontsize=10.5, labelcolor="#20242a")
    seeds = len({p["seed"] for p in points})
    figure.supxlabel(f"dots: seeds ({seeds}), lines: their means", size=9, color="#6b7280", x=0.99, ha="right")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN_DIR")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"comma list of {', '.join(METHODS)}")
    parser.add_argument("--points", type=int, help="only the first so many points of a method")
    parser.add_argument("--docs", type=float, default=1.0, help="share of the validation documents that are scored")
    parser.add_argument("--out", type=Path, default=Path("bench/results/rate_distortion"), help="NAME of NAME.jsonl and NAME.png")
    parser.add_argument("--keep", action="store_true", help="keep the points that are in NAME.jsonl")
    args = parser.parse_args(argv)
    wanted = args.methods.split(",")
    if unknown := [m for m in wanted if m not in METHODS]:
        raise SystemExit(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = args.out.with_suffix(".jsonl")
    points = [json.loads(text) for text in lines.read_text().splitlines()] if args.keep and lines.exists() else []
    done = {(p["method"], p["seed"], json.dumps(p["variables"])) for p in points}
    try:
        for folder in args.runs:
            checkpoint = Checkpoint(folder, args.docs)
            checkpoint.point(STANDARD, METHODS[STANDARD][0])  # percent of what
            for method in wanted:
                if reason := unavailable(checkpoint, method):
                    print(f"skipped {method}: {reason}", file=sys.stderr)
                    continue
                for variables in METHODS[method][: args.points]:
                    if (method, checkpoint.seed, json.dumps(variables)) not in done:
                        points.append(checkpoint.point(method, variables))
                        print(json.dumps(points[-1]), flush=True)
                        tg.write_atomic(lines, "".join(json.dumps(p) + "\n" for p in points).encode())
    except (OSError, ValueError, KeyError, tg.RunError) as e:
        raise SystemExit(f"error: {e}") from None
    print("\n" + "\n".join(table(means(points))))
    draw(points, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
