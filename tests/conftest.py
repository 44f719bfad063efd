"""Shared fixtures: a network small enough for one core, and repetitive documents it can learn in seconds."""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers on two cores: spinning threads cost 10x
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before train_gpt is imported: kernels run on the CPU, one program after the other
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as tg

torch.set_num_threads(1)

TINY = dict(
    vocab_size=64, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, xsa_last_n=3, rope_dims=4, loop_start=1, loop_end=2,
    num_loops=1,
    parallel_start_layer=3, gate_window=8,
    train_batch_tokens=512, train_microbatch_tokens=256, train_seq_len=64,
    train_seq_schedule="32@0.5,64@1.0", seq_change_warmup_steps=2, compile_shape_warmup=False, warmup_steps=0, eval_seq_len=64,
    eval_stride=16, ttt_eval_seq_len=64, val_batch_tokens=2048, iterations=12, max_wallclock_seconds=0.0, train_seq_schedule_mode="step",
    muon_momentum_warmup_steps=4, ema_decay=0.5, train_log_every=1, gptq_calibration_batches=2, awq_lite_group_size=8, lqer_asym_group=16,
    lqer_rank=2, quant="s14",
    compressor="brotli", max_eval_seconds=0.0, ttt_lora_rank=4, ttt_lora_alpha=8.0, ttt_lora_lr=5e-3, ttt_batch_size=4,
    ttt_chunk_size=16, ttt_short_score_first_steps="40:8", ttt_lanes=2, phased_ttt_prefix_docs=6, global_ttt_chunk_tokens=64,
    global_ttt_batch_seqs=2,
)


def tiny_config(**changes) -> tg.Config:
    return tg.Config(**(TINY | changes))


def tiny_env(**changes) -> dict[str, str]:
    """The same as environment variables, for runs in a process of their own."""
    as_text = {k: str(int(v)) if isinstance(v, bool) else str(v) for k, v in (TINY | changes).items()}
    return {k.upper(): v for k, v in as_text.items()}


def write_shard(path: Path, tokens) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def documents(count: int, seed: int, vocab: int = 64, longest: int = 200) -> list[np.ndarray]:
    """Documents that repeat a short random phrase of their own: there is something to learn, most of it within a document."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        phrase = rng.integers(4, vocab, size=rng.integers(3, 9))
        size = int(rng.integers(8, longest))
        out.append(np.concatenate(([tg.BOS_ID], np.resize(phrase, size))))
    return out


def write_dataset(folder: Path, train_docs: int = 120, val_docs: int = 15, manifest: bool = True, vocab: int = 64) -> Path:
    """Two training shards, one validation shard with its sidecar, and a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    train = np.concatenate(documents(train_docs, 1, vocab))
    val = np.concatenate(documents(val_docs, 2, vocab))
    counts = np.where(val == tg.BOS_ID, 0, 1 + val % 3)
    half = len(train) // 2
    files = {"fineweb_train_000000.bin": train[:half], "fineweb_train_000001.bin": train[half:], "fineweb_val_000000.bin": val,
             "fineweb_val_bytes_000000.bin": counts}
    entries = []
    for name, tokens in files.items():
        write_shard(folder / name, tokens)
        entries.append(dict(file=name, tokens=len(tokens), sha256=tg.sha256_file(folder / name)))
    if manifest:
        splits = dict(
            train=dict(documents=[val_docs, val_docs + train_docs], tokens=len(train), shards=entries[:2]),
            val=dict(documents=[0, val_docs], tokens=len(val), bytes=int(counts.sum()), shards=entries[2:3], sidecar=entries[3:]))
        (folder / "manifest.json").write_text(json.dumps(dict(format=1, transform="caseops", vocab_size=vocab, splits=splits)))
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def world() -> tg.World:
    return tg.World(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def cfg(dataset) -> tg.Config:
    return tiny_config(data_path=str(dataset))


@pytest.fixture(scope="session")
def random_model(world):
    """Factory: a model whose every tensor is random, so that no gate, skip or projection hides behind its zero start."""

    def make(cfg: tg.Config, seed: int = 0) -> tg.GPT:
        model = tg.build_model(dataclasses.replace(cfg, seed=seed), world, tg.choose_kernels(cfg, world))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not name.startswith("softcap_"):
                    p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim < 3 else 0.1))
        return model

    return make


class Recording(TorchDispatchMode):
    """A CUDA graph without CUDA: what ran within `with` runs again by `replay`, on the same memory. What would wait for a device raises."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            raise AssertionError(f"{func} waits for the device: it can be in no CUDA graph")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        leaves = torch.utils._pytree.tree_leaves
        for func, args, kwargs, out in self.calls:
            if func.is_view:
                continue
            for old, new in zip(leaves(out), leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch, world) -> list[Recording]:
    """torch.cuda.make_graphed_callables as it is, on graphs that `Recording` fakes; the list fills as they are made."""
    made = []

    @contextlib.contextmanager
    def capture(graph, pool=None):
        assert pool == "pool"
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Recording()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    world.recordings.clear()
    return made
