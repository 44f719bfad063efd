"""Whole runs of the script on a tiny network: what it writes, says and returns, undisturbed and disturbed."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_env

import train_gpt as tg

SCRIPT = ROOT / "train_gpt.py"
ARTIFACT = "final_model.int6.ptz"
CLEAN = {k: v for k, v in os.environ.items() if k.upper() not in {f.upper() for f in tg.Config.__dataclass_fields__}}


def start(out, dataset, **changes) -> subprocess.Popen:
    env = CLEAN | tiny_env(data_path=dataset, artifact_dir=out, **changes) | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, str(SCRIPT)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def whole(dataset, tmp_path_factory):
    """One undisturbed run of the whole pipeline in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = start(out, dataset)
    console, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return SimpleNamespace(out=out, console=console, errors=errors, log=(out / "whole.txt").read_text(),
                           result=json.loads((out / "result.json").read_text()))  # fmt: skip


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the finished run that a test may go on with."""
    return shutil.copytree(whole.out, tmp_path / "run")


@pytest.fixture
def run_main(monkeypatch, capsys, dataset):
    """main() in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])

    def run(out, **changes):
        with monkeypatch.context() as patch:
            for name, value in tiny_env(**(dict(data_path=dataset, artifact_dir=out) | changes)).items():
                patch.setenv(name, value)
            code = tg.main()
        return code, *capsys.readouterr()

    return run


def result_of(out) -> dict:
    return json.loads((out / "result.json").read_text())


def failed(outcome, *expected: str) -> None:
    """Exit code 1 with one explanation that says all of `expected`."""
    code, _, err = outcome
    assert code == 1
    assert err.startswith("error: ") and "Traceback" not in err
    for text in expected:
        assert re.search(text, err), (text, err)


# ---- an undisturbed run


def test_files(whole):
    assert {p.name for p in whole.out.iterdir()} == {
        "whole.txt", "final_model.pt", ARTIFACT, "result.json", "loss_curve.json", "ledger.jsonl",
        "token_nats_pre_quant.npy", "token_nats_quantized.npy", "token_nats_ttt.npy"}
    assert not whole.errors


def test_the_warm_stage_compiles_what_a_run_needs_and_nothing_else(run_main, tmp_path):
    """Training shapes and those of test-time training, no step, no artifact; a run after it would compile in no timed phase."""
    shallow = dict(num_layers=2, loop_start=0, loop_end=0, parallel_start_layer=1, compile_backend="eager", compile_shape_warmup=True)
    torch._dynamo.reset()
    code, out, err = run_main(tmp_path / "warm", stage="warm", **shallow)
    result = result_of(tmp_path / "warm")
    assert code == 0 and not err and re.search(r"warm: \d+ graphs, kept in torch's default folder", out)
    phases = {p["name"]: p["compilations"] for p in result["phases"]}
    assert phases == dict(setup=0, compile=len(result["compilations"]["compile"])) and phases["compile"] >= 4
    assert result["steps"] is None and {p.name for p in (tmp_path / "warm").iterdir()} == {"warm.txt", "ledger.jsonl", "result.json"}
    torch._dynamo.reset()


