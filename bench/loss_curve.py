"""Does training with every Triton kernel follow training with the definitions? `TRITON_INTERPRET=1 python bench/loss_curve.py [STEPS]`.

A toy network (two blocks of width 32, two lanes, looped in the second half, bf16) on documents that repeat a phrase of their own,
200 steps: definitions, kernels, and the definitions with other seeds. One JSON line a curve, then the mean distance of the losses:
the kernels' must not be larger than what another seed does. In Triton's interpreter this takes minutes, so it is no test.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_gpt as tg

SMALL = dict(
    vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, xsa_last_n=2, rope_dims=4, loop_start=0, loop_end=0,
    num_loops=1, parallel_start_layer=1, gate_window=8, lqer_rank=2, lqer_asym_group=16, train_batch_tokens=64, train_microbatch_tokens=64,
    train_seq_len=32, train_seq_schedule="", ttt_eval_seq_len=64, eval_seq_len=64, caseops_enabled=False)
KERNELS = dict(mlp_kernel="lsb", qk_kernel="triton", xsa_kernel="triton", fused_ce_kernel="triton")


def write_data(folder: Path) -> Path:
    """One training and one validation shard of documents that repeat a phrase of their own."""
    rng = np.random.default_rng(0)
    for kind, count in (("train", 400), ("val", 10)):
        tokens = np.concatenate([np.append(tg.BOS_ID, np.resize(rng.integers(4, 64, size=rng.integers(3, 9)), rng.integers(8, 100)))
                                 for _ in range(count)])
        header = np.zeros(256, "<i4")
        header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(tokens)
        (folder / f"fineweb_{kind}_000000.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return folder


def curve(files: tg.Dataset, world: tg.World, steps: int, **changes) -> np.ndarray:
    """Losses of a run of `steps`, looped in the second half."""
    cfg = tg.Config(**SMALL, **changes)
    trainer = tg.Trainer(cfg, world, files, tg.choose_kernels(cfg, world))
    losses = [trainer.train_step(trainer.loader.next_step(), 32, k >= steps // 2, 0.3, 0.9) for k in range(steps)]
    trainer.loader.close()
    return np.array(losses)


def main() -> int:
    steps = int(sys.argv[1]) if sys.argv[1:] else 200
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    world = tg.World(0, 1, device, torch.bfloat16)
    runs = dict(definitions={}, **{f"seed {s}": dict(seed=s) for s in (1, 2, 3)}, kernels=KERNELS)
    with tempfile.TemporaryDirectory() as folder:
        files = tg.Dataset.open(tg.Config(**SMALL, data_path=str(write_data(Path(folder)))), need_train=True)
        curves = {}
        for name, changes in runs.items():
            start = time.perf_counter()
            curves[name] = curve(files, world, steps, **changes)
            print(json.dumps(dict(name=name, seconds=round(time.perf_counter() - start, 1),
                                  losses=[round(x, 4) for x in curves[name][:: max(1, steps // 20)].tolist()])), flush=True)
    distance = {name: float(np.abs(c - curves["definitions"]).mean()) for name, c in curves.items() if name != "definitions"}
    tail = {name: round(float(c[-steps // 4 :].mean()), 4) for name, c in curves.items()}
    print(json.dumps(dict(mean_distance=distance, mean_of_the_last_quarter=tail)))
    seeds = [d for name, d in distance.items() if name != "kernels"]
    follows = distance["kernels"] <= max(seeds)
    print(f"mean distance to the definitions: kernels {distance['kernels']:.4f}, other seeds {min(seeds):.4f} to {max(seeds):.4f}")
    return not follows


if __name__ == "__main__":
    sys.exit(main())
