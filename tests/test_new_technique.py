"""What a technique costs: value embeddings on the last blocks, added to a copy of the script as a trial would add them."""

import difflib
import os
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_env, write_dataset

SCRIPT = (ROOT / "train_gpt.py").read_text()
PATIENCE = 1800  # seconds, on a busy machine

KNOB = '    value_embed_last: int = knob(0, "blocks, counted from the last, whose values get an embedding of the token", lo=0, model=True)\n'
ROW = '''\
        Parameter(
            f"{block}.attn.value_embed", (cfg.vocab_size, cfg.kv_dim), nn.init.zeros_, "scalars", (Role("", "", INT8_ROWS),),
            int(block.removeprefix("blocks.")) >= cfg.num_layers - cfg.value_embed_last),
'''
USE = '''\
        if hasattr(self, "value_embed"):
            own = F.embedding(context.tokens, self.value_embed).view_as(v)
            v = v + own.to(v.dtype)
'''
HUNKS = (  # (a line of the script, what is put above it)
    ("    xsa_last_n: int = knob(", KNOB),
    ('        Parameter(f"{block}.attn.attn_gate_w"', ROW),
    ("        y = self.attend(q, k, v, context, depth, positions)\n", USE),
)


def script_with_value_embeddings() -> str:
    source = SCRIPT
    for line, above in HUNKS:
        assert source.count(line) == 1, line
        source = source.replace(line, above + line)
    return source


def test_a_technique_is_at_most_four_hunks():
    diff = difflib.unified_diff(SCRIPT.splitlines(), script_with_value_embeddings().splitlines(), lineterm="")
    assert 0 < sum(line.startswith("@@") for line in diff) <= 4


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial")
    (folder / "train_gpt.py").write_text(script_with_value_embeddings())
    write_dataset(folder / "data")

    def run(**changes):
        env = os.environ | tiny_env(data_path=folder / "data", artifact_dir=folder / "out", quant="rd", target_bytes=0) | changes
        return subprocess.run([sys.executable, "train_gpt.py"], cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE)

    return run


def test_it_trains_is_stored_and_scores(trial):
    done = trial(VALUE_EMBED_LAST="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "int8_row: blocks.*.attn.attn_gate_w, blocks.*.attn.value_embed" in done.stdout
    assert "test-time trained" in done.stdout


def test_a_typo_in_its_name_is_refused(trial):
    done = trial(VALUE_EMBED_LST="2")
    assert done.returncode == 2 and "VALUE_EMBED_LAST" in done.stderr
