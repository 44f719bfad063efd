"""Quantization and packing at full size: S14's network, 35.9M weights, without training. `python bench/full_size.py [s14] [rd] [search]`

Weights are drawn (Gaussian, rows and columns of different scale), calibration is 4,096 random tokens, so only seconds, bytes and
memory mean anything here; seconds are by the clock and of the processor. One JSON line a part, each in a process of its own so that
the peak memory is its own: s14 and rd: calibration, one pass, pack and unpack with COMPRESSOR=range, and whether the tensors come
back; search: TARGET_BYTES=16000000.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_gpt as tg

PARTS = dict(s14=dict(QUANT="s14"), rd=dict(QUANT="rd", TARGET_BYTES="0", RD_LOSS="0.001"), search=dict(QUANT="rd", RD_LOSS="1e-6"))
SMALL = dict(DEVICE="cpu", COMPRESSOR="range", TRAIN_BATCH_TOKENS="4096", TRAIN_MICROBATCH_TOKENS="4096", TRAIN_SEQ_LEN="1024",
             TRAIN_SEQ_SCHEDULE="", ROPE_TRAIN_SEQ_LEN="1024", GPTQ_CALIBRATION_BATCHES="1")


def drawn_model(cfg: tg.Config, world: tg.World) -> tg.GPT:
    """Matrices of spread 0.02: every row and column with a scale of its own."""
    model, generator = tg.build_model(cfg, world, tg.choose_kernels(cfg, world)), torch.Generator().manual_seed(cfg.seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("_bank", "tok_emb.weight")):
                rows, cols = (torch.randn(n, generator=generator) for n in ((*p.shape[:-1], 1), p.shape[-1]))
                p.copy_(0.02 * torch.randn(p.shape, generator=generator) * (0.15 * rows + 0.1 * cols).exp())
    return model


def random_tokens(cfg: tg.Config, folder: Path) -> Path:
    """A training shard of random tokens."""
    tokens = np.random.default_rng(cfg.seed).integers(2, cfg.vocab_size, 16384).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    (folder / "fineweb_train_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
    return folder / "fineweb_train_000000.bin"


def measure(part: str) -> dict:
    """One part, in this process."""
    cfg, seconds = tg.config_from_env(SMALL | PARTS[part]), {}
    world = tg.World(0, 1, torch.device("cpu"), torch.float32)

    def timed(name: str, f):
        start, cpu = time.perf_counter(), time.process_time()
        result = f()
        seconds[name] = [round(time.perf_counter() - start, 2), round(time.process_time() - cpu, 2)]
        return result

    model, passes = drawn_model(cfg, world), []
    with tempfile.TemporaryDirectory() as folder:
        files = type("Files", (), dict(train=(random_tokens(cfg, Path(folder)),)))
        hessians = timed("calibration", lambda: tg.collect_hessians(cfg, world, model, files, print))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    if part == "search":
        code = len(Path(tg.__file__).read_bytes()) // 4  # about what the packed script takes
        stored, blob = timed("search", lambda: tg.quantize_to_fit(cfg, state, hessians, code, passes.append))
    else:
        code, stored = 0, timed("quantize", lambda: tg.quantize(cfg, state, hessians, lambda line: None))
    blob = timed("pack", lambda: tg.pack(cfg, stored))
    back = timed("unpack", lambda: tg.unpack(cfg, blob))
    if any(not torch.equal(t, back[name].parts[key]) for name, s in stored.items() for key, t in s.parts.items()):
        raise SystemExit(f"{part}: tensors do not survive packing")
    weights = sum(p.numel() for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(part=part, weights=weights, bytes=len(blob), with_script=len(blob) + code,
                bits_per_weight=round(8 * len(blob) / weights, 4), seconds=seconds, peak_gib=round(peak, 2),
                threads=torch.get_num_threads(), passes=[p for p in passes if p.startswith("rd:")])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        for name in sys.argv[1:] or PARTS:
            subprocess.run([sys.executable, __file__, "--one", name], check=True)
