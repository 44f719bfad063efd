"""Artifacts are read by people who did not write them: whatever the bytes, unpack returns the model's tensors or says why not.

    python tests/test_artifact_fuzz.py 100000 [SEED [COMPRESSOR]]     # as many mutations, the worst time and memory; exits 1 on a finding

The checksum catches accidents, not intent, so most mutations below carry a valid one.
"""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_packing import GOLDEN_CONFIG

import train_gpt as tg

DATA, VERSIONS = Path(__file__).parent / "data", (3, 4)
COMPRESSORS = ("range", "brotli", *(("pergroup",) if shutil.which("lrzip") else ()))
HOSTILE_VALUES = (
    -1, 0, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), True, None, "", "q", "gptq", "low_rank", "range", "brotli", "pergroup",
    [], [[]], {}, {"a": 1}, [-1], [-7], [0, 0], [2**40, 2**40], [0, 2**62], "x" * 1000, [["gptq", "q", [-1, -2]]] * 500,
)  # fmt: skip


SMALL = GOLDEN_CONFIG | dict(vocab_size=20, num_layers=1, model_dim=8, num_heads=1, xsa_last_n=1, loop_end=0, parallel_start_layer=0)


def small_tensors() -> dict[str, tg.QuantizedTensor]:
    """Every codec, on a model so small that a mutation takes milliseconds."""
    rng, out = np.random.default_rng(0), {}
    for name, shape in tg.tensor_shapes(tiny_config(**SMALL)).items():
        codec = tg.codec_of(tiny_config(**SMALL), tg.stored_matrices(tiny_config(**SMALL))[name])
        w = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
        if codec == "gptq":
            q, scale = torch.from_numpy(rng.integers(-31, 32, shape).astype(np.int8)), torch.rand(shape[0]).half() + 1
            parts = {(codec, part): t for part, t in tg.Gptq.encode(q, scale, scale, [0] if name == "tok_emb.weight" else [], 4).items()}
            parts |= {("low_rank_asym", part): t for part, t in tg.LowRankAsym.encode(w[:, :2], w[:2], 4).items()} if "fc" in name else {}
        else:
            parts = {(codec, part): t for part, t in tg.CODECS[codec].encode(w).items()}
        out[name] = tg.QuantizedTensor(parts)
    return out


@cache
def seeds() -> list[tuple[tg.Config, bytes]]:
    """Valid artifacts and who reads them: every version as it was committed, and a small one of every compressor."""
    files = [(tiny_config(**GOLDEN_CONFIG), (DATA / f"artifact_v{version}.bin").read_bytes()) for version in VERSIONS]
    configs = [tiny_config(**SMALL, compressor=c) for c in COMPRESSORS]
    return files + [(cfg, tg.pack(cfg, small_tensors())) for cfg in configs]


def forge(version: int, head: bytes, streams: bytes) -> bytes:
    """An artifact with a checksum that is right."""
    prefix = struct.pack("<HI", version, len(head))
    return b"PGA1" + prefix + hashlib.blake2b(prefix + head + streams, digest_size=16).digest() + head + streams


def split(blob: bytes) -> tuple[int, bytes, bytes]:
    version, size = struct.unpack("<HI", blob[4:10])
    return version, blob[26 : 26 + size], blob[26 + size :]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, count = rng.randrange(len(out) + 1), rng.choice([1, 1, 4, 40])
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + count] = rng.randbytes(count)
        elif kind == 2:
            del out[at : at + count]
        elif kind == 3:
            out[at:at] = rng.randbytes(count)
        else:
            out[at : at + count] = bytes([rng.choice([0, 255])]) * count
    return bytes(out)


def mutate_json(rng: random.Random, value):
    """One place somewhere inside is replaced, removed, repeated or swapped with its neighbour."""
    if not isinstance(value, (list, dict)) or not value or rng.random() < 0.1:
        return rng.choice(HOSTILE_VALUES) if rng.random() < 0.7 or not isinstance(value, int) else value + rng.choice([-1, 1, 7])
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, out = rng.choice(keys), value.copy()
    kind = rng.randrange(6)
    if kind == 0:
        del out[key]
    elif kind == 1 and isinstance(value, list):
        out.insert(key, out[key])
    elif kind == 2 and isinstance(value, list):
        other = rng.choice(keys)
        out[key], out[other] = out[other], out[key]
    else:
        out[key] = mutate_json(rng, out[key])
    return out


