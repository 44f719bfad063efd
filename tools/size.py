"""Where an artifact's bytes are, by tensor, kind and part, against the entropy of what they code; and what each kind costs in loss.

    python tools/size.py logs/RUN                         # or an artifact; --tensors: every matrix, --json: the numbers
    python tools/size.py logs/RUN --out size.png          # a treemap: area is bytes
    python tools/size.py logs/RUN --sensitivity           # loss when only one kind is quantized; =tensor: one matrix at a time

Streams hold several tensors, so a stream's bytes are shared out: with COMPRESSOR=range by the code length of each tensor, else by
its empirical entropy (of fp16: of low and high bytes apart). Headers, row orders and code are sizes of their own, and the shares
add up to the file. Bits stand beside that entropy: a coder that adapts or sees neighbours can go below it. Sensitivity needs
final_model.pt and the data (DATA_PATH of the run, or of the environment), and scores a fixed share of the validation documents.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_gpt as tg

KINDS = {  # kind: (tensors, colour of its tiles); first match wins, in the order of the tables
    "embedding": (r"tok_emb\.", "#7a5195"),
    "attn q": (r"attn\.c_q\.", "#2f6690"),
    "attn k": (r"attn\.c_k\.", "#4a8fbd"),
    "attn v": (r"attn\.c_v\.", "#3aa6a6"),
    "attn o": (r"attn\.proj\.", "#2b7f86"),
    "mlp up": (r"mlp\.fc\.", "#d9822b"),
    "mlp down": (r"mlp\.proj\.", "#c4562e"),
    "small": ("", "#8a8f98"),
}
PARTS = ("weights", "scales", "low-rank", "header", "code")


class Item(NamedTuple):
    """What one array of the artifact takes."""

    tensor: str
    kind: str
    part: str
    count: int  # values
    bits: float  # empirical entropy of all of them
    bytes: float


def kind_of(name: str) -> str:
    return next(kind for kind, (pattern, _) in KINDS.items() if re.search(pattern, name))


def part_of(codec: str, part: str) -> str:
    return "low-rank" if codec.startswith("low_rank") else "weights" if part in ("q", "w") else "scales"


def entropy_bits(a: np.ndarray) -> float:
    """Bits of an array when every byte plane is coded at its own order-0 entropy."""
    bits = 0.0
    for plane in tg.byte_planes(a):
        n = np.bincount(plane, minlength=256)
        n = n[n > 0]
        bits += float((n * np.log2(plane.size / n)).sum())
    return bits


def run_result(folder: Path) -> dict:
    """result.json of a run, data paths replaced by those of the environment; {} without one. Raises OSError, ValueError, KeyError."""
    found = folder / "result.json"
    result = json.loads(found.read_text()) if found.exists() else {}
    here = {name: os.environ[name] for name in ("DATA_PATH", "DATA_DIR", "TOKENIZER_PATH") if name in os.environ}
    return result and result | dict(overrides={"PRESET": result["preset"]} | result["overrides"] | here)


def config_of(header: tg.Header) -> tg.Config:
    """Make the configuration of an artifact without a run: the model's variables, as far as this script has them."""
    known = {name: value for name, value in header.model.items() if name in tg.MODEL_FIELDS}
    return tg.Config(**known, lqer_enabled=False)


def open_run(path: Path) -> tuple[tg.Config, Path, dict]:
    """Configuration, artifact and result of a run folder, or of an artifact, whose own header then has to do. Raises SystemExit."""
    folder = path if path.is_dir() else path.parent
    try:
        result = run_result(folder)
        artifact = path if path.is_file() else folder / result.get("artifact_file", "final_model.int6.ptz")
        header = tg.read_header(artifact.read_bytes())
        cfg = tg.config_from_env(result["overrides"]) if result else config_of(header)
        tg.check_model_fields(cfg, header.model)
    except (OSError, ValueError, KeyError, TypeError, tg.RunError) as e:
        raise SystemExit(f"error: {path} is neither a run with an artifact nor an artifact: {e}") from None
    return cfg, artifact, result


