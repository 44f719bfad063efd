"""bench/rate_distortion.py: what it reports is what the script does; what is missing is skipped with a reason."""

import dataclasses
import json
import math
import sys

import pytest
from conftest import ROOT, tiny_config

import train_gpt as tg

sys.path.insert(0, str(ROOT / "bench"))
import rate_distortion as rd


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset, random_model):
    """Two trained seeds; any weights will do."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        cfg = tiny_config(data_path=str(dataset), artifact_dir=str(folder), seed=seed, stage="train")
        tg.save_tensors(folder / "final_model.pt", random_model(cfg, seed).state_dict())
        (folder / "result.json").write_text(json.dumps(dict(preset="s14", seed=seed, overrides=tg.overrides(cfg))))
        folders.append(folder)
    return folders


def test_points_are_those_of_the_pipeline(runs, tmp_path, capsys, dataset, world, random_model):
    out = tmp_path / "results" / "rd"
    rd.main([*map(str, runs), "--methods", "s14+brotli,s05,s05 pruned", "--points", "2", "--docs", "0.5", "--out", str(out)])
    points = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and len(points) == 2 * 3 * 2
    text = capsys.readouterr().out
    assert "against s14+brotli" in text and "TARGET_BYTES=100%, N_INT6_LAYERS=999" in text
    by = {(p["method"], p["seed"], json.dumps(p["variables"])): p for p in points}
    first, finer = (by["s14+brotli", 1, json.dumps(rd.METHODS["s14+brotli"][i])] for i in range(2))
    assert finer["bytes"] > first["bytes"] and finer["error"] < first["error"] and first["bits_per_weight"] > 3
    pruned = by["s05 pruned", 1, json.dumps(rd.METHODS["s05 pruned"][0])]
    assert pruned["bytes"] <= first["bytes"], "100 % of the standard"
    cfg = tiny_config(data_path=str(dataset), seed=1, val_doc_fraction=0.5)
    model, files = random_model(cfg, 1), tg.Dataset.open(cfg, need_train=True)
    stored = tg.quantize(cfg, model.state_dict(), tg.collect_hessians(cfg, world, model, files, lambda line: None), lambda line: None)
    assert first["bytes"] == len(tg.pack(cfg, stored))
    data = tg.ValData.load(cfg, files)
    assert first["val_bpb_before"] == pytest.approx(tg.evaluate(cfg, world, model, tg.Scorer(data, world)).bpb)
    model.load_state_dict(tg.dequantized_state(cfg, stored))
    assert first["val_bpb"] == pytest.approx(tg.evaluate(cfg, world, model, tg.Scorer(data, world)).bpb)


def test_error_is_the_share_of_the_output_that_is_wrong(runs):
    checkpoint = rd.Checkpoint(runs[0], 0.3)
    cfg = dataclasses.replace(checkpoint.cfg, awq_lite_enabled=False, lqer_enabled=False)
    nothing = {n: tg.QuantizedTensor({("float16", "w"): 0 * t}) for n, t in tg.unbank(cfg, checkpoint.state).items()}
    assert checkpoint.error(cfg, nothing) == pytest.approx(1, rel=1e-6), "weights of zero lose everything"
    coarse, fine = (checkpoint.error(c, tg.quantize(c, checkpoint.state, checkpoint.calibration(c), lambda line: None))
                    for c in (dataclasses.replace(cfg, matrix_bits=b, embed_bits=b) for b in (3, 8)))
    assert 0 < fine < coarse / 10 < 0.1


def test_what_is_missing_is_skipped_with_a_reason(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(rd.METHODS, "s05", [dict(QUANT="of tomorrow")])
    monkeypatch.setenv("PATH", "")
    out = tmp_path / "rd"
    rd.main([str(runs[0]), "--methods", "s14+pergroup,s05,s14+brotli", "--points", "1", "--docs", "0.2", "--out", str(out)])
    told = capsys.readouterr()
    assert "skipped s14+pergroup: " in told.err and "lrzip" in told.err and "skipped s05: QUANT='of tomorrow'" in told.err
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 1
    with pytest.raises(SystemExit, match="unknown method s15"):
        rd.main([str(runs[0]), "--methods", "s15"])
    with pytest.raises(SystemExit, match="no result.json"):
        rd.main([str(tmp_path), "--out", str(out)])


def test_points_of_an_earlier_call_are_kept(runs, tmp_path, capsys):
    out = tmp_path / "rd"
    common = [str(runs[0]), "--docs", "0.2", "--out", str(out)]
    rd.main([*common, "--methods", "s14+brotli", "--points", "1"])
    first = out.with_suffix(".jsonl").read_text()
    rd.main([*common, "--methods", "s14+brotli,s05", "--points", "1", "--keep"])
    lines = out.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    assert lines[0] == first and len(lines) == 2 and json.loads(lines[1])["method"] == "s05"


def test_rd_is_compared_at_equal_bytes_by_seed():
    def point(method, seed, size, rise, **variables):
        return dict(method=method, seed=seed, variables=variables, bytes=size, bits_per_weight=1.0, error=0.1, val_bpb_before=2.0,
                    val_bpb=2 + rise, loss_rise=rise, quantize_seconds=1.0, encode_seconds=1.0, decode_seconds=1.0)

    points = [point("s14+range", seed, 200, 0.1, N_INT6_LAYERS=0) for seed in (1, 2)]
    points += [point("s05", 1, 200, 0.1), point("s05", 2, 900, 0.1)]
    for seed in (1, 2):
        points += [point("rd", seed, size, 0.01 * seed * 100 / size, TARGET_BYTES=size) for size in (100, 400)]
    curves = rd.means(points)
    assert curves["s14+range"][0]["rd"] == pytest.approx((0.05, 0.1)) and curves["s14+range"][0]["seeds"] == 2
    assert all(map(math.isnan, curves["s05"][0]["rd"])), "900 bytes are beyond one seed's curve: NaN"
    text = rd.table(curves)
    assert len({len(line) for line in text}) == 1 and "5 to 10 %" in text[2] and "N_INT6_LAYERS=0 " in text[2]


def test_curves_are_read_between_their_points():
    rows = [dict(bytes=100.0, tax=0.1), dict(bytes=400.0, tax=0.4), dict(bytes=1600.0, tax=-1e-9)]
    assert rd.at(rows, "bytes", "tax", 200.0) == pytest.approx(0.2) and rd.at(rows, "tax", "bytes", 0.2) == pytest.approx(200)
    assert rd.at(rows, "bytes", "tax", 99.0) != rd.at(rows, "bytes", "tax", 99.0), "outside: NaN"