N = r"-?\d+\.\d+"
TTT = rf"ttt batch:\d+/4 bpb:{N} loss:{N} running_bpb:{N} running_loss:{N}"
LOG_LINES = [  # techniques, section 12.1, in order
    r"train_shards: 2", r"val_tokens: 1711", r"model_params:\d+", r"train_seq_schedule:32@0\.500,64@1\.000", r"local_microbatch_tokens:256",
    r"growth_stage:seq_len:32 progress:0\.000", r"gptq:reserving 4s, effective=0ms", rf"1/12 train_loss: {N} train_time: {N}m tok/s: \d+.*",
    rf"layer_loop:enabled step:\d+ frac:{N} encoder:\[0, 1, 2\] decoder:\[1, 2, 3\]", rf"growth_stage:seq_len:64 progress:{N} step:7",
    r"growth_stage_rewarmup:start step:7 steps:2 seq_len:64", rf"12/12 train_loss: {N} train_time: {N}m tok/s: \d+.*",
    rf"12/12 val_loss: {N} val_bpb: {N}", r"peak memory allocated: \d+ MiB reserved: \d+ MiB", r"ema:applying EMA weights",
    r"diagnostic pre-quantization post-ema val_loss:\d\.\d{8} val_bpb:\d\.\d{8} eval_time:\d+ms",
    r"Serialized model: \d+ bytes", r"GPTQ:collecting Hessians from calibration data\.\.\.", rf"GPTQ:collected 17 Hessians in {N}s",
    r"Quantized weights:", rf"Serialize: s14 quantization and brotli compression done in {N}s",
    rf"Deserialize: decompression and dequantization done in {N}s", r"Code size \(uncompressed\): \d+ bytes",
    r"Serialized model quantized\+brotli: \d+ bytes", r"Total submission size quantized\+brotli: \d+ bytes",
    r"diagnostic quantized val_loss:\d\.\d{8} val_bpb:\d\.\d{8} eval_time:\d+ms", r"beginning TTT eval timer",
    r"ttt_phased: total_docs:15 prefix_docs:6 suffix_docs:9 num_phases:1 boundaries:\[6\] target_tokens:1711",
    rf"{TTT} docs:\d+-\d+ phases:0 chunk:16 t:\d+s eta:\d+s", rf"ttt_phase:1/1 start docs:6 of:\d+ t:{N}s",
    rf"ttt_phase_chunk:1/\d+ lr:{N} t:{N}s", rf"ttt_phase:1/1 end t:{N}s",
    rf"{TTT} docs:\d+-\d+ phases:1 chunk:\d+ t:\d+s eta:\d+s",
    r"quantized_ttt_phased val_loss:\d\.\d{8} val_bpb:\d\.\d{8} eval_time:\d+ms", rf"total_eval_time:{N}s",
]  # fmt: skip


def test_log_lines_in_order(whole):
    lines = iter(whole.console.splitlines())
    for pattern in LOG_LINES:
        assert any(re.fullmatch(pattern, line) for line in lines), f"missing, or not after the one before: {pattern}"


def test_log_is_a_complete_account(whole):
    assert SCRIPT.read_text() in whole.log, "the source"
    assert SCRIPT.read_text() not in whole.console
    for name in tg.Config.__dataclass_fields__:
        assert re.search(rf"^  {name}: ", whole.log, re.M), name
    said = re.search(r"^overrides: (.*)$", whole.log, re.M)[1]
    assert "ITERATIONS=12" in said and "BETA2" not in said
    assert "no effect: EVAL_STRIDE (" in whole.log
    assert [line for line in whole.log.splitlines() if line in set(whole.console.splitlines())][-1].startswith("result: ")


def test_last_line_is_the_result(whole):
    last = whole.console.rstrip("\n").splitlines()[-1]
    assert last.startswith("result: ") and json.loads(last.removeprefix("result: ")) == whole.result


def test_phases_add_up(whole):
    phases = whole.result["phases"]
    assert sum(p["seconds"] for p in phases) == pytest.approx(whole.result["wall_seconds"], abs=1e-6)
    by_name = {p["name"]: p["seconds"] for p in phases}
    assert list(by_name) == ["setup", "compile", "train", "diagnostic eval", "calibrate", "quantize", "unpack", "eval"]
    assert by_name["train"] >= whole.result["train_seconds"] > 0
    assert by_name["eval"] >= whole.result["eval_seconds"] - 1e-3


@pytest.mark.parametrize("stage", ["pre_quant_val", "quantized_val", "ttt_val", "val"])
def test_bits_per_byte_follow_from_the_loss(whole, stage):
    r = whole.result
    assert r[f"{stage}_bpb"] == pytest.approx(r[f"{stage}_loss"] / math.log(2) * r["target_tokens"] / r["val_bytes"], rel=1e-9)


