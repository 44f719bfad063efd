"""tools/size.py: the shares add up, the entropy is that of the symbols, tiles fill their rectangle, one kind costs what it costs."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config
from hypothesis import given, settings, strategies as st
from test_quantization import fake_hessians

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import size


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, dataset, random_model):
    """A quantized run: weights, artifact and result."""
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny_config(data_path=str(dataset), matrix_bits=4, artifact_dir=str(folder))
    model = random_model(cfg)
    tasks = tg.gptq_inputs(cfg, tg.unbank(cfg, model.state_dict()))
    stored = tg.quantize(cfg, model.state_dict(), fake_hessians(cfg, tasks), lambda line: None)
    (folder / "final_model.int6.ptz").write_bytes(tg.pack(cfg, stored))
    tg.save_tensors(folder / "final_model.pt", model.state_dict())
    result = dict(preset="s14", overrides=tg.overrides(cfg), artifact_file="final_model.int6.ptz", code_bytes=1234)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_the_shares_add_up_to_the_files(run_folder):
    cfg, artifact, result = size.open_run(run_folder)
    assert cfg == tiny_config(data_path=cfg.data_path, matrix_bits=4, artifact_dir=str(run_folder))
    blob = artifact.read_bytes()
    items = size.inventory(cfg, blob, result["code_bytes"])
    assert sum(i.bytes for i in items) == pytest.approx(len(blob) + 1234, rel=1e-9)
    by_stream = tg.bytes_by_part(blob)
    for stream, pattern in (("tok_emb", "tok_emb.weight"), ("mlp.fc", ".mlp.fc."), ("attn.c_k", ".c_k.")):
        got = sum(i.bytes for i in items if pattern in i.tensor and i.part == "weights")
        assert got == pytest.approx(by_stream[stream]), "a stream of one kind is that kind's"
    kinds = size.grouped(items, lambda i: i.kind)
    assert list(kinds) == ["embedding", "attn q", "attn k", "attn v", "attn o", "mlp up", "mlp down", "small", "header", "code"]
    assert kinds["mlp up"]["count"] == 4 * 128 * 32 and kinds["code"]["bytes"] == 1234
    assert sum(g["low-rank"] > 0 for g in kinds.values()) > 0 and all(g["scales"] > 0 for k, g in kinds.items() if k in size.KINDS)
    tensors = size.grouped(items, lambda i: i.tensor)
    assert sum(g["bytes"] for g in tensors.values()) == pytest.approx(sum(g["bytes"] for g in kinds.values()))
    alone = size.open_run(artifact)
    assert size.inventory(alone[0], blob, 1234) == items


def test_range_coded_streams_are_shared_out_by_code_length(run_folder, tmp_path):
    cfg, artifact, _ = size.open_run(run_folder)
    cfg = dataclasses.replace(cfg, compressor="range")
    stored = tg.unpack(cfg, artifact.read_bytes())
    blob = tg.pack(cfg, stored)
    items = size.inventory(cfg, blob, 0)
    assert sum(i.bytes for i in items) == pytest.approx(len(blob), rel=1e-9)
    arrays = {f"{n}:{codec}.{part}": t.numpy() for n, s in stored.items() for (codec, part), t in s.parts.items()}
    bits = dict(zip(arrays, tg.coded_bits(cfg, arrays), strict=True))
    fc = {i.tensor: i.bytes for i in items if ".mlp.fc." in i.tensor and i.part == "weights"}
    for name, share in fc.items():
        assert share / sum(fc.values()) == pytest.approx(bits[f"{name}:gptq.q"] / sum(bits[f"{n}:gptq.q"] for n in fc), rel=1e-3)
    (tmp_path / "final_model.int6.ptz").write_bytes(blob)
    assert size.main([str(tmp_path / "final_model.int6.ptz"), "--out", str(tmp_path / "size.png")]) == 0


@given(st.lists(st.integers(-3, 3), max_size=60), st.sampled_from(["i1", "f2"]))
def test_entropy_is_that_of_the_symbols_byte_by_byte(values, dtype):
    a = np.array(values, dtype)
    expected = 0.0
    for plane in a.view(np.uint8).reshape(len(a), a.itemsize).T.tolist():
        for symbol in set(plane):
            expected -= plane.count(symbol) * np.log2(plane.count(symbol) / len(plane))
    assert size.entropy_bits(a) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=30), st.floats(1, 50), st.floats(1, 50))
@settings(deadline=None)
def test_tiles_fill_the_rectangle_without_overlap(sizes, w, h):
    sizes = sorted(sizes, reverse=True)
    tiles = size.squarify(sizes, 2.0, 3.0, w, h)
    for s, (x, y, c, d) in zip(sizes, tiles, strict=True):
        assert c * d == pytest.approx(w * h * s / sum(sizes), rel=1e-6)
        assert x >= 2 - 1e-6 and y >= 3 - 1e-6 and x + c <= 2 + w + 1e-6 and y + d <= 3 + h + 1e-6
    for i, (x, y, c, d) in enumerate(tiles):
        for a, b, e, f in tiles[:i]:
            assert min(x + c, a + e) - max(x, a) < 1e-6 or min(y + d, b + f) - max(y, b) < 1e-6


def test_equal_tiles_in_a_square_are_squares():
    assert all(c == pytest.approx(d) for _, _, c, d in size.squarify([1.0] * 9, 0, 0, 3, 3))


def test_sensitivity_is_the_change_of_the_score(run_folder, world):
    cfg, artifact, _ = size.open_run(run_folder)
    changes, before = size.sensitivity(cfg, artifact, False, 0.5)
    c = dataclasses.replace(cfg, val_doc_fraction=0.5)
    data = tg.ValData.load(c, tg.Dataset.open(c, need_train=False))
    exact = tg.load_checkpoint_model(c, world, run_folder / "final_model.pt")
    assert before == pytest.approx(tg.evaluate(c, world, exact, tg.Scorer(data, world)).bpb)
    quantized = tg.load_artifact(c, world, artifact)
    assert changes["all"] == pytest.approx(tg.evaluate(c, world, quantized, tg.Scorer(data, world)).bpb - before, abs=1e-9)
    stored = tg.unpack(c, artifact.read_bytes())
    with torch.no_grad():
        for i in range(4):
            exact.mlp_up_bank[i] = stored[f"blocks.{i}.mlp.fc.weight"].decode()
    assert changes["mlp up"] == pytest.approx(tg.evaluate(c, world, exact, tg.Scorer(data, world)).bpb - before, abs=1e-9)
    assert changes["mlp up"] != 0 and set(changes) == {*size.KINDS, "all"}


def test_the_command(run_folder, tmp_path, capsys):
    out = tmp_path / "size.png"
    assert size.main([str(run_folder), "--out", str(out), "--sensitivity", "tensor", "--docs", "0.2"]) == 0
    text = capsys.readouterr().out
    assert out.read_bytes()[:4] == b"\x89PNG" and "blocks.3.mlp.proj.weight" in text and "val_bpb" in text and "low-rank" in text
    assert size.main([str(run_folder), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert sum(numbers["parts"].values()) == pytest.approx(numbers["artifact_bytes"] + 1234)
    assert size.main([str(run_folder / "final_model.int6.ptz")]) == 0
    (tmp_path / "final_model.int6.ptz").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="neither a run with an artifact nor an artifact"):
        size.main([str(tmp_path)])