def mutate(rng: random.Random, blob: bytes) -> bytes:
    version, head, streams = split(blob)
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(rng, blob)
    if kind == 1:
        return blob[: rng.choice([rng.randrange(30), rng.randrange(len(blob))])]
    if kind == 2:
        return forge(rng.choice([0, 2, 3, 4, 5, 65535]), head, streams)
    if kind == 3:
        return forge(version, mutate_bytes(rng, head), streams)
    if kind == 4:
        return forge(version, head, mutate_bytes(rng, streams))
    if kind == 5:  # bytes move, sizes stay
        damaged = mutate_bytes(rng, streams)
        return forge(version, head, (damaged + bytes(len(streams)))[: len(streams)])
    header = json.loads(brotli.decompress(head))
    for _ in range(rng.choice([1, 1, 2, 3])):
        header = mutate_json(rng, header)
    text = json.dumps(header).encode()
    return forge(version, brotli.compress(mutate_bytes(rng, text) if kind == 7 else text, quality=1), streams)


def outcome(cfg: tg.Config, blob: bytes) -> str:
    """ "tensors" or the refusal; any other exception is a finding."""
    try:
        stored = tg.unpack(cfg, blob)
        tg.bytes_by_part(blob)
    except tg.ArtifactError as e:
        return str(e)
    shapes = tg.tensor_shapes(cfg)
    assert list(stored) == list(shapes)
    for s in stored.values():
        for (codec, part), t in s.parts.items():
            assert t.dtype == {"i1": torch.int8, "i2": torch.int16, "f2": torch.float16}[tg.CODEC_PARTS[codec][part]]
    return "tensors"


def load(cfg: tg.Config, blob: bytes, folder: Path, world) -> None:
    """The same through `load_artifact`, which decodes what `unpack` returned."""
    (folder / "artifact").write_bytes(blob)
    try:
        model = tg.load_artifact(cfg, world, folder / "artifact")
    except tg.ArtifactError:
        return
    assert [p.shape for p in model.state_dict().values()] == [p.shape for p in tg.GPT(cfg).state_dict().values()]


def test_mutations(tmp_path, world):
    rng, base, seen = random.Random(0), [(cfg, b) for cfg, b in seeds() if tg.read_header(b).compressor != "pergroup"], []
    for i in range(1500):
        cfg, blob = rng.choice(base)
        blob = mutate(rng, blob)
        seen.append(outcome(cfg, blob))
        if seen[-1] == "tensors" and i % 10 == 0:
            load(cfg, blob, tmp_path, world)
    refusals = {"no artifact", "damaged artifact", "artifact version", "the header of this", "this artifact makes", "the artifact belongs"}
    assert refusals | {"tensors"} <= {r if r == "tensors" else next((x for x in refusals if r.startswith(x)), r) for r in seen}


BOMB, LIMIT = 96 << 20, 48 << 20


@cache
def bomb(name: str) -> bytes:
    """A small artifact that claims, or expands to, far more than the model."""
    zeros = bytes(BOMB)
    if name == "header":
        return forge(4, brotli.compress(zeros, quality=1), b"")
    coder = name.split()[0]
    version, head, streams = split(seeds()[len(VERSIONS) + COMPRESSORS.index(coder)][1])
    header = json.loads(brotli.decompress(head))
    if coder == "range":
        q, size = ["gptq", "q", [-1, -2]], ["gptq", "hi_size", [1]]
        kinds = dict(large=[["low_rank", "A", [2**16, 2**16]]], many=[q] * 10**5, twice=[size] * 2)
        header[3] = [kinds[name.split()[1]]] * len(header[3])
    else:
        streams = brotli.compress(zeros, quality=1)
        header[2] = [len(streams)] + [0] * (len(tg.STREAMS) - 1)
    return forge(version, brotli.compress(json.dumps(header).encode(), quality=1), streams)


