"""Draw the network that the environment asks for, and the road of a weight to its bits and back.

    python tools/tour.py --out tour.png                            # the defaults, S14
    PRESET=demo NUM_LOOPS=2 python tools/tour.py --out tour.png    # what these variables make of it
    python tools/tour.py --out tour.png --run logs/demo            # a run's or record's settings and numbers

The first half of the depths is the upper row, left to right; the second half is the lower one, right to
left, so that every skip is a vertical line. Equal colours are equal weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_gpt as tg

INK, SOFT, STREAM, SKIP, LORA = "#22262b", "#69737f", "#3d4a5c", "#b0573a", "#7b3fa0"
ENCODER_Y, DECODER_Y = 3.3, 0.0  # rows of the network, in heights of a sublayer's box
ATTN_DY, MLP_DY = 0.42, -0.42    # sublayers of a block, from its centre
BOX = 0.74                       # width of a block, in columns
CAP_BYTES = 16_000_000
SIGMA, TIMES = "\u03c3", "\u00d7"


Point = tuple[float, float]


class Depth(NamedTuple):
    """One application of a block, and where it stands in the picture."""

    depth: int
    block: int
    passes: int         # how often the block has run by then, this time included
    column: int
    row: float
    two_streams: bool
    skip_from: int | None  # depth whose output is added before this one


def plan(cfg: tg.Config) -> list[Depth]:
    """List all depths of a forward with its loops, with columns counted from the left."""
    order = tg.layer_order(cfg, looping=True)
    half = len(order) // 2
    shift = len(order) - 2 * half  # an odd number of depths: the last one has a column of its own, leftmost
    found: list[Depth] = []
    for depth, block in enumerate(order):
        decoder = depth - half
        split = cfg.parallel_start_layer and block >= cfg.parallel_start_layer
        found.append(Depth(
            depth, block,
            passes=order[: depth + 1].count(block),
            column=depth + shift if decoder < 0 else half + shift - 1 - decoder,
            row=ENCODER_Y if decoder < 0 else DECODER_Y,
            two_streams=decoder >= 0 and bool(split or (found and found[-1].two_streams)),
            skip_from=half - 1 - decoder if 0 <= decoder < half else None,
        ))
    return found


def colour(block: int, blocks: int) -> tuple[float, ...]:
    """Choose the light colour of a block."""
    strong = colormaps["turbo"](0.08 + 0.84 * block / max(blocks - 1, 1))
    return tuple(0.62 + 0.38 * channel for channel in strong[:3])


def box(ax: Axes, x: float, y: float, width: float, height: float, face, edge=INK, line=0.8, z=3) -> None:
    """Draw a rounded box around its centre (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.07"
    look = dict(boxstyle=style, facecolor=face, edgecolor=edge, linewidth=line, zorder=z)
    ax.add_patch(FancyBboxPatch(corner, width, height, **look))


def say(ax: Axes, x: float, y: float, text: str, size: float = 7.0, **options) -> None:
    """Write a centred text."""
    options = dict(ha="center", va="center", color=INK, zorder=6) | options
    ax.text(x, y, text, fontsize=size, **options)


def arrow(ax: Axes, start: Point, end: Point, ink=STREAM, line=1.4, **options) -> None:
    """Draw an arrow between two points."""
    style = dict(arrowstyle="-|>", mutation_scale=8, shrinkA=0, shrinkB=0, color=ink, linewidth=line)
    ax.annotate("", xy=end, xytext=start, arrowprops=style | options, zorder=2)


def badge(ax: Axes, x: float, y: float, text: str, ink: str, marker: str = "o") -> None:
    """Put a letter on a small disc."""
    ax.scatter([x], [y], s=62, marker=marker, color="white", edgecolors=ink, linewidths=0.9, zorder=7)
    say(ax, x, y - 0.005, text, 5.2, color=ink, zorder=8)


def attention_words(cfg: tg.Config, block: int) -> str:
    """Name what is special about a block's attention."""
    exclusive = block >= cfg.num_layers - cfg.xsa_last_n
    window = f"last {cfg.window(block)}" if cfg.window(block) else ""
    words = ["attention", "XSA" if exclusive else "", window]
    return "\n".join(filter(None, words))


def draw_block(ax: Axes, cfg: tg.Config, at: Depth) -> None:
    """Draw one depth: the block's box, its two sublayers, gate, embedding share and adapters."""
    x, y = at.column, at.row
    box(ax, x, y, BOX, 2.1, colour(at.block, cfg.num_layers), line=1.0)
    times = f", pass {at.passes}" if cfg.num_loops and cfg.loop_start <= at.block <= cfg.loop_end else ""
    say(ax, x, y + 0.93, f"block {at.block}{times}", 6.6, weight="bold")
    box(ax, x, y + ATTN_DY, BOX - 0.1, 0.72, "#ffffff", SOFT, 0.7, 4)
    box(ax, x, y + MLP_DY, BOX - 0.1, 0.72, "#ffffff", SOFT, 0.7, 4)
    say(ax, x, y + ATTN_DY + 0.08, attention_words(cfg, at.block), 6.2, linespacing=1.0)
    say(ax, x, y + MLP_DY + 0.08, "MLP", 6.2)

    edge = BOX / 2 - 0.05
    enters = x - edge if at.row == ENCODER_Y else x + edge
    leaves = x + edge if at.row == ENCODER_Y else x - edge
    badge(ax, enters, y + ATTN_DY, "x0", STREAM, "s")
    if cfg.attn_gate != "none":
        badge(ax, leaves, y + ATTN_DY, SIGMA, SKIP)
    if not cfg.ttt_enabled:
        return
    sites = [site for site in ("q", "k", "v", "o") if site in cfg.lora_sites]
    for index, site in enumerate(sites):
        badge(ax, x + 0.15 * (index - (len(sites) - 1) / 2), y + ATTN_DY - 0.34, site, LORA)
    if "mlp" in cfg.lora_sites:
        badge(ax, x, y + MLP_DY - 0.34, "m", LORA)


def draw_streams(ax: Axes, depths: list[Depth]) -> None:
    """Draw the residual stream, or both of them, from each depth to the next."""
    for here, there in pairwise(depths):
        step = 1 if here.row == ENCODER_Y else -1
        start, end = here.column + step * BOX / 2, there.column - step * BOX / 2
        if here.row != there.row:  # the turn at the right
            out = here.column + 0.72
            targets = (ATTN_DY, MLP_DY) if there.two_streams else (0.0,)
            corners = [here.row, here.row, there.row + targets[-1]]
            ax.plot([here.column + BOX / 2, out, out], corners, color=STREAM, linewidth=1.4, zorder=2)
            for dy in targets:
                arrow(ax, (out, there.row + dy), (there.column + BOX / 2, there.row + dy))
        elif here.two_streams:
            for dy, other in ((ATTN_DY, MLP_DY), (MLP_DY, ATTN_DY)):
                arrow(ax, (start, here.row + dy), (end, here.row + dy))
                crossing = [here.row + dy, here.row + other]
                ax.plot([start, end + 0.06], crossing, color=STREAM, linewidth=0.7, zorder=2)
        elif there.two_streams:
            for dy in (ATTN_DY, MLP_DY):
                arrow(ax, (start, here.row), (end, here.row + dy))
        else:
            arrow(ax, (start, here.row), (end, here.row))


def draw_skips(ax: Axes, cfg: tg.Config, depths: list[Depth]) -> None:
    """Draw a vertical line from every encoder depth to the decoder depth that takes its output."""
    for at in depths:
        if at.skip_from is None:
            continue
        above, below = ENCODER_Y - 1.05, at.row + 1.05
        arrow(ax, (at.column, above), (at.column, below), SKIP, 1.1, linestyle=(0, (3, 2)))
        if cfg.skip_gates_enabled:
            badge(ax, at.column, (above + below) / 2, SIGMA, SKIP)


def draw_loops(ax: Axes, cfg: tg.Config, depths: list[Depth]) -> None:
    """Bracket every pass over the repeated blocks; a pass that goes round the turn has two brackets."""
    looped = [at for at in depths if cfg.num_loops and cfg.loop_start <= at.block <= cfg.loop_end]
    for row, dy in ((ENCODER_Y, 1.22), (DECODER_Y, -1.22)):
        for number in sorted({at.passes for at in looped if at.row == row}):
            columns = [at.column for at in looped if at.row == row and at.passes == number]
            left, right, y = min(columns) - 0.42, max(columns) + 0.42, row + dy
            tick = -0.08 if dy > 0 else 0.08
            ax.plot([left, left, right, right], [y + tick, y, y, y + tick], color=SOFT, linewidth=1.0)
            words = f"loop {number} of {cfg.num_loops + 1}" if len(columns) > 1 else f"loop {number}"
            say(ax, (left + right) / 2, y + (0.14 if dy > 0 else -0.14), words, 6.6, color=SOFT)


def draw_ends(ax: Axes, cfg: tg.Config, depths: list[Depth]) -> None:
    """Draw what is in front of the first depth and behind the last one."""
    x, first, last = -1.25, depths[0], depths[-1]
    start = min(first.column, last.column) - BOX / 2
    smear = "\na gated share of the\ntoken before" if cfg.smear_gate_enabled else ""
    box(ax, x, ENCODER_Y, 0.98, 1.75, "#f3efe4")
    size = f"{cfg.vocab_size:,} {TIMES} {cfg.model_dim}"
    say(ax, x, ENCODER_Y, f"tokens\n↓\nembedding\n{size}{smear}\nnorm = x0", 6.6)
    if first.row == ENCODER_Y:
        arrow(ax, (x + 0.49, ENCODER_Y), (first.column - BOX / 2, ENCODER_Y))
    else:  # a single block: no encoder
        arrow(ax, (x + 0.2, ENCODER_Y - 0.88), (start + 0.2, first.row + 1.05))
    box(ax, x, DECODER_Y, 0.98, 1.75, "#f3efe4")
    mean = "mean of both\n" if last.two_streams else ""
    cap = f"softcap ±{cfg.logit_softcap:g}"
    say(ax, x, DECODER_Y, f"{mean}norm\nhead = embedding\n{cap}\n↓\nnats a token", 6.6)
    for dy in (ATTN_DY, MLP_DY) if last.two_streams else (0.0,):
        arrow(ax, (last.column - BOX / 2, last.row + dy), (x + 0.49, DECODER_Y + dy / 2))
    if cfg.ttt_enabled:
        badge(ax, x, DECODER_Y - 0.87, "h", LORA)


def legend(cfg: tg.Config, depths: list[Depth]) -> list[str]:
    """Explain the signs in the picture."""
    words = dict(q="q query", k="k key", v="v value", o="o output", mlp="m MLP", head="h head")
    sites = ", ".join(words[site] for site in (*cfg.lora_sites, "head"))
    lines = ["equal colour: equal weights"]
    lines.append("x0 in a square: a learned share of the embedding joins, channel by channel")
    if cfg.attn_gate != "none":
        channels = "all" if cfg.attn_gate == "dense" else cfg.gate_window
        lines.append(f"{SIGMA} on a block: a gate for each head, reads {channels} channels")
    if any(at.skip_from is not None for at in depths):
        how = "weighted and gated (" + SIGMA + ")" if cfg.skip_gates_enabled else "weighted"
        lines.append(f"dashed: skips, {how}, the last output first")
    if cfg.xsa_last_n:
        lines.append("XSA: heads drop the part along the token's own value")
    if any(at.two_streams for at in depths):
        lines.append("two lines: attention reads one stream, the MLP the other; both write to both")
    if cfg.ttt_enabled:
        lines.append(f"discs: test-time adapters of rank {cfg.ttt_lora_rank}: {sites}")
    if cfg.num_loops:
        lines.append(f"the loops begin after {cfg.enable_looping_at:.0%} of the training")
    return lines


def draw_network(ax: Axes, cfg: tg.Config) -> None:
    """Draw everything between tokens and nats."""
    depths = plan(cfg)
    with torch.device("meta"):
        count = sum(p.numel() for p in tg.GPT(cfg).parameters())
    for at in depths:
        draw_block(ax, cfg, at)
    draw_streams(ax, depths)
    draw_skips(ax, cfg, depths)
    draw_loops(ax, cfg, depths)
    draw_ends(ax, cfg, depths)
    right = max(at.column for at in depths)
    times = f"{cfg.num_layers} blocks, {len(depths)} depths" if cfg.num_loops else f"{cfg.num_layers} blocks"
    heads = f"{cfg.num_heads} heads of {cfg.head_dim}, {cfg.num_kv_heads} for keys and values"
    shape = f"width {cfg.model_dim}, {heads}, MLP {cfg.mlp_dim:,}; {count:,} parameters"
    ax.set_title(f"The network of PRESET={cfg.preset}: {times}; {shape}", fontsize=11, loc="left", color=INK)
    signs = legend(cfg, depths)
    half = (len(signs) + 1) // 2
    for x, part in ((-1.7, signs[:half]), ((right - 0.6) / 2, signs[half:])):
        text = "\n".join(f"·  {line}" for line in part)
        say(ax, x, -1.75, text, 7.4, ha="left", va="top", linespacing=1.5)
    ax.set_xlim(-1.85, right + 0.85)
    ax.set_ylim(-2.75, ENCODER_Y + 1.6)
    ax.axis("off")


# ---- the road of a weight


def rounding_words(cfg: tg.Config) -> str:
    """Say how the configuration makes integers of weights."""
    if cfg.quant == "rd":
        return "QUANT=rd: all weights at\none slope of loss to bits;\ntrellis inside GPTQ"
    if cfg.quant == "s05":
        return "QUANT=s05: GPTQ, int5 or int6\nby the Hessian's trace,\nembedding int8"
    extra = [name for name, on in (("AWQ", cfg.awq_lite_enabled), ("LQER", cfg.lqer_enabled)) if on]
    besides = " and ".join(extra) or "nothing besides"
    return f"QUANT=s14: GPTQ, int{cfg.matrix_bits},\nclipped by rows;\n{besides}"


class Step(NamedTuple):
    """A station of the road."""

    title: str
    words: str
    number: str = ""  # what the run measured, if there is one


def road(cfg: tg.Config, run: dict[str, Any] | None) -> tuple[list[Step], list[Step]]:
    """Describe the way to the bits, and the way back."""
    run = run or {}

    def measured(key: str, text: str) -> str:
        return text.format(run[key]) if run.get(key) is not None else ""

    batches = f"{cfg.gptq_calibration_batches} batches of training text"
    text = "its own text" if cfg.gptq_calibration == "self" else batches
    count = run.get("model_params", 0)
    spread = f"{8 * run['artifact_bytes'] / count:.2f} bits a number" if count else ""
    size = f"{4 * count:,} bytes" if count else ""
    coder = f"COMPRESSOR={cfg.compressor}:\nlikely integers take\nfewer bits"
    average = f"EMA over the steps,\ndecay {cfg.ema_decay:g}"
    hessian = f"Hessian of each\nmatrix's input, from\n{text}"
    there = [
        Step("trained", "matrices in fp32,\n32 bits a number", size),
        Step("averaged", average, measured("pre_quant_val_bpb", "{:.4f} bpb")),
        Step("asked what it reads", hessian, measured("calib_seconds", "{:.0f} s")),
        Step("rounded", rounding_words(cfg)),
        Step("coded", coder, spread),
        Step("on disk", "it counts, and so\ndoes the script", measured("artifact_bytes", "{:,} bytes")),
    ]
    back = [
        Step("read", "from the file's bytes,\nnothing else"),
        Step("decoded", "the same integers,\nto the bit"),
        Step("a weight again", f"integer {TIMES} step,\nrounded to the activations' type"),
        Step("scored", "bits per byte of\nvalidation text", measured("quantized_val_bpb", "{:.4f} bpb")),
    ]
    if cfg.ttt_enabled:
        words = "adapters (in phases, all\nweights) learn from\nwhat was scored"
        back.append(Step("scored and taught", words, measured("ttt_val_bpb", "{:.4f} bpb")))
    return there, back


def draw_steps(ax: Axes, steps: list[Step], y: float, face: str, leftwards: bool) -> None:
    """Draw a row of boxes with arrows between them over the whole width, 0 to 6."""
    width = 6 / max(len(steps), 5)
    for index, (title, words, number) in enumerate(steps):
        x = 6 - width * (index + 0.5) if leftwards else width * (index + 0.5)
        box(ax, x, y, width * 0.82, 0.86, face)
        say(ax, x, y + 0.29, title, 8, weight="bold")
        say(ax, x, y - 0.02 if number else y - 0.08, words, 6.6, linespacing=1.1)
        say(ax, x, y - 0.33, number, 7.4, color=SKIP, weight="bold")
        step = -1 if leftwards else 1
        if index + 1 < len(steps):
            arrow(ax, (x + step * width * 0.41, y), (x + step * width * 0.59, y))


def draw_bytes(ax: Axes, run: dict[str, Any], y: float) -> None:
    """Draw the parts of the artifact, and the script, as one bar of the width 6."""
    parts = {name: size for name, size in run["bytes_by_part"].items() if size}
    parts["script"] = run["code_bytes"]
    left, total = 0.0, sum(parts.values())
    for index, (name, size) in enumerate(sorted(parts.items(), key=lambda part: -part[1])):
        width = 6 * size / total
        ax.barh(y, width, 0.3, left, color=("#d5dfec", "#c3d1e3")[index % 2], edgecolor="white", zorder=3)
        if width > 0.23:
            say(ax, left + width / 2, y, f"{name}\n{size:,}", 5.9, linespacing=1.05)
        left += width
    share = run["bytes_total"] / CAP_BYTES
    words = f"{run['bytes_total']:,} bytes in all, of {CAP_BYTES:,} allowed ({share:.1%})"
    say(ax, 0, y + 0.25, words, 7.4, ha="left", color=SKIP, weight="bold")


def draw_road(ax: Axes, cfg: tg.Config, run: dict[str, Any] | None) -> None:
    """Draw how a weight becomes bits, and a weight again."""
    there, back = road(cfg, run)
    low = -1.75 if run else -1.25
    draw_steps(ax, there, 0.0, "#e7eef6", leftwards=False)
    draw_steps(ax, back, low, "#eaf3e6", leftwards=True)
    arrow(ax, (6 - 0.2, -0.43), (6 - 0.2, low + 0.43))
    if run:
        draw_bytes(ax, run, -0.93)
    name = f" (numbers of run {run['run_id']}, seed {run['seed']})" if run else ""
    ax.set_title(f"A weight on its way to bits and back{name}", fontsize=11, loc="left", color=INK)
    ax.set_xlim(-0.02, 6.02)
    ax.set_ylim(low - 0.5, 0.5)
    ax.axis("off")


def picture(cfg: tg.Config, run: dict[str, Any] | None = None) -> Figure:
    """Make the figure of a configuration, with a run's result if there is one."""
    columns = 1 + max(at.column for at in plan(cfg))
    heights = (6.1, 3.7 if run else 2.7)
    size = max(11.5, 1.06 * (columns + 2)), sum(heights)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    draw_network(above, cfg)
    draw_road(below, cfg, run)
    return figure


def read_result(folder: Path) -> dict[str, Any]:
    """Read the result of a run folder, or of the run whose artifact a record holds. Raises ValueError."""
    file = folder / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    seeds = [file.name.split(".")[0].removeprefix("artifact_seed") for file in folder.glob("artifact_seed*")]
    for seed in sorted(seeds):
        log = folder / f"train_seed{seed}.log"
        lines = re.findall(r"^result: (\{.*\})$", log.read_text(), re.M)
        if lines:
            return json.loads(lines[-1])
    raise ValueError(f"{folder} holds no result.json, no artifact_seed* with its log: name a finished run")


def main(argv: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, help="the picture to write: .png, .svg or .pdf")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run or record that is drawn instead")
    args = parser.parse_args(argv)
    try:
        run = read_result(args.run) if args.run else None
        cfg = tg.config_from_env(run["overrides"] if run else os.environ)
        picture(cfg, run).savefig(args.out, dpi=110)
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
