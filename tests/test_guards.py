"""What a refactoring must not change: the newest records' artifacts under this script give the nats that the records hold.

The demo's corpus is made here, from the Python installation, as `make demo` does. Another processor rounds the last bits of a
product differently (3e-6 nats were seen between two EPYCs), and so does another vector unit, hence ATEN_CPU_CAPABILITY.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import train_gpt as tg

RECORD = ROOT / "records" / "track_demo" / "2026-11-25_Audited"
PATIENCE = 1800  # seconds, on a busy machine
NATS_CLOSE, BPB_CLOSE = 1e-5, 1e-6


def run(*command: str | Path, **env: str) -> str:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1"} | env
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True,
                          timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def submission() -> dict:
    return json.loads((RECORD / "submission.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory, submission) -> Path:
    """The data of the demo record, made anew, or those of an earlier `make demo`."""
    expected = submission["data"]["manifest_sha256"]
    made = ROOT / "data" / "demo"
    if (made / "manifest.json").exists() and tg.sha256_file(made / "manifest.json") == expected:
        return made
    folder = tmp_path_factory.mktemp("demo")
    run("data/demo_corpus.py", folder / "docs.jsonl")
    run("prepare_caseops_data.py", "--docs", folder / "docs.jsonl", "--out", folder / "demo", "--train-tokenizer", "1024",
        "--val-docs", "80", "--workers", "2")
    if tg.sha256_file(folder / "demo" / "manifest.json") != expected:
        pytest.skip("this Python installation makes another demo corpus than the record's")
    return folder / "demo"


def test_the_demo_record_keeps_its_nats(demo, submission, tmp_path):
    shutil.copy(RECORD / "artifact_seed42.int6.ptz", tmp_path / "final_model.int6.ptz")
    variables = dict(PRESET="demo", SEED="42", STAGE="eval", MAX_EVAL_SECONDS="0", DATA_PATH=str(demo), ARTIFACT_DIR=str(tmp_path))
    run("train_gpt.py", **variables, ATEN_CPU_CAPABILITY="avx2")
    ours, theirs = np.load(tmp_path / "token_nats_quantized.npy"), np.load(RECORD / "token_nats_quantized_seed42.npy")
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < NATS_CLOSE
    result = json.loads((tmp_path / "result.json").read_text())
    recorded = submission["seed_results"]["42"]
    assert abs(result["quantized_val_bpb"] - recorded["quantized_val_bpb"]) < BPB_CLOSE
    assert abs(result["ttt_val_bpb"] - recorded["post_ttt_val_bpb"]) < BPB_CLOSE