BOMBS = ("header", "brotli stream", "range large", "range many", "range twice")
MEASURE = f"""
import resource, sys
sys.path[:0] = {[str(DATA.parent), str(DATA.parents[1])]!r}
import test_artifact_fuzz as t
cfg, blob = t.seeds()[len(t.VERSIONS)]
t.outcome(cfg, blob)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    print(t.outcome(cfg, t.Path(path).read_bytes()))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_bombs_are_refused_in_little_memory(tmp_path):
    for i, name in enumerate(BOMBS):
        (tmp_path / str(i)).write_bytes(bomb(name))
    done = subprocess.run([sys.executable, "-c", MEASURE, *(tmp_path / str(i) for i in range(len(BOMBS)))], capture_output=True, text=True)
    *refusals, grown = done.stdout.splitlines()
    known = "this artifact makes no sense|the header of this artifact|stream .* of the artifact"
    assert len(refusals) == len(BOMBS) and all(re.match(known, r) for r in refusals), done.stderr
    assert int(grown) < LIMIT


def test_bombs_are_bombs():
    """The check above can fail: what it refuses would have been more than it allows."""
    sizes = [len(brotli.decompress(bomb("header")[26:])), len(brotli.decompress(split(bomb("brotli stream"))[2]))]
    assert sizes == [BOMB] * 2 and BOMB > LIMIT


@pytest.mark.parametrize("part, value", [("scale", np.inf), ("w", np.nan)])
def test_numbers_that_are_none(part, value):
    """No packer of ours writes them; forged from an artifact whose streams are plain bytes."""
    cfg, blob = seeds()[len(VERSIONS) + COMPRESSORS.index("brotli")]
    version, head, _ = split(blob)
    header, stored = json.loads(brotli.decompress(head)), small_tensors()
    first = next(parts for parts in (s.parts for s in stored.values()) for key in parts if key[1] == part)
    next(t for key, t in first.items() if key[1] == part).fill_(value)
    streams = tg.encode_streams(cfg, tg.arrays_of(stored))
    header[2] = [len(data) for data in streams.values()]
    forged = forge(version, brotli.compress(json.dumps(header).encode()), b"".join(streams.values()))
    assert "not all finite" in outcome(cfg, forged)


HOSTS = dict(  # programs that do what a hostile stream might talk lrzip into
    hang="while :; do :; done", disk="sleep 0.2; head -c 1000000 /dev/zero > $6",
    memory=f"exec {sys.executable} -c 'x = bytearray(1 << 30); open(\"out\", \"w\")'",
)  # fmt: skip


@pytest.mark.parametrize("what", HOSTS)
def test_lrzip_is_limited_by_the_size_that_it_announces(what, monkeypatch, tmp_path):
    (tmp_path / "lrzip").write_text(f"#!/bin/sh\nset -e\n{HOSTS[what]}\n")
    (tmp_path / "lrzip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(tg.ArtifactError, match="lrzip -d failed with exit code"):
        tg.Lrzip.decode(b"LRZI\0\6" + (20).to_bytes(8, "little") + bytes(20), 20)


@pytest.mark.skipif("pergroup" not in COMPRESSORS, reason="needs lrzip")
def test_lrzip_has_what_honest_streams_need():
    data = np.random.default_rng(0).normal(size=100_000).astype(np.float16).view(np.int8).tobytes()
    decode = tg.Lrzip.decode
    coded = tg.Lrzip.encode(data)
    assert decode(coded, len(data)) == data
    for damaged in (coded[: len(coded) // 2], coded[:30] + bytes(100) + coded[130:], coded[:24]):
        with pytest.raises(tg.ArtifactError, match="lrzip -d failed"):
            decode(damaged, len(data))


def main(count: int, seed: int, compressor: str = "") -> int:
    """Fuzz `count` times; print findings, outcomes, and the worst time and memory. Returns the exit code."""
    rng, tally, findings, worst = random.Random(seed), {}, 0, 0.0
    weights = [20 if len(blob) < 2000 else 1 for _, blob in seeds()[:-1]] + [0.1 if "pergroup" in COMPRESSORS else 20]
    weights = [w * (compressor in ("", cfg.compressor)) for w, (cfg, _) in zip(weights, seeds(), strict=True)]
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def seconds() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    for i in range(1, count + 1):
        ((cfg, blob),) = rng.choices(seeds(), weights)
        blob, begin = mutate(rng, blob), seconds()
        try:
            result = re.split(r"[:;(]|\d", outcome(cfg, blob))[0][:40]
        except Exception as e:  # a finding: anything but ArtifactError
            result, findings = f"{type(e).__name__}: {e}"[:100], findings + 1
            Path(f"finding_{seed}_{i}.bin").write_bytes(blob)
        tally[result] = tally.get(result, 0) + 1
        worst = max(worst, seconds() - begin)
        if i == count or i % 5000 == 0:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
            print(f"{i} mutations, {findings} findings, worst {worst:.2f} CPU s, memory grew by {grown:.0f} MB {tally}", flush=True)
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main(*map(int, (sys.argv[1:3] + ["10000", "1"][len(sys.argv) - 1 :])), *sys.argv[3:]))
