"""The picture of the network: it names what the configuration has, and draws skips and streams where the network has them."""

import json
import sys

import pytest
from conftest import ROOT
from matplotlib.text import Text

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import tour

RECORD = ROOT / "records" / "track_cpu_books" / "2026-11-25_EightMinutes"


def words_of(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def config(**env) -> tg.Config:
    return tg.config_from_env({name: str(value) for name, value in env.items()})


@pytest.mark.parametrize("preset", ["s14", "demo", "s05"])
def test_presets_are_drawn_with_every_block(preset, tmp_path):
    cfg = config(PRESET=preset)
    figure = tour.picture(cfg)
    figure.savefig(tmp_path / "tour.png", dpi=30)
    words = words_of(figure)
    for block, times in enumerate(tour.tg.layer_order(cfg, True).count(block) for block in range(cfg.num_layers)):
        named = [text for text in words if text.split(",")[0] == f"block {block}"]
        assert len(named) == times
    assert any(f"QUANT={cfg.quant}" in text for text in words) and f"COMPRESSOR={cfg.compressor}" in " ".join(words)
    assert words.count("m") == (len(tg.layer_order(cfg, True)) if cfg.ttt_enabled else 0)


@pytest.mark.parametrize("changes", [
    {}, dict(NUM_LOOPS=0), dict(NUM_LAYERS=1, NUM_LOOPS=0), dict(NUM_LAYERS=2, NUM_LOOPS=0), dict(PARALLEL_START_LAYER=0),
    dict(PARALLEL_START_LAYER=1, NUM_LAYERS=3, NUM_LOOPS=0), dict(SKIP_GATES_ENABLED=0, XSA_LAST_N=0, TTT_ENABLED=0),
    dict(QUANT="s14", WINDOW_PATTERN="SL", SMEAR_GATE_ENABLED=0, SPARSE_ATTN_GATE_ENABLED=0)], ids=str)  # fmt: skip
def test_any_shape_is_drawn(changes, tmp_path):
    cfg = config(PRESET="demo", **changes)
    tour.picture(cfg).savefig(tmp_path / "tour.svg")
    places = tour.plan(cfg)
    assert [at.block for at in places] == list(tg.layer_order(cfg, True))
    assert len({(at.column, at.row) for at in places}) == len(places)
    half = len(places) // 2
    for at in places:  # as GPT.hidden has it: the decoder takes what the encoder left, the last first
        expected = len(places) - 1 - at.depth - len(places) % 2 if half <= at.depth < 2 * half else None
        assert at.skip_from == expected
        assert at.skip_from is None or places[at.skip_from].column == at.column
        assert not at.two_streams or (at.depth >= half and cfg.parallel_start_layer)
    assert any(at.two_streams for at in places) == bool(cfg.parallel_start_layer and places[-1].block >= cfg.parallel_start_layer)


def test_a_records_numbers_are_drawn(tmp_path, capsys):
    result = tour.read_result(RECORD)
    assert result["seed"] == 42  # the seed of the artifact in the folder
    out = tmp_path / "tour.png"
    assert tour.main(["--out", str(out), "--run", str(RECORD)]) == 0
    assert out.stat().st_size > 20_000 and capsys.readouterr().out.strip() == str(out)
    text = "\n".join(words_of(tour.picture(tg.config_from_env(result["overrides"]), result)))
    for number in (f"{result['artifact_bytes']:,} bytes", f"script\n{result['code_bytes']:,}", f"{result['val_bpb']:.4f} bpb"):
        assert number in text


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert tour.main(["--out", str(tmp_path / "tour.png"), "--run", str(tmp_path)]) == 1
    assert "name a finished run" in capsys.readouterr().err and not list(tmp_path.iterdir())
    (tmp_path / "result.json").write_text(json.dumps(dict(overrides=dict(NUM_LAYERS="none"))))
    assert tour.main(["--out", str(tmp_path / "tour.png"), "--run", str(tmp_path)]) == 1
    assert "expected a whole number" in capsys.readouterr().err