def inventory(cfg: tg.Config, blob: bytes, code_bytes: int) -> list[Item]:
    """Every array of the artifact with its share of the bytes, the header, and the code."""
    header, totals, items = tg.read_header(blob), defaultdict(float), []
    arrays = {f"{name}:{codec}.{part}": t.numpy() for name, s in tg.unpack(cfg, blob).items() for (codec, part), t in s.parts.items()}
    bits = {name: entropy_bits(a) for name, a in arrays.items()}
    coded = dict(zip(arrays, tg.coded_bits(cfg, arrays), strict=True)) if header.compressor == "range" else bits
    weight = {name: coded[name] + 1e-6 * a.nbytes for name, a in arrays.items()}  # a stream of constants has no entropy
    stream_of = {name: stored.stream for name, stored in tg.layout(cfg, arrays).items()}
    for name, w in weight.items():
        totals[stream_of[name]] += w
    for name, a in arrays.items():
        tensor, codec, part = re.fullmatch(r"(.*):(\w+)\.(\w+)", name).groups()
        size = header.sizes[stream_of[name]] * weight[name] / totals[stream_of[name]]
        items.append(Item(tensor, kind_of(tensor), part_of(codec, part), a.size, bits[name], size))
    for stream, size in dict(header=header.start, **header.sizes).items():
        if stream not in totals and size:
            items.append(Item(stream, "header", "header", 0, 8.0 * size, size))
    return [*items, Item("script", "code", "code", 0, 8.0 * code_bytes, code_bytes)] if code_bytes else items


