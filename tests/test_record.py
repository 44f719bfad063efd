"""A record is made from synthetic runs, passes its checks, and stops passing after any tampering."""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import pack_code
import record

import train_gpt as tg

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''\
"""Trains a toy."""
import argparse


def main():
    parser = argparse.ArgumentParser(description="toy trainer")
    parser.parse_args()


if __name__ == "__main__":
    main()
'''
# seed -> bits per byte before quantization, after it, and after test-time training; steps; evaluation seconds
SEEDS = {42: (1.05993108, 1.06833072, 1.05740567, 4888, 572.4),
         314: (1.05975470, 1.06832443, 1.05730104, 4882, 489.9),
         0: (1.06072266, 1.06902034, 1.05807084, 4884, 493.5)}
TOKENS, BYTES, MODEL_BYTES = 47_851_520, 151_078_222, 5000


def make_result(seed: int, code: bytes, artifact: bytes, **changes) -> dict:
    pre, quantized, ttt, steps, eval_seconds = SEEDS[seed]
    loss = {name: bpb * math.log(2) * BYTES / TOKENS for name, bpb in (("pre", pre), ("q", quantized), ("ttt", ttt))}
    result = {
        "schema_version": 1, "run_id": f"run{seed}", "seed": seed, "preset": "record", "stage": "all",
        "overrides": {"SEED": str(seed), "RUN_ID": f"run{seed}", "RESUME": "1", "DATA_DIR": "somewhere/else", "TTT_LORA_RANK": "80",
                      "TRAIN_SEQ_SCHEDULE": "1024@0.1,2048@0.7 x"},
        "config_hash": "c0ffee", "code_sha256": hashlib.sha256(code).hexdigest(), "code_bytes": len(code),
        "code_bytes_upstream_convention": None, "artifact_file": "final_model.int6.ptz",
        "artifact_sha256": hashlib.sha256(artifact).hexdigest(), "artifact_bytes": len(artifact),
        "bytes_total": len(artifact) + len(code), "over_cap": len(artifact) + len(code) > 16_000_000,
        "bytes_by_part": {"embed": len(artifact) * 3 // 5, "mlp": len(artifact) // 5, "attn": len(artifact) // 10},
        "val_loss": loss["ttt"], "val_bpb": ttt, "pre_quant_val_loss": loss["pre"], "pre_quant_val_bpb": pre,
        "quantized_val_loss": loss["q"], "quantized_val_bpb": quantized, "ttt_val_loss": loss["ttt"], "ttt_val_bpb": ttt,
        "val_tokens": TOKENS, "target_tokens": TOKENS, "val_bytes": BYTES, "docs_val": 50_000, "steps": steps,
        "step_avg_ms": 121.9, "train_tokens": steps * 786_432, "train_seconds": 596.0251, "calib_seconds": 3.5,
        "eval_seconds": eval_seconds, "wall_seconds": 1478.5,
        "phases": [{"name": "train", "seconds": 596.0251, "peak_mib": 41_000}, {"name": "ttt", "seconds": eval_seconds,
                   "peak_mib": None}],
        "model_params": 35_000_000, "peak_mem_mib": 41_000, "world_size": 8, "hardware": "8x NVIDIA H100 80GB HBM3",
        "python_version": "3.11.0", "torch_version": "2.13.0", "triton_version": None,
        "data": {"manifest_sha256": "ab" * 32, "train_shards": 80, "train_tokens": 8_000_000_000, "docs_train": 9_000_000,
                 "docs_val": 50_000, "tokenizer_sha256": "cd" * 32},
        "train_budget_seconds": 600, "eval_budget_seconds": 600}
    return {**result, **changes}


def make_log(result: dict) -> str:
    r, milliseconds = result, int(result["eval_seconds"] * 1000)
    lines = [f"train_shards: {r['data']['train_shards']}", f"val_tokens: {r['val_tokens']}",
             f"model_params:{r['model_params']}"]
    for step in range(0, r["steps"], 400):
        lines.append(f"{step}/20000 train_loss: {2.3 + 6 / (1 + step / 100):.4f} train_time: {step / 500:.1f}m tok/s: 6450000"
                     f" seconds:{step * 0.1219:.2f} lr_scale:1.000")
    total = 20_000 if r["train_budget_seconds"] else r["steps"]  # without a budget a run ends at its last iteration
    lines.append(f"{r['steps']}/{total} val_loss: 2.3200 val_bpb: 1.0600")
    if r["train_budget_seconds"]:
        lines.append(f"stopping_early: wallclock_cap train_time: {r['train_seconds'] * 1000:.0f}ms step: {r['steps']}/{total}")
    lines += [
        "peak memory allocated: 41000 MiB reserved: 42000 MiB",
        f"diagnostic pre-quantization post-ema val_loss:{r['pre_quant_val_loss']:.8f} val_bpb:{r['pre_quant_val_bpb']:.8f}"
        " eval_time:20900ms",
        f"Serialized model quantized+brotli: {r['artifact_bytes']} bytes",
        f"Code size (uncompressed): {r['code_bytes']} bytes",
        f"Total submission size quantized+brotli: {r['bytes_total']} bytes",
        f"diagnostic quantized val_loss:{r['quantized_val_loss']:.8f} val_bpb:{r['quantized_val_bpb']:.8f} eval_time:21000ms",
    ]
    if r["ttt_val_bpb"] is not None:
        lines += [f"quantized_ttt_phased val_loss:{r['ttt_val_loss']:.8f} val_bpb:{r['ttt_val_bpb']:.8f}"
                  f" eval_time:{milliseconds}ms", f"total_eval_time:{r['eval_seconds']:.1f}s"]
    lines.append(f"result: {json.dumps(r)}")
    return "\n".join(lines) + "\n"


def make_run(folder: Path, seed: int, model_bytes: int = MODEL_BYTES, **changes) -> Path:
    """A run directory as the trainer leaves it."""
    artifact = bytes([seed % 256]) * model_bytes
    result = make_result(seed, pack_code.pack(SCRIPT), artifact, **changes)
    folder.mkdir(parents=True)
    (folder / "final_model.int6.ptz").write_bytes(artifact)
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    (folder / f"{result['run_id']}.txt").write_text(make_log(result))
    return folder


def make_repository(root: Path) -> Path:
    (root / "repo").mkdir()
    (root / "repo" / "train_gpt.py").write_text(SCRIPT)
    (root / "repo" / "lossless_caps.py").write_text("MARK = 1\n")
    (root / "repo" / "requirements.txt").write_text("torch\n")
    (root / "repo" / "packed.py").write_bytes(pack_code.pack(SCRIPT))
    return root / "repo"


def new(root: Path, runs: list[Path], *extra: str) -> int:
    return record.main(["new", *map(str, runs), "--track", "track_10min_16mb", "--name", "ToyStack", "--date", "2026-01-31",
                        "--records-dir", str(root / "records"), "--readable", str(root / "repo" / "train_gpt.py"), *extra])


@pytest.fixture(scope="module", autouse=True)
def remembered_help():
    """The toy's help depends on its code alone: run each version once."""
    real, seen = pack_code.help_output, {}

    def help_output(code, name, library):
        if code not in seen:
            seen[code] = real(code, name, library)
        return seen[code]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_code, "help_output", help_output)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three runs and a record of them. Tests copy what they change."""
    root = tmp_path_factory.mktemp("world")
    make_repository(root)
    runs = [make_run(root / "runs" / str(seed), seed) for seed in SEEDS]
    (root / "notes.md").write_text("What we learned.\n")
    assert new(root, runs, "--script", str(root / "repo" / "packed.py"), "--blurb", "A toy.", "--data-note", "synthetic",
               "--author", "A", "--github-id", "a", "--notes", str(root / "notes.md")) == 0
    return root


@pytest.fixture
def folder(world, tmp_path):
    return Path(shutil.copytree(world / "records" / "track_10min_16mb" / "2026-01-31_ToyStack", tmp_path / "copy"))


def submission(folder: Path) -> dict:
    return json.loads((folder / "submission.json").read_text())


def failures(folder: Path, capsys) -> str:
    """The FAIL lines of a folder that must fail."""
    assert record.main(["validate", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(record.CHECKS) and all(line.startswith(("[PASS] ", "[FAIL] ")) for line in lines)
    return "\n".join(line for line in lines if line.startswith("[FAIL]"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_places_of_this_machine_are_pointed_out(tmp_path, capsys):
    make_repository(tmp_path)
    overrides = make_result(42, b"", b"")["overrides"]
    for name, path, told in (("near", "data/books", False), ("far", "/home/somebody/books", True)):
        run = make_run(tmp_path / name, 42, overrides=overrides | {"DATA_PATH": path})
        assert new(tmp_path, [run], "--name", name.title()) == 0
        assert (f"DATA_PATH={path}" in capsys.readouterr().err) == told


def test_a_new_record_passes_and_is_complete(world, folder, capsys):
    assert record.main(["validate", str(folder)]) == 0
    assert capsys.readouterr().out.count("[PASS]") == len(record.CHECKS)
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "submission.json", "train_seed42.log", "train_seed314.log", "train_seed0.log",
        "artifact_seed42.int6.ptz", "train_gpt.py", "train_gpt_readable.py", "lossless_caps.py", "requirements.txt", "run.sh",
        "loss_over_time.png", "bpb_by_stage.png"}
    assert [p.name for p in folder.parent.iterdir()] == ["copy"]
    readme = (folder / "README.md").read_text()
    for text in ("1.05759 ± 0.00042", "| 314 | 4,882 |", "1.05807084", "A toy.", "synthetic", "What we learned.",
                 "lossless_caps.py (9 bytes)", "bash records/*/2026-01-31_ToyStack/run.sh 314", "| container |"):
        assert text in readme


def test_statistics_are_those_of_the_reference_record(folder):
    s = submission(folder)
    assert round(s["val_bpb"], 5) == 1.05759 and round(s["val_bpb_std"], 5) == 0.00042  # sample, not population: 0.00034
    assert s["seeds"] == [42, 314, 0] and s["train_steps_mean"] == pytest.approx((4888 + 4882 + 4884) / 3)
    assert s["eval_time_s_max"] == 572.4 and s["bytes_total"] == MODEL_BYTES + (folder / "train_gpt.py").stat().st_size
    assert s["compliance"]["three_seeds"] and s["compliance"]["train_under_600s_strict"]
    assert s["compliance"]["score_before_update"] is None


def test_run_sh_sets_exactly_the_settings(folder):
    lines = (folder / "run.sh").read_text().splitlines()
    assert [line for line in lines if line.startswith("export")] == [
        "export TRAIN_SEQ_SCHEDULE='1024@0.1,2048@0.7 x'", "export TTT_LORA_RANK=80"]
    assert lines[-1] == 'SEED=$1 torchrun --standalone --nproc_per_node=8 "$(dirname "$0")/train_gpt.py"'


def tamper_number(folder):
    replace(folder / "submission.json", f'"val_bpb": {submission(folder)["val_bpb"]}', '"val_bpb": 1.05')


def tamper_seed_number(folder):
    replace(folder / "submission.json", '"step_avg_ms": 121.9', '"step_avg_ms": 99.0')


def tamper_compliance(folder):
    replace(folder / "submission.json", '"score_before_update": null', '"score_before_update": true')


def tamper_type(folder):
    replace(folder / "submission.json", '"eval_s": 572.4', '"eval_s": "572.4"')


def tamper_nan(folder):
    replace(folder / "submission.json", '"eval_s": 572.4', '"eval_s": NaN')


def hide_a_seed(folder):
    s = submission(folder)
    s["seeds"].remove(0)
    (folder / "submission.json").write_text(json.dumps(s))


def tamper_log_line(folder):
    replace(folder / "train_seed314.log", "quantized_ttt_phased val_loss:", "quantized_ttt_phased val_loss:1.0 was:")


def drop_log_line(folder):
    replace(folder / "train_seed314.log", "Total submission size", "Total size")


def tamper_log_steps(folder):
    replace(folder / "train_seed0.log", "ms step: 4884/20000", "ms step: 5884/20000")


def tamper_log_result(folder):
    replace(folder / "train_seed0.log", '"val_bpb": 1.05807084', '"val_bpb": 1.04807084')


def tamper_log_anywhere(folder):
    replace(folder / "train_seed42.log", "lr_scale:1.000", "lr_scale:0.900")


def truncate_log(folder):
    path = folder / "train_seed42.log"
    path.write_text(path.read_text()[:900])


def binary_log(folder):
    (folder / "train_seed42.log").write_bytes(b"\xff\xfe\x00")


def swap_artifact(folder):
    (folder / "artifact_seed42.int6.ptz").write_bytes(b"x" * MODEL_BYTES)


def change_script(folder):
    (folder / "train_gpt.py").write_bytes(pack_code.pack(SCRIPT + "\nprint('hello')\n"))


def crash_script(folder):
    (folder / "train_gpt.py").write_text("raise SystemExit(3)\n")


def change_twin(folder):
    replace(folder / "train_gpt_readable.py", "toy trainer", "another trainer")


def change_run_sh(folder):
    replace(folder / "run.sh", "TTT_LORA_RANK=80", "TTT_LORA_RANK=96")


def change_readme(folder):
    replace(folder / "README.md", "**1.05730104**", "**1.04730104**")


TAMPERINGS = [
    (tamper_number, "numbers: submission.json: val_bpb is 1.05,"),
    (tamper_seed_number, "numbers: submission.json: seed_results: 42: step_avg_ms is 99.0"),
    (tamper_compliance, "numbers: submission.json: compliance: score_before_update is True"),
    (tamper_type, "submission.json: $.seed_results['42'].eval_s: '572.4' is not of type"),
    (tamper_nan, "submission.json: NaN is not a JSON number"),
    (hide_a_seed, "logs: train_seed0.log is not among the seeds"),
    (tamper_log_line, "logs: train_seed314.log: ttt_val_loss is"),
    (drop_log_line, "logs: train_seed314.log: bytes_total is "),
    (tamper_log_steps, "logs: train_seed0.log: steps is 4884, but the log ends at step 5884"),
    (tamper_log_result, "val_loss, target_tokens and val_bytes give 1.0580708"),
    (tamper_log_anywhere, "files: train_seed42.log: sha256"),
    (truncate_log, "logs: train_seed42.log has no result line"),
    (binary_log, "logs: 'utf-8' codec can't decode"),
    (swap_artifact, "artifacts: artifact_seed42.int6.ptz is not the artifact"),
    (change_script, "scripts: train_gpt.py is not the script that seed 42 ran"),
    (crash_script, "smoke: train_gpt.py --help ends with exit code 3"),
    (change_twin, "scripts: train_gpt_readable.py does not pack to train_gpt.py"),
    (change_run_sh, "run.sh: run.sh does not set exactly the overrides"),
    (change_readme, "README.md: README.md lacks the line: | 314 |"),
]


@pytest.mark.parametrize(("tamper", "message"), TAMPERINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_tampering_is_named(folder, capsys, tamper, message):
    tamper(folder)
    assert message in failures(folder, capsys)


@pytest.mark.parametrize("name", ["README.md", "submission.json", "train_seed314.log", "artifact_seed42.int6.ptz",
                                  "train_gpt.py", "train_gpt_readable.py", "lossless_caps.py", "run.sh", "bpb_by_stage.png"])
def test_a_missing_file_is_named(folder, capsys, name):
    (folder / name).unlink()
    found = failures(folder, capsys)
    assert name in found or (name.startswith("artifact") and "no artifact_seed file" in found)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"seeds": 3}', ""])
def test_a_broken_submission_is_no_traceback(folder, capsys, text):
    (folder / "submission.json").write_text(text)
    assert "[FAIL] submission.json: " in failures(folder, capsys)


def test_a_folder_that_is_not_there_fails(tmp_path, capsys):
    assert failures(tmp_path / "nowhere", capsys).count("[FAIL]") == len(record.CHECKS)


@pytest.mark.parametrize(("changes", "message"), [
    ({"config_hash": "beef"}, "differ in config_hash: seed 42 has c0ffee, seed 314 has beef"),
    ({"code_sha256": "0" * 64}, "differ in code_sha256"),
    ({"world_size": 1}, "differ in world_size"),
    ({"data": {**make_result(42, b"", b"")["data"], "manifest_sha256": None}}, "differ in data.manifest_sha256: seed 42 has "),
])
def test_mixed_runs_are_refused(world, tmp_path, capsys, changes, message):
    make_repository(tmp_path)
    other = make_run(tmp_path / "other", 314, **changes)
    assert new(tmp_path, [world / "runs" / "42", other]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


def test_over_the_cap_is_refused_or_recorded_as_such(tmp_path, capsys):
    make_repository(tmp_path)
    runs = [make_run(tmp_path / "big", 42, model_bytes=16_000_000)]
    assert new(tmp_path, runs) == 1 and "over the cap" in capsys.readouterr().err
    assert new(tmp_path, runs, "--allow-over-cap") == 0
    made = Path(capsys.readouterr().out.strip())
    s = submission(made)
    assert s["over_cap"] and not s["compliance"]["artifact_under_16mb"] and s["val_bpb_std"] is None
    assert "model + code <= 16,000,000 bytes: no" in (made / "README.md").read_text()
    assert "cap: 16,0" in failures(made, capsys)
    assert record.main(["validate", str(made), "--allow-over-cap"]) == 0


def test_refusals_leave_nothing_behind(world, tmp_path, capsys):
    runs = [world / "runs" / "42"]
    assert new(world, runs) == 1 and "exists already" in capsys.readouterr().err

    make_repository(tmp_path)
    assert new(tmp_path, runs + runs) == 1 and "two runs have the same seed" in capsys.readouterr().err
    wrong = tmp_path / "wrong.py"
    wrong.write_bytes(pack_code.pack(SCRIPT + "\nx = 1\n"))
    assert new(tmp_path, runs, "--script", str(wrong)) == 1 and "is not the script that seed 42 ran" in capsys.readouterr().err
    assert new(tmp_path, runs, "--include", str(tmp_path / "missing")) == 1 and "missing" in capsys.readouterr().err
    (tmp_path / "repo" / "train_gpt.py").write_text(SCRIPT.replace("toy", "other"))
    assert new(tmp_path, runs, "--script", str(world / "repo" / "packed.py")) == 1
    assert "does not pack to" in capsys.readouterr().err
    assert not list(tmp_path.glob("records/*/*"))


def test_a_run_that_contradicts_itself_is_refused(tmp_path, capsys):
    make_repository(tmp_path)
    run = make_run(tmp_path / "run", 42)
    (run / "final_model.int6.ptz").write_bytes(b"other")
    assert new(tmp_path, [run]) == 1 and "not the artifact" in capsys.readouterr().err
    run = make_run(tmp_path / "run2", 42, over_cap=True)
    assert new(tmp_path, [run]) == 1 and "over_cap" in capsys.readouterr().err
    full = make_result(42, b"", b"")
    run = make_run(tmp_path / "run4", 42, val_loss=full["quantized_val_loss"], val_bpb=full["quantized_val_bpb"])
    assert new(tmp_path, [run]) == 1 and "but the last stage scored 1.05740567" in capsys.readouterr().err
    run = make_run(tmp_path / "run3", 42)
    replace(run / "result.json", '"steps": 4888', '"steps": 4889')
    assert new(tmp_path, [run]) == 1 and "not the result line" in capsys.readouterr().err


def test_all_artifacts_and_included_files(world, tmp_path, capsys):
    make_repository(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"1234")
    assert new(tmp_path, [world / "runs" / str(s) for s in SEEDS], "--artifacts", "all",
               "--include", str(tmp_path / "tokenizer.model")) == 0
    made = Path(capsys.readouterr().out.strip())
    assert len(list(made.glob("artifact_seed*"))) == 3
    assert submission(made)["bytes_uncounted"] == {"lossless_caps.py": 9, "tokenizer.model": 4}


def test_a_small_run_on_one_cpu_is_a_record_with_caveats(tmp_path, capsys):
    """No test-time training, no time limit, no manifest, one seed, no training step in the log, no overrides."""
    make_repository(tmp_path)
    full = make_result(42, b"", b"")
    run = make_run(tmp_path / "cpu", 42, ttt_val_loss=None, ttt_val_bpb=None, val_loss=full["quantized_val_loss"],
                   val_bpb=full["quantized_val_bpb"], world_size=1, hardware="1x cpu", steps=0, train_budget_seconds=0,
                   docs_val=None, peak_mem_mib=None, phases=[], overrides={}, bytes_by_part={}, target_tokens=TOKENS,
                   data=dict.fromkeys(full["data"]))
    assert new(tmp_path, [run]) == 0
    made = Path(capsys.readouterr().out.strip())
    s = submission(made)
    assert s["val_bpb"] == 1.06833072 and s["compliance"]["full_validation_targets"] is None
    readme = (made / "README.md").read_text()
    for text in ("- at least 3 seeds: no (1).", "- 8 H100: no (1x cpu).", "None: the script's defaults.",
                 "- the data is named by a manifest: no (none).", "every validation document scored: not computed (- of -)."):
        assert text in readme
    assert (made / "run.sh").read_text().endswith('\nSEED=$1 python "$(dirname "$0")/train_gpt.py"\n')


RULES = [f"R{n}" for n in range(1, 13)]


def make_audited_run(folder: Path, seed: int, by_itself: bool = False, **verdicts) -> Path:
    """A run directory with a ledger as the trainer chains it, and its audit: beside it, or within the result of an older script."""
    judged = {rule: ["PASS", "fine"] for rule in RULES} | verdicts
    folder.mkdir(parents=True)
    ledger = tg.Ledger(folder / "ledger.jsonl")
    ledger.add("start", dict(seed=seed, code_sha256="0" * 64))
    ledger.add("end", dict(val_bpb=SEEDS[seed][2]))
    (folder / "token_nats_ttt.npy").write_bytes(b"nats" * seed)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    kept = dict(lines=ledger.lines, last_hash=ledger.last)
    audit = dict(mode="sample", verdicts=judged, findings={}, seconds={}) | kept
    make_run(folder, seed, **(dict(audit=audit) if by_itself else dict(ledger=kept)), overrides={"SEEDS_DECLARED": "42,314,0"})
    if not by_itself:
        (folder / "audit.json").write_text(json.dumps(audit))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("by_itself", [True, False])
def test_audited_runs_bring_their_ledgers_and_verdicts(by_itself, tmp_path, capsys):
    make_repository(tmp_path)
    lossy = {314: dict(R4=["NEEDS-RULING", "lossy"])}
    runs = [make_audited_run(tmp_path / "runs" / str(seed), seed, by_itself, **lossy.get(seed, {})) for seed in SEEDS]
    assert new(tmp_path, runs) == 0
    assert by_itself or "\nR4  NEEDS-RULING  lossy\n" in capsys.readouterr().err
    folder = tmp_path / "records" / "track_10min_16mb" / "2026-01-31_ToyStack"
    audit = submission(folder)["audit"]
    assert audit["verdicts"] == {rule: ["PASS", "seed 42: fine"] for rule in RULES} | {
        "R4": ["NEEDS-RULING", "seed 314: lossy"], "R10": ["PASS", "declared: [0, 42, 314], in this record: [0, 42, 314]"]}
    assert submission(folder)["compliance"]["score_before_update"] is True
    assert submission(folder)["bytes_uncounted"] == {"lossless_caps.py": 9}
    assert "| R4 | NEEDS-RULING | seed 314: lossy |" in (folder / "README.md").read_text()
    assert (folder / "token_nats_ttt_seed314.npy").read_bytes() == b"nats" * 314
    assert (folder / "audit_seed314.json").exists() != by_itself
    capsys.readouterr()
    if not by_itself:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        replace(copy / "audit_seed314.json", "lossy", "fine")
        assert "numbers: submission.json: audit: verdicts: R4" in failures(copy, capsys)
        shutil.copyfile(copy / "audit_seed0.json", copy / "audit_seed314.json")
        assert "audit_seed314.json is not the audit of the run with seed 314" in failures(copy, capsys)
        shutil.rmtree(copy)
    for old, new_text in (('"seed":314', '"seed":315'), ('{"n":0', '{"n":1')):
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        replace(copy / "ledger_seed314.jsonl", old, new_text)
        assert "ledgers: ledger_seed314.jsonl: line 0 does not have the hash of its content: edited" in failures(copy, capsys)
        shutil.rmtree(copy)
    shutil.copyfile(folder / "ledger_seed0.jsonl", folder / "ledger_seed42.jsonl")
    assert "is not the ledger of the run with seed 42" in failures(folder, capsys)


def test_a_run_that_nobody_judged_is_judged_first(tmp_path, capsys, monkeypatch):
    make_repository(tmp_path)
    run = make_audited_run(tmp_path / "run", 42)
    audit = json.loads((run / "audit.json").read_text())
    (run / "audit.json").unlink()
    asked = []

    def judge(folder, script, data):
        asked.append((folder, script, data))
        (folder / "audit.json").write_text(json.dumps(audit))
        return audit

    monkeypatch.setattr(record, "judge", judge)
    assert new(tmp_path, [run], "--script", str(tmp_path / "repo" / "packed.py"), "--data", "somewhere") == 0
    assert asked == [(run, tmp_path / "repo" / "packed.py", Path("somewhere"))]
    made = tmp_path / "records" / "track_10min_16mb" / "2026-01-31_ToyStack"
    assert submission(made)["audit"]["verdicts"]["R5"] == ["PASS", "seed 42: fine"] and (made / "audit_seed42.json").exists()
    (run / "audit.json").unlink()
    monkeypatch.undo()
    assert new(tmp_path, [run], "--name", "Other") == 1 and "is the script that ran" in capsys.readouterr().err


def test_code_is_also_counted_as_upstream_does(tmp_path):
    """In the record, from the readable script; not where a run has counted it itself."""
    make_repository(tmp_path)
    for name, result in (("Ours", {}), ("Older", dict(code_bytes_upstream_convention=None))):
        run = make_run(tmp_path / name, 42, **result)
        if name == "Ours":
            found = json.loads((run / "result.json").read_text())
            del found["code_bytes_upstream_convention"]
            (run / "result.json").write_text(json.dumps(found))
            (run / "run42.txt").write_text(make_log(found))
        assert new(tmp_path, [run], "--name", name) == 0
        made = submission(tmp_path / "records" / "track_10min_16mb" / f"2026-01-31_{name}")
        assert made.get("bytes_code_upstream_convention") == (record.upstream_code_bytes(SCRIPT) if name == "Ours" else None)
    readable = (ROOT / "train_gpt.py").read_text()
    assert 10_000 < record.upstream_code_bytes(readable) < 90_000


def test_a_record_of_fewer_seeds_than_declared_says_so(tmp_path):
    make_repository(tmp_path)
    assert new(tmp_path, [make_audited_run(tmp_path / "runs" / str(seed), seed) for seed in (42, 314)]) == 0
    verdicts = submission(tmp_path / "records" / "track_10min_16mb" / "2026-01-31_ToyStack")["audit"]["verdicts"]
    assert verdicts["R10"] == ["FAIL", "declared: [0, 42, 314], in this record: [42, 314]"]


def test_index_rewrites_only_the_table(world, tmp_path, capsys):
    shutil.copytree(world / "records", tmp_path / "records")
    readme = tmp_path / "records" / "README.md"
    readme.write_text("before\n<!-- index: begin -->\nold\n<!-- index: end -->\nafter\n")
    for _ in range(2):  # the second time changes nothing
        assert record.main(["index", "--records-dir", str(tmp_path / "records")]) == 0
        text = readme.read_text()
        assert text.startswith("before\n<!-- index: begin -->\n| date |") and text.endswith("<!-- index: end -->\nafter\n")
        assert text.count("| 2026-01-31 | 10min_16mb | ToyStack | 1.05759 ± 0.00042 | 3 |") == 1 and "\nold\n" not in text
        assert "8x NVIDIA H100 80GB HBM3 | [folder](track_10min_16mb/2026-01-31_ToyStack) |" in text


def test_index_names_a_broken_record(world, tmp_path, capsys):
    shutil.copytree(world / "records", tmp_path / "records")
    (tmp_path / "records" / "README.md").write_text("<!-- index: begin -->\n<!-- index: end -->\n")
    next(tmp_path.glob("records/*/*/submission.json")).write_text("{}")
    assert record.main(["index", "--records-dir", str(tmp_path / "records")]) == 1
    assert "2026-01-31_ToyStack" in capsys.readouterr().err


def test_the_history_table_of_this_repository_is_current():
    assert record.render_index(ROOT / "records") in (ROOT / "records" / "README.md").read_text()
    assert record.render_front(ROOT / "records") in (ROOT / "README.md").read_text()


def test_index_rewrites_the_front_page_where_it_asks_for_it(world, tmp_path):
    shutil.copytree(world / "records", tmp_path / "records")
    front, history = tmp_path / "README.md", tmp_path / "records" / "README.md"
    for page in (front, history):
        page.write_text("before\n<!-- index: begin -->\nold\n<!-- index: end -->\nafter\n")
    assert record.main(["index", "--records-dir", str(tmp_path / "records")]) == 0
    text = front.read_text()
    assert text.startswith("before\n<!-- index: begin -->\n| record |") and text.endswith("<!-- index: end -->\nafter\n")
    row = "| [ToyStack](records/track_10min_16mb/2026-01-31_ToyStack), 10min_16mb | 1.05759 ± 0.00042 | "
    assert row in text and text.count("\n") == 7 and "| date |" in history.read_text()
    front.write_text("no markers")
    assert record.main(["index", "--records-dir", str(tmp_path / "records")]) == 0 and front.read_text() == "no markers"
