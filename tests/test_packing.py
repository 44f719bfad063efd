"""PACKING: what goes in comes out, bit for bit; the same tensors give the same bytes; damage is named, never decoded."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings, strategies as st

import train_gpt as tg

ROOT = Path(__file__).parents[1]
LRZIP = shutil.which("lrzip")
PLAIN = ("brotli", "lzma")


def counting(dtype: torch.dtype, *shape: int, salt: int = 0) -> torch.Tensor:
    """Values from integer arithmetic alone, the same on every machine: the top bits of an LCG."""
    count, state, out = int(np.prod(shape)), 12345 + salt, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        out.append((state >> 16) % 31 - 15)
    return torch.tensor(out, dtype=torch.int32).view(shape).to(dtype)


def sample(layers: int = 2) -> dict[str, tg.Stored]:
    """Every stream, every codec and every dtype."""
    i8, i2, f2 = torch.int8, torch.int16, torch.float16
    out = {"tok_emb.weight": tg.Stored({
        ("gptq", "q"): counting(i8, 40, 8), ("gptq", "scale"): counting(f2, 40), ("gptq", "hi_start"): counting(i2, 1),
        ("gptq", "hi_size"): counting(i2, 1), ("gptq", "hi_scale"): counting(f2, 40, salt=1),
        ("low_rank_asym", "A"): counting(i8, 40, 2), ("low_rank_asym", "A_scale"): counting(f2, 1),
        ("low_rank_asym", "B"): counting(i8, 2, 8), ("low_rank_asym", "B_scale"): counting(f2, 4)})}  # fmt: skip
    for i in range(layers):
        for k, role in enumerate(("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")):
            rows = 24 if role == "mlp.fc" else 12
            out[f"blocks.{i}.{role}.weight"] = tg.Stored(
                {("gptq", "q"): counting(i8, rows, 8, salt=10 * i + k), ("gptq", "scale"): counting(f2, rows, salt=k)})
        out[f"blocks.{i}.attn.attn_gate_w"] = tg.Stored({("int8_row", "q"): counting(i8, 4, 6), ("int8_row", "scale"): counting(f2, 4)})
        out[f"blocks.{i}.attn.q_gain"] = tg.Stored({("float16", "w"): counting(f2, 4)})
    out["lm_head.weight"] = tg.Stored({("gptq", "q"): counting(i8, 40, 8, salt=99), ("gptq", "scale"): counting(f2, 40, salt=98)})
    out["softcap_pos"] = tg.Stored({("float16", "w"): torch.tensor(30.0).half()})
    return out


def same(a: dict[str, tg.Stored], b: dict[str, tg.Stored]) -> bool:
    """Bit for bit, NaN included: names, order, dtypes, shapes and bytes."""
    def flat(stored):
        return [(n, key, t.dtype, t.shape, t.numpy().tobytes()) for n, s in stored.items() for key, t in s.parts.items()]

    return list(a) == list(b) and flat(a) == flat(b)


@pytest.fixture
def zip_for_lrzip(monkeypatch):
    """The integer streams of COMPRESSOR=pergroup without the program: row orders and transposition are ours to test."""
    monkeypatch.setitem(tg.CODERS, "lrzip", (zlib.compress, zlib.decompress))


@pytest.mark.parametrize("compressor", PLAIN)
def test_unpack_inverts_pack(compressor):
    cfg = tiny_config(compressor=compressor)
    assert same(tg.unpack(cfg, tg.pack(cfg, sample())), sample())


def test_unpack_inverts_pack_with_rows_sorted_and_transposed(zip_for_lrzip):
    cfg = tiny_config(compressor="pergroup")
    blob = tg.pack(cfg, sample())
    assert same(tg.unpack(cfg, blob), sample())
    header, at = tg.read_header(blob)
    stream = zlib.decompress(blob[at : at + header["streams"][0][2]])
    q = sample()["tok_emb.weight"].parts["gptq", "q"].numpy()
    assert stream == np.ascontiguousarray(q[tg.similarity_order(q)].T).tobytes()
    sorted_ones = [n for n in sample() if n.endswith(("tok_emb.weight", "c_q.weight", "fc.weight"))]
    orders = 2 * sum(len(sample()[n].parts["gptq", "q"]) for n in sorted_ones)
    assert {name: raw for name, _, _, raw in header["streams"]}["row_order"] == orders


@pytest.mark.parametrize("program", ["present", "missing"])
def test_pergroup_with_the_real_program_or_a_clear_refusal(program, monkeypatch):
    cfg = tiny_config(compressor="pergroup")
    if program == "present" and LRZIP:
        blob = tg.pack(cfg, sample())
        assert tg.pack(cfg, sample()) == blob
        assert same(tg.unpack(cfg, blob), sample())
        assert {coder for _, coder, _, _ in tg.read_header(blob)[0]["streams"]} == {"lrzip", "brotli"}
        return
    monkeypatch.setenv("PATH", "")
    with pytest.raises(tg.RunError, match=r"lrzip.*apt-get install lrzip.*COMPRESSOR=brotli"):
        tg.pack(cfg, sample())
    monkeypatch.setitem(tg.CODERS, "lrzip", (zlib.compress, tg.CODERS["lrzip"][1]))  # packed elsewhere, opened here
    with pytest.raises(tg.RunError, match="apt-get install lrzip"):
        tg.unpack(cfg, tg.pack(cfg, sample()))


def test_a_failing_program_is_reported_with_its_words(monkeypatch, tmp_path):
    (tmp_path / "lrzip").write_text("#!/bin/sh\necho disk is made of cheese >&2\nexit 3\n")
    (tmp_path / "lrzip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(tg.RunError, match="exit code 3: disk is made of cheese"):
        tg.pack(tiny_config(compressor="pergroup"), sample())


@pytest.mark.parametrize("compressor", PLAIN)
def test_same_tensors_same_bytes(compressor):
    cfg = tiny_config(compressor=compressor)
    assert tg.pack(cfg, sample()) == tg.pack(cfg, sample())


FRESH = """
import sys, hashlib
sys.path[:0] = {paths!r}
import test_packing as t, train_gpt as tg, zlib
tg.CODERS["lrzip"] = (zlib.compress, zlib.decompress)
print(hashlib.sha256(tg.pack(t.tiny_config(compressor="pergroup"), t.sample())).hexdigest())
"""


def test_same_bytes_in_another_process_with_other_threads(zip_for_lrzip):
    here = hashlib.sha256(tg.pack(tiny_config(compressor="pergroup"), sample())).hexdigest()
    code = FRESH.format(paths=[str(ROOT), str(ROOT / "tests")])
    env = os.environ | dict(OMP_NUM_THREADS="2", PYTHONHASHSEED="7")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == here, done.stderr


# The bytes of a fixed artifact. If this fails, an artifact on somebody's disk now means something else or no longer opens:
# bump ARTIFACT_VERSION, then put the new digest here. Streams are compared uncoded: brotli may improve between versions.
GOLDEN = "1bcb2af85a7067b182e86c1c080d63f7642ebe9946ce8f027334ca2b4240f105"


def uncoded(blob: bytes) -> bytes:
    header, at = tg.read_header(blob)
    out = blob[:6] + json.dumps(header["arrays"], separators=(",", ":")).encode()
    for name, coder, coded, raw in header["streams"]:
        out += f"{name} {coder} {raw}".encode() + (tg.CODERS[coder][1](blob[at : at + coded]) if coded else b"")
        at += coded
    return out


def test_golden_digest(zip_for_lrzip):
    both = b"".join(uncoded(tg.pack(tiny_config(compressor=c), sample())) for c in ("pergroup", "brotli"))
    assert hashlib.sha256(both).hexdigest() == GOLDEN


def test_the_documented_layout_parsed_by_hand():
    cfg = tiny_config(compressor="brotli")
    blob = tg.pack(cfg, sample())
    version, size = struct.unpack("<HI", blob[4:10])
    assert (blob[:4], version) == (b"PGA1", tg.ARTIFACT_VERSION)
    assert blob[10:26] == hashlib.blake2b(blob[4:10] + blob[26:], digest_size=16).digest()
    header = json.loads(brotli.decompress(blob[26 : 26 + size]))
    assert list(header) == ["model", "arrays", "streams"]
    assert header["model"] == {name: getattr(cfg, name) for name in tg.MODEL_FIELDS}
    assert [name for name, *_ in header["streams"]] == list(tg.STREAMS)
    assert 26 + size + sum(coded for _, _, coded, _ in header["streams"]) == len(blob)
    arrays = [[n, c, p, tg.DTYPE_NAMES[t.dtype], list(t.shape)] for n, s in sample().items() for (c, p), t in s.parts.items()]
    assert [a[:5] for a in header["arrays"]] == arrays
    at, rest = 26 + size, b""
    for name, coder, coded, raw in header["streams"]:
        data = brotli.decompress(blob[at : at + coded]) if coded else b""
        assert coder == "brotli" and len(data) == raw
        rest, at = (data if name == "rest" else rest), at + coded
    scale = sample()["tok_emb.weight"].parts["gptq", "scale"].numpy()
    assert rest.startswith(scale.tobytes()[0::2] + scale.tobytes()[1::2]), "byte planes, in header order"


@pytest.mark.parametrize("compressor", ["brotli", "pergroup"])
def test_bytes_by_part_add_up(compressor, zip_for_lrzip):
    blob = tg.pack(tiny_config(compressor=compressor), sample())
    parts = tg.bytes_by_part(blob)
    assert sum(parts.values()) == len(blob)
    assert list(parts) == ["header", *tg.STREAMS]
    assert all(parts[s] > 0 for s in tg.STREAMS if s != "row_order") and (parts["row_order"] > 0) == (compressor == "pergroup")


SHAPES = st.one_of(st.just(()), st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))


@st.composite
def any_array(draw, shapes=SHAPES):
    dtype = draw(st.sampled_from(["i1", "i2", "f2"]))
    shape = draw(shapes)
    size = int(np.prod(shape)) * int(dtype[1])
    constant = st.sampled_from([0, 127, 128, 255]).map(lambda byte: bytes([byte]) * size)
    raw = draw(constant | st.binary(min_size=size, max_size=size))
    return torch.from_numpy(np.frombuffer(raw, "<" + dtype).reshape(shape).copy())


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.tuples(st.text(max_size=9), st.sampled_from("xyz")), any_array(), max_size=6),
       st.sampled_from([*PLAIN, "pergroup"]))  # fmt: skip
def test_any_arrays_survive(parts, compressor):
    stored = {}
    for (name, part), t in parts.items():
        stored.setdefault(name, tg.Stored({})).parts["float16", part] = t
    cfg = tiny_config(compressor=compressor)  # no integer matrices, so pergroup needs no program
    assert same(tg.unpack(cfg, tg.pack(cfg, stored)), stored)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(0, 7), st.sampled_from([name for name, *_ in tg.STREAM_RULES[:-1]]), st.data())
def test_any_integer_matrix_survives_sorting(rows, cols, rule, data):
    q = np.frombuffer(data.draw(st.binary(min_size=rows * cols, max_size=rows * cols)), np.int8).reshape(rows, cols).copy()
    stored = {rule.split(":")[0].replace("*", "3"): tg.Stored({("gptq", "q"): torch.from_numpy(q)})}
    cfg = tiny_config(compressor="pergroup")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tg.CODERS, "lrzip", (zlib.compress, zlib.decompress))
        assert same(tg.unpack(cfg, tg.pack(cfg, stored)), stored)


def greedy(q: np.ndarray) -> list[int]:
    order = [0]
    while len(order) < len(q):
        left = [i for i in range(len(q)) if i not in order]
        order.append(min(left, key=lambda i: (int(np.abs(q[i].astype(int) - q[order[-1]].astype(int)).sum()), i)))
    return order


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.integers(1, 6), st.sampled_from([2, 16, 256]), st.integers(0, 2**32 - 1))
def test_similarity_order_is_the_greedy_chain(rows, cols, values, seed):
    q = (np.random.default_rng(seed).integers(0, values, (rows, cols)) - values // 2).astype(np.int8)  # few values: many ties
    order = tg.similarity_order(q)
    assert order.dtype == np.uint16 and sorted(order.tolist()) == list(range(rows))
    assert order.tolist() == greedy(q)


@settings(max_examples=60, deadline=None)
@given(any_array())
def test_byte_planes_round_trip(t):
    a = t.numpy()
    planes = tg.byte_planes(a)
    assert planes.tobytes() == b"".join(a.tobytes()[k :: a.itemsize] for k in range(a.itemsize))
    assert tg.from_byte_planes(planes.tobytes(), a.dtype.str, a.shape).tobytes() == a.tobytes()


def test_truncation_is_reported_at_every_length():
    cfg = tiny_config()
    blob = tg.pack(cfg, sample())
    for length in [*range(80), *range(80, len(blob), 37), len(blob) - 1]:
        with pytest.raises(tg.ArtifactError, match=r"no artifact|damaged"):
            tg.unpack(cfg, blob[:length])
    with pytest.raises(tg.ArtifactError, match="damaged"):
        tg.unpack(cfg, blob + b"\0")


def test_bit_flips_are_reported():
    cfg, rng = tiny_config(), np.random.default_rng(0)
    blob = tg.pack(cfg, sample())
    bits = [*range(26 * 8), *rng.integers(26 * 8, len(blob) * 8, 300).tolist()]  # the whole fixed header, then anywhere
    for bit in bits:
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(tg.ArtifactError, match=r"no artifact|version|damaged"):
            tg.unpack(cfg, bytes(damaged))


def test_other_files_other_versions_and_other_models_are_refused(monkeypatch):
    cfg = tiny_config()
    blob = tg.pack(cfg, sample())
    with pytest.raises(tg.ArtifactError, match="PGA1"):
        tg.unpack(cfg, b"PK\x03\x04" + bytes(100))
    monkeypatch.setattr(tg, "ARTIFACT_VERSION", 7)
    newer = tg.pack(cfg, sample())
    monkeypatch.undo()
    with pytest.raises(tg.ArtifactError, match=r"version 7; this script reads version \d"):
        tg.unpack(cfg, newer)
    with pytest.raises(tg.ArtifactError, match=r"MODEL_DIM: artifact 32, this run 64.*LN_SCALE: artifact True, this run False") as error:
        tg.unpack(tiny_config(model_dim=64, ln_scale=False, matrix_lr=0.5), blob)
    assert "MATRIX_LR" not in str(error.value)
    tg.unpack(tiny_config(matrix_lr=0.5, seed=9, iterations=3), blob)


def test_every_variable_that_shapes_the_network_is_checked(random_model):
    """A field of the MODEL group of Config that changes the network but not the check would load garbage quietly."""
    names = [f.name for f in tg.fields(tg.Config)]
    group = set(names[names.index("num_layers") : names.index("tied_embed_init_std")]) | {"vocab_size"}
    only_at_the_start = {"qk_gain_init", "gated_attn_init_std", "sparse_attn_gate_init_std", "fused_ce_enabled"}
    assert group - set(tg.MODEL_FIELDS) == only_at_the_start
    assert set(tg.MODEL_FIELDS) <= group


def test_a_model_comes_back_from_disk_as_it_was_quantized(random_model, world, tmp_path):
    cfg = tiny_config(lqer_enabled=False, awq_lite_enabled=False)
    model = random_model(cfg)
    hessians, tasks = tg.Hessians(), tg.gptq_tasks(cfg, tg.unbank(cfg, model.state_dict()))
    for t in tasks:
        hessians.H[t.site], hessians.count[t.site] = torch.eye(t.W.shape[1]), 1
    stored = tg.quantize(cfg, model.state_dict(), hessians, lambda line: None)
    path = tmp_path / "artifact"
    with pytest.raises(tg.ArtifactError, match=r"cannot read .*ARTIFACT_DIR"):
        tg.load_artifact(cfg, world, path)
    path.write_bytes(tg.pack(cfg, stored))
    loaded = tg.load_artifact(cfg, world, path)
    assert not any(p.requires_grad for p in loaded.parameters())
    expected = tg.dequantized_state(cfg, stored)
    assert all(torch.equal(t, expected[n]) for n, t in loaded.state_dict().items())


def test_upstream_code_bytes_of_the_readable_and_the_packed_script(tmp_path):
    packed = tmp_path / "train_gpt.py"
    script = (sys.executable, str(ROOT / "tools" / "pack_code.py"), str(ROOT / "train_gpt.py"))
    subprocess.run([*script, str(packed)], check=True, capture_output=True)
    code = f"import runpy; print(runpy.run_path({str(packed)!r})['upstream_code_bytes']())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    readable, from_packed = tg.upstream_code_bytes(), int(done.stdout or -1)
    assert isinstance(readable, int) and 10_000 < readable < 60_000
    assert abs(from_packed - readable) < 0.2 * readable, done.stderr  # the packed source is renamed: about the same size
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "python_minifier", None)
        assert tg.upstream_code_bytes() is None