def test_the_score_is_over_everything(whole, dataset):
    r = whole.result
    val, sidecar = (tg.read_shard(dataset / f"fineweb_{kind}_000000.bin") for kind in ("val", "val_bytes"))
    assert r["target_tokens"] == r["val_tokens"] == len(val) - 1
    assert r["val_bytes"] == int(sidecar[1:].astype(int).sum())
    assert r["docs_val"] == 15


def test_test_time_training_helps(whole):
    r = whole.result
    assert r["ttt_val_bpb"] < r["quantized_val_bpb"] - 0.1
    assert (r["val_loss"], r["val_bpb"]) == (r["ttt_val_loss"], r["ttt_val_bpb"])


def test_result_agrees_with_the_log(whole):
    r = whole.result
    stages = {"pre_quant": "diagnostic pre-quantization post-ema", "quantized": "diagnostic quantized", "ttt": "quantized_ttt_phased"}
    for key, prefix in stages.items():
        loss, bpb = re.search(rf"^{prefix} val_loss:(\S+) val_bpb:(\S+)", whole.log, re.M).groups()
        assert (float(loss), float(bpb)) == pytest.approx((r[f"{key}_val_loss"], r[f"{key}_val_bpb"]), abs=1e-8)
    assert r["train_tokens"] == 12 * 512 and r["steps"] == 12
    assert [row[0] for row in json.loads((whole.out / "loss_curve.json").read_text())] == list(range(1, 13))


def test_sizes_are_those_of_files(whole):
    r, blob = whole.result, (whole.out / ARTIFACT).read_bytes()
    assert (r["artifact_bytes"], r["code_bytes"]) == (len(blob), SCRIPT.stat().st_size)
    assert r["bytes_total"] == len(blob) + SCRIPT.stat().st_size and r["over_cap"] is False
    assert sum(r["bytes_by_part"].values()) == len(blob)
    assert r["artifact_sha256"] == hashlib.sha256(blob).hexdigest() and r["code_sha256"] == tg.sha256_file(SCRIPT)


def test_result_rebuilds_the_configuration(whole, dataset):
    assert tg.config_from_env(whole.result["overrides"]) == tiny_config(data_path=str(dataset), artifact_dir=str(whole.out))


# ---- going on with parts of it


def test_scoring_again_gives_the_same_score(whole, finished, run_main):
    (finished / "final_model.pt").unlink()  # the artifact is the only bridge
    (finished / "result.json").unlink()
    code, out, err = run_main(finished, stage="eval")
    assert code == 0, err
    r = result_of(finished)
    for key in ("ttt_val_loss", "quantized_val_loss", "val_bpb", "artifact_sha256", "target_tokens", "val_bytes"):
        assert r[key] == whole.result[key], key
    assert r["steps"] is None and "train_loss" not in out


def test_quantizing_again_gives_the_same_bytes(whole, finished, run_main):
    (finished / ARTIFACT).unlink()
    code, out, err = run_main(finished, stage="quantize", ttt_enabled=False)
    assert code == 0, err
    assert (finished / ARTIFACT).read_bytes() == (whole.out / ARTIFACT).read_bytes()
    r = result_of(finished)
    assert r["ttt_val_loss"] is None and r["val_bpb"] == r["quantized_val_bpb"] == whole.result["quantized_val_bpb"]
    logged = int(re.search(r"diagnostic quantized .* eval_time:(\d+)ms", out)[1])
    assert 1000 * r["eval_seconds"] == pytest.approx(logged, abs=20), "without test-time training, the diagnostic is the evaluation"


def test_the_s05_scheme_from_weights_to_score(finished, run_main):
    """Its own text, mixed bits, pruning to a size, sliding windows: the same pipeline."""
    target = (finished / ARTIFACT).stat().st_size * 5 // 8 + SCRIPT.stat().st_size
    code, console, err = run_main(finished, stage="quantize", quant="s05", n_int6_layers=4, gptq_calibration="self", awq_lite_enabled=False,
                                  lqer_enabled=False, target_bytes=target, eval_method="sliding", ttt_enabled=False)  # fmt: skip
    assert code == 0, err
    assert "GPTQ:wrote 64 sequences of 65 tokens" in console and "prune: " in console and "gptq (int5)" in console
    result = result_of(finished)
    assert result["bytes_total"] <= target
    assert result["ttt_val_bpb"] is None and math.isfinite(result["val_bpb"]) and result["val_bpb"] == result["quantized_val_bpb"]


