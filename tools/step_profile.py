"""Where the time of a training step goes: table and picture of a run with PROFILE=N.

    PROFILE=3 ARTIFACT_DIR=logs/p python train_gpt.py
    python tools/step_profile.py logs/p/profile.json.gz             # also writes profile.png beside it; --json for the numbers

The trace itself opens in chrome://tracing and in Perfetto. Time is what an operator (CPU) or kernel (GPU) spends without those
it calls; the rest of the wall time is `host gap`, so the shares add up to 100 %. Bytes are those of an operator's arguments,
FLOPs those torch can tell; a class is bound by whichever takes longer at the speeds the run measured.
"""

import argparse
import bisect
import gzip
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

CLASSES = (  # first match wins
    ("communication", r"nccl|gloo|c10d|all_reduce|allreduce|all_gather|reduce_scatter|broadcast"),
    ("attention", r"attention|flash|fmha|sdpa"),
    ("matmul", r"\b(?:add|b|badd)?mm\b|matmul|gemm|linear|cutlass|mlp_kernel|mlp_up"),
    ("copy", r"copy|memcpy|memset|\bcat\b|clone|fill_|zero_|zeros|contiguous|repeat_interleave|index_put"),
    ("norm/reduction", r"norm|\bsum\b|mean|softmax|logsumexp|amax|reduce|triton_red|triton_per|ce_kernel|nll_loss"),
    ("elementwise", r""),
)
ITEM_BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "short": 2, "unsigned char": 1,
              "bool": 1}


def class_of(name: str) -> str:
    return next(kind for kind, pattern in CLASSES if re.search(pattern, name))


def argument_bytes(args: dict) -> float:
    """Bytes of all tensors an operator was given; what it returns is among them or about as large as one of them."""
    dims, types = args.get("Input Dims", []), args.get("Input type", [])
    return sum(math.prod(d) * ITEM_BYTES.get(t, 0) for d, t in zip(dims, types, strict=False) if d and all(isinstance(n, int) for n in d))


def argument_flops(name: str, args: dict) -> float:
    """FLOPs of a matrix product from the shapes it was given."""
    if not re.search(r"\b(?:add|b|badd)?mm\b", name):
        return 0.0
    a, b = [d for d in args.get("Input Dims", []) if len(d) >= 2][-2:]
    return 2.0 * math.prod(a) * b[-1]


class Ranges:
    """Disjoint time ranges; asks whether a moment lies in one."""

    def __init__(self, events: list[dict]):
        self.starts, self.ends = zip(*sorted((e["ts"], e["ts"] + e["dur"]) for e in events), strict=True) if events else ((), ())

    def hold(self, moment: float) -> bool:
        i = bisect.bisect_right(self.starts, moment) - 1
        return i >= 0 and moment < self.ends[i]


def self_times(operators: list[dict]) -> list[tuple[dict, float]]:
    """Each operator with its duration less that of the operators it calls, thread by thread."""
    out, by_thread = [], defaultdict(list)
    for e in operators:
        by_thread[e["tid"]].append(e)
    for events in by_thread.values():
        stack = []
        for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            while stack and e["ts"] >= stack[-1][0]["ts"] + stack[-1][0]["dur"]:
                out.append(tuple(stack.pop()))
            if stack:
                stack[-1][1] -= e["dur"]
            stack.append([e, e["dur"]])
        out += [tuple(entry) for entry in stack]
    return out


def read_trace(path: Path) -> tuple[list[dict], dict]:
    """Events of a trace, and the speeds that the run wrote beside it. Raises SystemExit with an error for the user."""
    try:
        data = path.read_bytes()
        events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
        speeds = json.loads(path.with_name("profile_speeds.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(f"error: {path} is no trace of a run with PROFILE=N ({type(e).__name__}: {e})") from None
    return [e for e in events if e.get("ph") == "X" and "dur" in e], speeds


def breakdown(events: list[dict], speeds: dict) -> dict:
    """{class: {ms, share, calls, gb, tflop, bound}} per step; the shares add up to 1."""
    steps = [e for e in events if e["name"].startswith("ProfilerStep#") and e.get("cat") == "user_annotation"]
    optimizer = Ranges([e for e in events if e["name"] == "optimizer" and e.get("cat") == "user_annotation"])
    operators = self_times([e for e in events if e.get("cat") == "cpu_op"])
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    begin, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    source = {e["args"].get("External id"): e for e, _ in operators}
    launched = {e["args"].get("correlation"): e["ts"] for e in events if e.get("cat") == "cuda_runtime"}
    table = defaultdict(lambda: dict(us=0.0, calls=0, bytes=0.0, flops=0.0))
    for e, us in [(k, k["dur"]) for k in kernels] or operators:
        parent = source.get(e["args"].get("External id"), e) if kernels else e
        moment = launched.get(e["args"].get("correlation"), e["ts"]) if kernels else e["ts"]
        if not begin <= moment <= end:
            continue
        row = table["optimizer" if optimizer.hold(moment) else class_of(f"{e['name']} {parent['name']}")]
        row["us"] += us
        row["calls"] += 1
        row["bytes"] += argument_bytes(parent.get("args", {}))
        row["flops"] += argument_flops(parent["name"], parent.get("args", {}))
    busy, wall = sum(row["us"] for row in table.values()), end - begin
    table["host gap"]["us"] = max(0.0, wall - busy)
    total = max(wall, busy)  # streams or threads side by side can be busy for longer than the wall clock
    out = {}
    for name, row in sorted(table.items(), key=lambda item: -item[1]["us"]):
        by_bytes, by_flops = row["bytes"] / speeds["bytes_per_second"], row["flops"] / speeds["flops_per_second"]
        bound = "" if not row["calls"] else "compute" if by_flops > by_bytes else "memory"
        out[name] = dict(ms=row["us"] / 1e3 / len(steps), share=row["us"] / total, calls=row["calls"] // len(steps),
                         gb=row["bytes"] / 1e9 / len(steps), tflop=row["flops"] / 1e12 / len(steps), bound=bound)
    return out


def draw(table: dict, path: Path) -> None:
    """One horizontal bar a class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [*table][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(names) + 1))
    bars = axes.barh(names, [table[n]["ms"] for n in names], color="#4878a8")
    axes.bar_label(bars, [f" {100 * table[n]['share']:.1f} %" for n in names])
    axes.set_xlabel("ms per training step")
    axes.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="profile.json.gz of a run")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    table = breakdown(*read_trace(args.trace))
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        print(f"{'class':<16}{'ms/step':>10}{'share':>9}{'calls':>8}{'GB':>9}{'TFLOP':>9}  bound by")
        for name, r in table.items():
            print(f"{name:<16}{r['ms']:>10.2f}{100 * r['share']:>8.1f}%{r['calls']:>8}{r['gb']:>9.3f}{r['tflop']:>9.4f}  {r['bound']}")
    draw(table, args.trace.with_name(args.trace.name.split(".")[0] + ".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
