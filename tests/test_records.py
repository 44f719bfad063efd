"""Every committed record folder stands on its own: its numbers follow from its files, its script runs, its command is real."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(p.parent for p in (ROOT / "records").glob("*/*/submission.json"))


def test_there_are_records():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_numbers_follow_from_logs_and_files(folder):
    done = subprocess.run([sys.executable, ROOT / "tools" / "record.py", "validate", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[PASS]" in done.stdout and "[FAIL]" not in done.stdout


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_command_names_real_variables(folder):
    shown = subprocess.run([sys.executable, folder / "train_gpt.py", "--help"], capture_output=True, text=True, check=True).stdout
    variables = set(re.findall(r"^  ([A-Z0-9_]+) +(?:int|float|bool|str) ", shown, re.M))
    used = set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", (folder / "run.sh").read_text()))
    assert used and used <= variables


def test_history_table_lists_every_record():
    table = (ROOT / "records" / "README.md").read_text()
    assert all(folder.name in table for folder in FOLDERS)