def test_same_seed_gives_the_same_bytes(whole, tmp_path, run_main):
    code, out, err = run_main(tmp_path / "again", ttt_enabled=False, checkpoint_seconds=0.2)
    assert code == 0, err
    assert (tmp_path / "again" / ARTIFACT).read_bytes() == (whole.out / ARTIFACT).read_bytes()
    losses = [re.findall(r"train_loss: (\S+)", text) for text in (out, whole.console)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    assert not (tmp_path / "again" / "checkpoint.pt").exists(), "a finished run needs none"


def test_training_only(tmp_path, run_main):
    code, _, err = run_main(tmp_path / "t", stage="train", iterations=2, seed=5, run_id="named")
    assert code == 0, err
    assert {p.name for p in (tmp_path / "t").iterdir()} == {
        "named.txt", "final_model.pt", "result.json", "loss_curve.json", "ledger.jsonl", "token_nats_pre_quant.npy"}
    r = result_of(tmp_path / "t")
    assert (r["run_id"], r["seed"], r["stage"], r["steps"]) == ("named", 5, "train", 2)
    assert r["val_bpb"] == r["pre_quant_val_bpb"] and r["ttt_val_bpb"] is None and "artifact_bytes" not in r


def test_artifact_over_the_cap_is_kept_and_marked(whole, finished, run_main, monkeypatch):
    monkeypatch.setattr(tg, "ARTIFACT_CAP_BYTES", whole.result["bytes_total"] - 1)
    code, out, err = run_main(finished, stage="eval", ttt_enabled=False)
    assert code == 0, err
    assert result_of(finished)["over_cap"] is True
    assert re.search(r"OVER THE CAP: \d+ bytes are 1 more than \d+", out)
    assert (finished / ARTIFACT).read_bytes() == (whole.out / ARTIFACT).read_bytes()


# ---- disturbed


def test_interrupted_run_resumes_to_the_same_artifact(whole, dataset, tmp_path, run_main):
    out = tmp_path / "stopped"
    process = start(out, dataset)
    for line in process.stdout:
        if line.startswith("3/12 train_loss"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 130, errors
    assert "stopping after this step" in errors and "RESUME=1" in errors and str(out) in errors and "Traceback" not in errors
    assert (out / "checkpoint.pt").exists() and not (out / ARTIFACT).exists()
    state = tg.load_tensors(out / "checkpoint.pt", "cpu")
    assert 3 <= state["step"] < 12 and state["seconds"] < state["losses"][-1][1] + 0.1

    failed(run_main(out, resume=True, matrix_lr=0.01), "another configuration or seed")
    failed(run_main(out, resume=True, seed=2), "another configuration or seed")
    code, console, err = run_main(out, resume=True)
    assert code == 0, err
    assert f"resumed after step {state['step']}" in console
    assert (out / ARTIFACT).read_bytes() == (whole.out / ARTIFACT).read_bytes()
    assert result_of(out)["steps"] == 12 and result_of(out)["ttt_val_loss"] == whole.result["ttt_val_loss"]
    assert not (out / "checkpoint.pt").exists()


def test_resume_without_checkpoint(finished, run_main):
    failed(run_main(finished, resume=True), "RESUME=1, but there is no .*checkpoint.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resume_from_a_damaged_checkpoint(tmp_path, run_main):
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    failed(run_main(tmp_path, resume=True), "cannot load .*checkpoint.pt")


def test_resume_with_another_recipe_is_refused_before_training(finished, run_main):
    tg.save_tensors(finished / "checkpoint.pt", dict(config_hash="0" * 16, seed=1337))
    failed(run_main(finished, resume=True), "checkpoint.pt was written by another configuration")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("spoil, changes, message", [
    (flip, {}, "damaged artifact"),
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), {}, "damaged artifact"),
    (lambda p: p.write_bytes(b""), {}, "no artifact"),
    (lambda p: p.write_bytes(b"PGRP" + p.read_bytes()[4:]), {}, "no artifact"),
    (lambda p: p.unlink(), {}, f"cannot read .*{ARTIFACT}.*ARTIFACT_DIR"),
    (lambda p: None, dict(num_layers=5), "NUM_LAYERS: artifact 4, this run 5"),
    (lambda p: None, dict(rope_base=500.0, logit_softcap=15.0), "LOGIT_SOFTCAP: artifact 30.0, this run 15.0; ROPE_BASE"),
], ids=["bit flipped", "truncated", "empty", "another format", "missing", "other depth", "other constants"])  # fmt: skip
def test_bad_artifact(finished, run_main, spoil, changes, message):
    spoil(finished / ARTIFACT)
    before = (finished / "result.json").read_bytes()
    failed(run_main(finished, stage="eval", **changes), message)
    assert (finished / "result.json").read_bytes() == before, "a failed run leaves the older result"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("spoil, changes, message", [
    (lambda p: p.unlink(), {}, "cannot load .*final_model.pt"),
    (lambda p: p.write_bytes(b"x" * 100), {}, "cannot load .*final_model.pt"),
    (lambda p: None, dict(num_layers=5), "does not fit this configuration"),
], ids=["missing", "damaged", "other depth"])  # fmt: skip
def test_bad_weights(finished, run_main, spoil, changes, message):
    spoil(finished / "final_model.pt")
    failed(run_main(finished, stage="quantize", **changes), message)


def test_missing_lrzip_is_noticed_before_training(tmp_path, run_main, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    outcome = run_main(tmp_path / "out", compressor="pergroup")
    failed(outcome, "lrzip", "apt-get install lrzip", "COMPRESSOR=range")
    assert "train_loss" not in outcome[1] and not (tmp_path / "out" / "final_model.pt").exists()


def test_missing_constriction_is_noticed_before_training(tmp_path, run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    outcome = run_main(tmp_path / "out", compressor="range")
    failed(outcome, "constriction", "pip install", "COMPRESSOR=brotli")
    assert "train_loss" not in outcome[1] and not (tmp_path / "out" / "final_model.pt").exists()


def test_unwritable_output(tmp_path, run_main):
    (tmp_path / "file").write_text("in the way")
    outcome = run_main(tmp_path / "file" / "run")
    failed(outcome, "cannot write .*choose a writable ARTIFACT_DIR")
    assert "train_loss" not in outcome[1]


def test_full_disk_after_training(tmp_path, run_main, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    failed(run_main(tmp_path / "out", iterations=1), "No space left on device", "final_model.pt")
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix not in (".txt", ".jsonl")]


def test_no_data(tmp_path, run_main):
    failed(run_main(tmp_path / "out", data_path=tmp_path / "nowhere"), "no fineweb_train_", "DATA_PATH")


def test_too_little_data(tmp_path, run_main):
    failed(run_main(tmp_path / "out", train_batch_tokens=1 << 20), "no training shard holds a step", "TRAIN_BATCH_TOKENS")


def test_ranks_that_do_not_fit(tmp_path, run_main, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    failed(run_main(tmp_path / "out"), "3 ranks cannot share 2 micro-batches")


def test_evaluation_that_would_take_too_long_stops_early(finished, run_main):
    failed(run_main(finished, stage="eval", max_eval_seconds=1e-4), "MAX_EVAL_SECONDS=0.0001", "STAGE=eval")


def test_no_step_fits_the_budget(tmp_path, run_main):
    failed(run_main(tmp_path / "out", max_wallclock_seconds=4.0001, gptq_reserve_seconds=4.0, iterations=0), "no step fits")


def test_diverging_run_stops_with_its_last_good_weights(tmp_path, run_main):
    outcome = run_main(tmp_path / "out", tied_embed_lr=1e30, grad_clip_norm=0.0)
    failed(outcome, r"step \d+: .*checkpoint\.pt", "TIED_EMBED_LR")
    assert (tmp_path / "out" / "checkpoint.pt").exists()
