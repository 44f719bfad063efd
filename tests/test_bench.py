"""BENCHES and the step profile: they run, they refuse what they can not do, their numbers add up."""

import gzip
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_config

import train_gpt as tg

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]
import gpu_suite
import step_profile
import traffic


def run(*command, **env):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=os.environ | env, timeout=1800)


# ---- the GPU suite


def test_the_suite_runs_on_a_cpu_with_tiny_sizes(tmp_path):
    out = tmp_path / "results" / "dry.jsonl"
    sections = "ceilings", "cutlass", "muon", "gptq", "quantization", "ttt", "evaluation"
    done = run(ROOT / "bench" / "gpu_suite.py", "--dry-run", "--out", out, *sections)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert lines[0]["section"] == "machine" and {x["section"] for x in lines[1:]} == set(sections)
    checks = [x for x in lines if x["name"].startswith("check dpre")]
    assert len(checks) == 4 and all(x["reached"] for x in checks)
    check, *steps = [x for x in lines if x["section"] == "ttt"]
    assert check["name"].startswith("check ttt graphs") and check["error"] == 0 and check["reached"]
    for step, name in zip(steps, ("kernels", "graphs"), strict=True):
        assert f"step {name}" in step["name"] and 0 <= max(step["loss_differences"].values()) < 0.05
        assert step["ratio"] == pytest.approx(step["reference_ms"] / step["ms"], abs=2e-3)
    again = run(ROOT / "bench" / "gpu_suite.py", "--table", out)
    assert again.returncode == 0 and "ttt step" in again.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_says_what_to_run_instead():
    done = run(ROOT / "bench" / "gpu_suite.py", "ceilings")
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "make bench" in done.stderr


def test_a_section_that_fails_costs_one_section(monkeypatch, capsys):
    monkeypatch.setitem(gpu_suite.SECTIONS, "ceilings", (None, 0.01))
    (line,) = gpu_suite.section_lines("ceilings", 60)
    assert line["error"] == "stopped after 0.01 s" and line["name"] == "ceilings failed"
    (late,) = gpu_suite.section_lines("ceilings", 0.5)
    assert late["error"].startswith("no time was left")
    assert "ceilings failed" in gpu_suite.table([line])


def test_document_lengths_have_the_mean_of_the_validation_part(monkeypatch):
    """957 tokens a document; long ones are cut at the context."""
    monkeypatch.setattr(gpu_suite, "N", 4_000_000)
    monkeypatch.setattr(gpu_suite, "DEVICE", "cpu")
    bounds = gpu_suite.packed_bounds(1 << 30)
    lengths = bounds.diff()
    assert 800 < lengths[lengths > 0].float().mean() < 1200
    assert gpu_suite.packed_bounds(1024).diff().max() == 1024


def test_tiles_reach_flex_attention_and_fit_its_blocks(monkeypatch):
    """What comes out of a tile is what torch's own choice gives; sides are what torch asks of them."""
    seen = []
    inputs = [torch.randn(300, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 171, 300, 300], dtype=torch.int32)
    untiled = torch.nn.attention.flex_attention.flex_attention

    def noted(*args, kernel_options=None, **rest):
        seen.append(kernel_options)
        return untiled(*args, **rest)

    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "flex_attention", noted)
    expected = tg.document_attention_reference(*inputs, bounds, 171)
    for tile in gpu_suite.FLEX_TILES[1:]:
        out = gpu_suite.tiled_flex_attention(tile)(*inputs, bounds, 171)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=5e-6)
    assert torch.nn.attention.flex_attention.flex_attention is noted, "torch is left as it was"
    assert seen[2] == dict(BLOCK_M=128, BLOCK_N=64, BLOCK_M1=64, BLOCK_N1=128, BLOCK_M2=128, BLOCK_N2=64)
    for options in seen:
        assert options["BLOCK_N1"] % options["BLOCK_M1"] == options["BLOCK_M2"] % options["BLOCK_N2"] == 0
        assert all(128 % size == 0 for size in options.values())


def test_the_best_tile_is_the_fastest_right_one(monkeypatch):
    """By a fake clock: one tile is fast and wrong, one does not run, and of the rest the third is the fastest."""
    outcomes = [(True, 3.0), (False, 0.1), (True, 2.0), (True, None), (True, 4.0)]
    results = dict(zip(gpu_suite.FLEX_TILES, outcomes, strict=True))

    def check(name, tile):
        yield dict(name=f"check {name}", reached=results[tile][0])

    def time(name, tile, contexts):
        ms = results[tile][1]
        yield dict(name=name, ms=ms) if ms else dict(name=name, error="out of resource: shared memory")

    monkeypatch.setattr(gpu_suite, "DRY", False)
    monkeypatch.setattr(gpu_suite, "check_attention", check)
    monkeypatch.setattr(gpu_suite, "time_attention", time)
    monkeypatch.setattr(gpu_suite, "tiled_flex_attention", lambda tile: tile)
    monkeypatch.setattr(tg, "flex_attention", lambda: ())
    lines = list(gpu_suite.flex_tiles())
    assert lines[-1] == dict(name="best tile: flex 64x128", ms=2.0) and len(lines) == 11
    results.update(dict.fromkeys(results, (False, 1.0)))
    assert "no tile" in list(gpu_suite.flex_tiles())[-1]["error"]


# ---- bytes of a compiled micro-batch, counted without running it


