"""Show where the time of a training step goes: table and picture of a run with PROFILE=N.

    PROFILE=3 ARTIFACT_DIR=logs/p python train_gpt.py
    python tools/step_profile.py logs/p/profile.json.gz    # --json for the numbers

It also draws profile.png beside the trace, which itself opens in chrome://tracing and in Perfetto. Time is
what an operator (CPU) or kernel (GPU) spends without those it calls; the rest of the wall time is `host
gap`, so that the shares add up to 100 %. Bytes are those of an operator's arguments, FLOPs those of matrix
products; a class is bound by whichever takes longer at the speeds the run measured.
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
    ("norm/reduction",
     r"norm|\bsum\b|mean|softmax|logsumexp|amax|reduce|triton_red|triton_per|ce_kernel|nll_loss"),
    ("elementwise", r""),
)
ITEM_BYTES = {
    "double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "short": 2,
    "unsigned char": 1, "bool": 1,
}
PRODUCT = re.compile(r"\b(?:add|b|badd)?mm\b")


def class_of(name: str) -> str:
    """Name the class of an operator or kernel."""
    return next(kind for kind, pattern in CLASSES if re.search(pattern, name))


def argument_bytes(args: dict) -> float:
    """Count the bytes of the tensors an operator was given; its result is about as large as one of them."""
    total = 0.0
    for dims, kind in zip(args.get("Input Dims", []), args.get("Input type", []), strict=False):
        if dims and all(isinstance(n, int) for n in dims):  # lists of tensors have lists of dims
            total += math.prod(dims) * ITEM_BYTES.get(kind, 0)
    return total


def argument_flops(name: str, args: dict) -> float:
    """Count the FLOPs of a matrix product from the shapes it was given; 0 for other operators."""
    if not PRODUCT.search(name):
        return 0.0
    a, b = [d for d in args.get("Input Dims", []) if len(d) >= 2][-2:]
    return 2.0 * math.prod(a) * b[-1]


class Ranges:
    """Disjoint ranges of time, those of events; tells whether a moment lies in one."""

    def __init__(self, events: list[dict]):
        ranges = sorted((e["ts"], e["ts"] + e["dur"]) for e in events)
        self.starts = [start for start, _ in ranges]
        self.ends = [end for _, end in ranges]

    def include(self, moment: float) -> bool:
        i = bisect.bisect_right(self.starts, moment) - 1
        return i >= 0 and moment < self.ends[i]


def self_times(operators: list[dict]) -> list[tuple[dict, float]]:
    """Pair each operator with its duration less that of the operators it calls, thread by thread."""
    by_thread = defaultdict(list)
    for e in operators:
        by_thread[e["tid"]].append(e)

    out = []
    for events in by_thread.values():
        running = []  # [operator, its own time], each called by the one before
        for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            while running and e["ts"] >= running[-1][0]["ts"] + running[-1][0]["dur"]:
                out.append(tuple(running.pop()))
            if running:
                running[-1][1] -= e["dur"]
            running.append([e, e["dur"]])
        out += [tuple(entry) for entry in running]
    return out


def read_trace(path: Path) -> tuple[list[dict], dict]:
    """Read the events of a trace and the speeds that lie beside it. Raises SystemExit with what is wrong."""
    try:
        data = path.read_bytes()
        events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
        speeds = json.loads(path.with_name("profile_speeds.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = f"{type(e).__name__}: {e}"
        raise SystemExit(f"error: {path} is no trace of a run with PROFILE=N ({why})") from None
    return [e for e in events if e.get("ph") == "X" and "dur" in e], speeds


def annotated(events: list[dict], name: str) -> list[dict]:
    """Choose the events that the run itself marked with a name of this beginning."""
    return [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(name)]


def breakdown(events: list[dict], speeds: dict) -> dict:
    """Add up {class: {ms, share, calls, gb, tflop, bound}} per step; the shares add up to 1."""
    steps = annotated(events, "ProfilerStep#")
    optimizer = Ranges(annotated(events, "optimizer"))
    operators = self_times([e for e in events if e.get("cat") == "cpu_op"])
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    begin = min(e["ts"] for e in steps)
    end = max(e["ts"] + e["dur"] for e in steps)

    operator_of = {e["args"].get("External id"): e for e, _ in operators}
    launched_at = {e["args"].get("correlation"): e["ts"] for e in events if e.get("cat") == "cuda_runtime"}
    table = defaultdict(lambda: dict(us=0.0, calls=0, bytes=0.0, flops=0.0))
    for e, us in [(kernel, kernel["dur"]) for kernel in kernels] or operators:
        operator, moment = e, e["ts"]
        if kernels:  # a kernel belongs where it was launched
            operator = operator_of.get(e["args"].get("External id"), e)
            moment = launched_at.get(e["args"].get("correlation"), moment)
        if not begin <= moment <= end:
            continue
        kind = "optimizer" if optimizer.include(moment) else class_of(f"{e['name']} {operator['name']}")
        args = operator.get("args", {})
        row = table[kind]
        row["us"] += us
        row["calls"] += 1
        row["bytes"] += argument_bytes(args)
        row["flops"] += argument_flops(operator["name"], args)

    wall = end - begin
    busy = sum(row["us"] for row in table.values())
    table["host gap"]["us"] = max(0.0, wall - busy)
    total = max(wall, busy)  # streams or threads side by side can be busy for longer than the wall clock
    rows = sorted(table.items(), key=lambda item: -item[1]["us"])
    return {name: per_step(row, total, len(steps), speeds) for name, row in rows}


def per_step(row: dict, total: float, steps: int, speeds: dict) -> dict:
    """Divide the sums of a class by the number of steps, and tell what binds it."""
    by_bytes = row["bytes"] / speeds["bytes_per_second"]
    by_flops = row["flops"] / speeds["flops_per_second"]
    bound = "compute" if by_flops > by_bytes else "memory"
    return dict(
        ms=row["us"] / 1e3 / steps, share=row["us"] / total, calls=row["calls"] // steps,
        gb=row["bytes"] / 1e9 / steps, tflop=row["flops"] / 1e12 / steps, bound=bound if row["calls"] else "")


def draw(table: dict, path: Path) -> None:
    """Draw one horizontal bar a class."""
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
    """Print the table, or its numbers, and draw the picture."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("trace", type=Path, help="profile.json.gz of a run")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    table = breakdown(*read_trace(args.trace))
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        print(f"{'class':<16}{'ms/step':>10}{'share':>9}{'calls':>8}{'GB':>9}{'TFLOP':>9}  bound by")
        for name, row in table.items():
            work = f"{row['calls']:>8}{row['gb']:>9.3f}{row['tflop']:>9.4f}"
            print(f"{name:<16}{row['ms']:>10.2f}{100 * row['share']:>8.1f}%{work}  {row['bound']}")
    draw(table, args.trace.with_name(args.trace.name.split(".")[0] + ".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