def grouped(items: list[Item], key) -> dict[str, dict]:
    """{key(item): bytes by part and in all, weights, their bits as coded and their entropy}, in the order of KINDS, then by bytes."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    out = {}
    for name, group in groups.items():
        weights = [i for i in group if i.part == "weights"]
        count = sum(i.count for i in weights)
        bits, entropy = (8 * sum(i.bytes for i in weights) / count, sum(i.bits for i in weights) / count) if count else (None, None)
        out[name] = {part: sum(i.bytes for i in group if i.part == part) for part in PARTS} | dict(
            bytes=sum(i.bytes for i in group), count=count, kind=group[0].kind, bits=bits, entropy=entropy)
    order = [*KINDS, "header", "code"]
    return dict(sorted(out.items(), key=lambda g: (order.index(g[1]["kind"]), -g[1]["bytes"])))


def sensitivity(cfg: tg.Config, artifact: Path, per_tensor: bool, share: float) -> tuple[dict[str, float], float]:
    """{kind or tensor, and all: val_bpb with only that quantized, less val_bpb of the fp32 weights}, and the latter. Raises RunError."""
    cfg = dataclasses.replace(cfg, val_doc_fraction=share)
    world = tg.World(0, 1, torch.device("cpu"), torch.float32)
    model = tg.load_checkpoint_model(cfg, world, artifact.with_name("final_model.pt"))
    data = tg.ValData.load(cfg, tg.Dataset.open(cfg, need_train=False))
    exact = tg.unbank(cfg, {name: t.float().clone() for name, t in model.state_dict().items()})  # loading overwrites in place
    rounded = {name: s.decode() for name, s in tg.unpack(cfg, artifact.read_bytes()).items()}

    def bpb(names) -> float:
        model.load_state_dict(tg.rebank(cfg, exact | {name: rounded[name] for name in names}))
        return tg.evaluate(cfg, world, model, tg.Scorer(data, world)).bpb

    groups = defaultdict(list)
    for name in rounded:
        groups[name if per_tensor and kind_of(name) != "small" else kind_of(name)].append(name)
    before = bpb(())
    return {name: bpb(names) - before for name, names in ({**groups, "all": list(rounded)}).items()}, before


def table(groups: dict[str, dict], changes: dict[str, float]) -> list[str]:
    """Lines for a terminal."""
    total, wide = sum(g["bytes"] for g in groups.values()), max(map(len, groups)) + 2
    lines = [f"{'':<{wide}}{'bytes':>12}{'share':>8}{'weights':>12}{'scales':>10}{'low-rank':>10}{'values':>12}{'bits':>7}{'entropy':>9}"
             + ("   val_bpb" if changes else "")]
    for name, g in groups.items():
        cells = "".join(f"{g[part]:>{n},.0f}" if g[part] else " " * n for part, n in (("weights", 12), ("scales", 10), ("low-rank", 10)))
        cells += f"{g['count']:>12,}{g['bits']:>7.3f}{g['entropy']:>9.3f}" if g["count"] else " " * 28
        cells += f"{changes[name]:>+10.5f}" if name in changes else ""
        lines.append(f"{name:<{wide}}{g['bytes']:>12,.0f}{100 * g['bytes'] / total:>7.2f}%{cells}")
    return [*lines, f"{'total':<{wide}}{total:>12,.0f}" + (f"{'':>68}{changes['all']:>+10.5f}" if changes else "")]


def squarify(sizes: list[float], x: float, y: float, w: float, h: float) -> list[tuple[float, float, float, float]]:
    """Tiles (x, y, width, height) of these areas, largest first, that fill a rectangle and are as square as can be (Bruls, Huizing,
    van Wijk 2000): a row along the shorter side takes tiles as long as that makes its worst tile squarer."""
    if not sizes:
        return []
    side, unit = min(w, h), w * h / sum(sizes)

    def worst(row: list[float]) -> float:
        depth = sum(row) * unit / side
        return max(max(depth / (s * unit / depth), (s * unit / depth) / depth) for s in row)

    n = 1
    while n < len(sizes) and worst(sizes[: n + 1]) <= worst(sizes[:n]):
        n += 1
    depth, at, tiles = sum(sizes[:n]) * unit / side, 0.0, []
    for s in sizes[:n]:
        length = s * unit / depth
        tiles.append((x, y + at, depth, length) if h <= w else (x + at, y, length, depth))
        at += length
    rest = (x + depth, y, w - depth, h) if h <= w else (x, y + depth, w, h - depth)
    return tiles + squarify(sizes[n:], *rest)


def leaves(items: list[Item], kind: str) -> list[tuple[str, str, float]]:
    """(label, part, bytes) of a kind's tiles: its matrices by layer, then their scales and their corrections over all layers."""
    tiles = defaultdict(float)
    for i in items:
        if i.kind == kind:
            layer = re.match(r"blocks\.(\d+)\.", i.tensor)
            if kind not in KINDS or kind == "small":
                tiles[i.tensor if kind == "header" else kind, i.part] += i.bytes
            else:
                tiles[i.part if i.part != "weights" else f"layer {layer[1]}" if layer else kind, i.part] += i.bytes
    tiles = [(label, part, size) for (label, part), size in tiles.items() if size > 0]
    return sorted(tiles, key=lambda t: (PARTS.index(t[1]), int(t[0].removeprefix("layer ")) if t[0].startswith("layer ") else 0))