@pytest.mark.parametrize("adapt", [False, True])
def test_a_micro_batch_and_a_step_of_test_time_training_move_no_more_bytes_than_before(adapt):
    """Two blocks at their real sizes. Growth is a regression or, for a reason, a new file by `python bench/traffic.py --write`."""
    committed = json.loads(traffic.COMMITTED.read_text())
    if committed["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip(f"counted with torch {committed['torch']}: other versions fuse otherwise")
    found, prefix = traffic.forward_backward(traffic.blocks(2), adapt), "ttt_" * adapt
    assert found["gigabytes"] <= 1.005 * committed[f"{prefix}two_blocks_gigabytes"]
    assert found["kernels"] <= committed[f"{prefix}two_blocks_kernels"] + 2
    # The counter sees what it is for: the head alone writes and reads its logits at least twice, bf16.
    assert found["gigabytes"] > 4 * (24 * 24 if adapt else traffic.TOKENS) * tg.Config().vocab_size * 2 / 1e9


def test_an_optimizer_step_moves_no_more_bytes_than_before():
    """Of a small network: bytes a weight, of which a step reads gradient, weight and average once each, and operators."""
    committed = json.loads(traffic.COMMITTED.read_text())
    if committed["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip(f"counted with torch {committed['torch']}")
    cfg = tg.Config(model_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, loop_start=1, loop_end=2, parallel_start_layer=3,
                    vocab_size=512, rope_dims=8)
    found, weights = traffic.optimizer_step(cfg), sum(p.numel() for p in tg.GPT(cfg).parameters())
    assert 12 < found["optimizer_gigabytes"] * 1e9 / weights < 65 and found["optimizer_operators"] <= committed["optimizer_operators"]


# ---- the profile of a training step


def test_classes_of_operators():
    for name, kind in {"aten::mm": "matmul", "aten::addmm": "matmul", "train_gpt::mlp_up": "matmul", "aten::mul": "elementwise",
                       "aten::copy_": "copy", "aten::sum": "norm/reduction", "aten::rms_norm": "norm/reduction",
                       "train_gpt::document_attention_cpu": "attention", "ncclDevKernel_AllReduce": "communication",
                       "sm90_xmma_gemm_bf16": "matmul", "triton_poi_fused_mul_3": "elementwise",
                       "triton_red_fused_4": "norm/reduction"}.items():
        assert step_profile.class_of(name) == kind, name


def test_self_times_do_not_count_callees():
    def event(name, ts, dur, tid=1):
        return dict(name=name, ts=ts, dur=dur, tid=tid)

    events = [event("outer", 0, 100), event("inner", 10, 30), event("innermost", 15, 5), event("second", 50, 20),
              event("other", 0, 7, tid=2)]
    assert {e["name"]: us for e, us in step_profile.self_times(events)} == dict(outer=50, inner=25, innermost=5, second=20, other=7)


def test_bytes_and_flops_of_a_product():
    args = {"Input Dims": [[4, 8], [8, 16]], "Input type": ["float", "c10::BFloat16"]}
    assert step_profile.argument_bytes(args) == 4 * 8 * 4 + 8 * 16 * 2
    assert step_profile.argument_flops("aten::mm", args) == 2 * 4 * 8 * 16
    assert step_profile.argument_flops("aten::addmm", {"Input Dims": [[16], [4, 8], [8, 16]]}) == 2 * 4 * 8 * 16
    assert step_profile.argument_flops("aten::bmm", {"Input Dims": [[3, 4, 8], [3, 8, 16]]}) == 2 * 3 * 4 * 8 * 16
    assert step_profile.argument_flops("aten::mul", args) == 0


def test_a_profiled_run_gives_a_table_that_adds_up(dataset, world, tmp_path):
    cfg = tiny_config(data_path=str(dataset), iterations=6, profile=2)
    trainer = tg.Trainer(cfg, world, tg.Dataset.open(cfg, need_train=True), tg.choose_kernels(cfg, world))
    tg.train(trainer, lambda: tg.Score(1.0, 1.0, 1, 1), lambda line, console=True: None, tmp_path / "checkpoint.pt")
    trace = tmp_path / "profile.json.gz"
    done = run(ROOT / "tools" / "step_profile.py", trace, "--json")
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert sum(row["share"] for row in table.values()) == pytest.approx(1)
    assert {"matmul", "elementwise", "optimizer", "norm/reduction", "copy"} <= set(table)
    assert (tmp_path / "profile.png").stat().st_size > 1000
    flops = 3 * tg.flops_per_token(cfg, [1], True).matmul * cfg.train_batch_tokens  # steps 4 and 5 of 6 are looped
    assert table["matmul"]["tflop"] == pytest.approx(flops / 1e12, rel=0.02)
    shown = run(ROOT / "tools" / "step_profile.py", trace)
    assert shown.returncode == 0 and "bound by" in shown.stdout and "matmul" in shown.stdout


def test_what_is_no_trace_is_refused(tmp_path):
    for name, data in {"a.json": b"{}", "b.json.gz": gzip.compress(b"[1]"), "c.json.gz": b"no gzip"}.items():
        (tmp_path / name).write_bytes(data)
        done = run(ROOT / "tools" / "step_profile.py", tmp_path / name)
        assert done.returncode == 1 and "is no trace of a run with PROFILE=N" in done.stderr and "Traceback" not in done.stderr
