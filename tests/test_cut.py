"""KERNELS is an appendix: a script without it trains, quantizes and scores by the definitions, and refuses its variables."""

import builtins
import json
import os
import re
import subprocess
import symtable
import sys

import pytest
import torch
from conftest import ROOT, tiny_env

import train_gpt as tg

SCRIPT = ROOT / "train_gpt.py"
SECONDS = 1800  # of a run on a busy machine
CLEAN = {name: value for name, value in os.environ.items() if name.lower() not in tg.Config.__dataclass_fields__}


@pytest.fixture(scope="session")
def cut_script(tmp_path_factory):
    """The script after the command that its own section gives."""
    folder = tmp_path_factory.mktemp("cut")
    (command,) = re.findall(r"^# +(sed .*)$", SCRIPT.read_text(), re.M)
    assert command.endswith("train_gpt.py > short.py")
    (folder / "train_gpt.py").write_bytes(SCRIPT.read_bytes())
    subprocess.run(command, shell=True, cwd=folder, check=True, timeout=SECONDS)
    return folder / "short.py"


def start(script, out, dataset, **changes) -> subprocess.CompletedProcess:
    env = CLEAN | tiny_env(data_path=dataset, artifact_dir=out, **changes) | dict(OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=SECONDS)


def global_names(table) -> set[str]:
    """Global names that code below a symbol table reads."""
    own = {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}
    return own.union(*(global_names(child) for child in table.get_children()))


def test_the_command_cuts_off_the_section_and_nothing_else(cut_script):
    lines = SCRIPT.read_text().splitlines()
    first, end = (next(i for i, line in enumerate(lines) if line.startswith(f"# {name} - ")) for name in ("KERNELS", "MAIN"))
    assert cut_script.read_text().splitlines() == lines[: first - 1] + lines[end - 1 :]


def test_what_is_left_reads_no_other_name_of_the_section(cut_script):
    """Only `pick_kernels` may, which looks first whether they are there."""
    table = symtable.symtable(cut_script.read_text(), "short.py", "exec")
    defined = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    missing = {child.get_name(): global_names(child) - defined - set(dir(builtins)) - {"__file__", "__doc__"}
               for child in table.get_children()}
    assert {name: names for name, names in missing.items() if names} == {"pick_kernels": {"choose_kernels", "choose_attention"}}


def test_it_trains_quantizes_and_scores(cut_script, dataset, tmp_path):
    done = start(cut_script, tmp_path, dataset)
    assert done.returncode == 0, done.stderr
    assert "kernels: attention:sdpa (KERNELS was cut off) mlp:eager" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 12 and result["code_bytes"] == cut_script.stat().st_size
    assert result["val_bpb"] == result["ttt_val_bpb"] < result["quantized_val_bpb"] - 0.1


@pytest.mark.parametrize(("changes", "said"), [
    (dict(mlp_kernel="lsb"), "MLP_KERNEL=lsb: "),
    (dict(attn_backend="flex", ttt_adam_kernel="triton"), "ATTN_BACKEND=flex TTT_ADAM_KERNEL=triton: "),
    (dict(attn_backend="cpu"), "ATTN_BACKEND=cpu: "),
    (dict(cuda_graphs=True), "CUDA_GRAPHS=1: "),
])  # fmt: skip
def test_a_variable_that_asks_for_a_kernel_is_refused(monkeypatch, changes, said):
    monkeypatch.delattr(tg, "choose_kernels")
    world = tg.World(0, 1, torch.device("cpu"), torch.float32)
    with pytest.raises(tg.RunError, match=f"^{said}no kernels in this script.*take the whole script, or set"):
        tg.pick_kernels(tg.Config(**changes), world)


def test_a_run_that_asks_for_a_kernel_ends_with_the_reason(cut_script, dataset, tmp_path):
    done = start(cut_script, tmp_path, dataset, mlp_kernel="lsb")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: MLP_KERNEL=lsb: no kernels in this script")
    assert not (tmp_path / "final_model.pt").exists()