def draw(items: list[Item], path: Path, title: str) -> None:
    """The treemap: a block of tiles for each kind, one colour each; scales lighter, low-rank corrections darker."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    colours = {kind: colour for kind, (_, colour) in KINDS.items()} | dict(header="#b9bec6", code="#4d535c")
    kinds = {kind: sum(i.bytes for i in items if i.kind == kind) for kind in colours}
    kinds = dict(sorted(((k, size) for k, size in kinds.items() if size), key=lambda k: -k[1]))
    figure, (W, H) = Figure(figsize=(12, 8), facecolor="white"), (1200, 740)
    axes = figure.add_axes((0.012, 0.012, 0.976, 0.925))
    axes.set(xlim=(0, W), ylim=(H, 0))
    axes.axis("off")

    def write(x: float, y: float, w: float, h: float, text: str, size: float, **style) -> bool:
        """Put text at the top left of a box, upright or turned, if it fits; a unit is 0.7 points."""
        long, high = len(text) * size * 0.83 + 8, size * 1.6
        if fits := (long < w and high < h) or (long < h and high < w):
            axes.text(x + 5, y + 3, text, size=size, va="top", ha="left", rotation=0 if long < w and high < h else 270, **style)
        return fits

    for (kind, size), (x, y, w, h) in zip(kinds.items(), squarify(list(kinds.values()), 0, 0, W, H), strict=True):
        x, y, w, h, base, strip = x + 2, y + 2, w - 4, h - 4, np.array(to_rgb(colours[kind])), 0.0
        name = f"{kind}  {size / 1000:,.1f} kB"
        if min(w, h) > 60:
            axes.add_patch(Rectangle((x, y), w, 24, color=base * 0.72, linewidth=0))
            write(x, y + 1, w, 24, name if len(name) * 9 < w else kind, 10, color="white", weight="bold")
            strip = 24.0
        tiles = leaves(items, kind)
        for (label, part, n), (a, b, c, d) in zip(tiles, squarify([t[2] for t in tiles], x, y + strip, w, h - strip), strict=True):
            shade = base + (1 - base) * 0.5 if part == "scales" else base * 0.55 if part == "low-rank" else base
            axes.add_patch(Rectangle((a, b), c, d, facecolor=shade, edgecolor="white", linewidth=0.8))
            ink = "white" if shade @ (0.3, 0.59, 0.11) < 0.62 else "#20242a"
            label = label if strip or kind == "header" else kind if part != "scales" else ""
            if write(a, b, c, d, label, 8.5, color=ink) and d > 42 and c > 60:
                write(a, b + 15, c, d, f"{n / 1000:,.1f} kB", 8.5, color=ink, alpha=0.8)
    figure.text(0.014, 0.975, title, size=13, weight="bold", va="center")
    figure.text(0.986, 0.975, "area = bytes; light: scales, dark: low-rank corrections", size=9.5, va="center", ha="right", color="#555b65")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="RUN_OR_ARTIFACT")
    parser.add_argument("--tensors", action="store_true", help="a line for every tensor instead of every kind")
    parser.add_argument("--sensitivity", nargs="?", const="kind", choices=("kind", "tensor"), help="change of val_bpb")
    parser.add_argument("--docs", type=float, default=0.1, help="share of the validation documents that sensitivity scores")
    parser.add_argument("--out", type=Path, help="write the treemap here (PNG)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    cfg, artifact, result = open_run(args.path)
    blob, changes, before = artifact.read_bytes(), {}, None
    try:
        items = inventory(cfg, blob, result.get("code_bytes", 0))
        if args.sensitivity:
            changes, before = sensitivity(cfg, artifact, args.sensitivity == "tensor", args.docs)
    except tg.RunError as e:
        raise SystemExit(f"error: {e}") from None
    per_tensor = args.tensors or args.sensitivity == "tensor"
    groups = grouped(items, lambda i: i.tensor if per_tensor and i.kind in KINDS and i.kind != "small" else i.kind)
    parts = {part: sum(i.bytes for i in items if i.part == part) for part in PARTS}
    if args.json:
        print(json.dumps(dict(artifact_bytes=len(blob), parts=parts, groups=groups, val_bpb=before, val_bpb_change=changes), indent=1))
    else:
        print(f"{artifact}: {len(blob):,} bytes" + (f", val_bpb {before:.5f} before quantization" if before else "") + "\n")
        print("\n".join(table(groups, changes)))
        print("\n" + "  ".join(f"{part} {size:,.0f}" for part, size in parts.items() if size))
    if args.out:
        draw(items, args.out, f"{sum(i.bytes for i in items):,.0f} bytes of {tg.ARTIFACT_CAP_BYTES:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
