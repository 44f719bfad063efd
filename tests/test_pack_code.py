"""The packed script must behave like the readable one, in every way a trainer depends on."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_env
from hypothesis import given, strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import pack_code

ROOT = Path(__file__).resolve().parent.parent
RULE = "# " + "=" * 98
TOY = '''\
"""A toy trainer."""
from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass, field, fields
from pathlib import Path

LIMIT = 3


@dataclass
class Config:
    """Docstrings go away."""
    width: int = 4
    names: list[str] = field(default_factory=lambda: ["é"])


def area(first_operand, second_operand):
    # A comment that goes away.
    product_of_operands = first_operand * second_operand
    return product_of_operands + product_of_operands


@functools.cache
def kernel(pointer, BLOCK_SIZE: int = 2):
    compile_time_value = BLOCK_SIZE
    return pointer + compile_time_value


def guarded(value):
    assert value > 0, "assertion kept"
    if value > LIMIT:
        raise ValueError("check kept")
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--value", type=int, default=1, help="a number")
    args = parser.parse_args()
    print([(f.name, f.type) for f in fields(Config)], Config(), area(2, 3), kernel(1), guarded(args.value))
    print(Path(__file__).name, __name__)


if __name__ == "__main__":
    main()
'''


def run(script: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script.name, *args], cwd=script.parent, capture_output=True, text=True, timeout=900)


@pytest.fixture
def toys(tmp_path):
    """The readable and the packed toy, under the same file name in two folders."""
    for kind, code in (("readable", TOY.encode()), ("packed", pack_code.pack(TOY))):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "toy.py").write_bytes(code)
    return tmp_path / "readable" / "toy.py", tmp_path / "packed" / "toy.py"


def imported(path: Path):
    spec = importlib.util.spec_from_file_location("packed_toy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["packed_toy"] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


def test_runs_like_the_readable_script(toys):
    readable, packed = (run(script) for script in toys)
    assert readable.returncode == 0 and "__main__" in readable.stdout
    assert (packed.returncode, packed.stdout, packed.stderr) == (readable.returncode, readable.stdout, readable.stderr)


@pytest.mark.parametrize(("value", "error"), [("-1", "AssertionError: assertion kept"), ("9", "ValueError: check kept")])
def test_checks_survive_and_tracebacks_show_the_source(toys, value, error):
    process = run(toys[1], "--value", value)
    assert process.returncode == 1
    assert process.stderr.rstrip().endswith(error)
    assert "value>LIMIT" in process.stderr or "assert value>0" in process.stderr  # text of the unpacked source
    assert 'exec(compile(_s,_f,"exec"))' in process.stderr and "b85decode" not in process.stderr


def test_imports_as_a_module_with_sources(toys):
    module = imported(toys[1])
    assert module.area(2, 3) == 12 and module.Config().names == ["é"]
    for thing in (module.area, module.kernel.__wrapped__, module.guarded):
        source = inspect.getsource(thing)
        assert thing.__name__ in source.split(":")[0]
        assert source in pack_code.minify(TOY) + "\n" and "return" in source
    assert Path(module.__file__) == toys[1]


def test_minify_drops_words_and_keeps_names_that_matter():
    text = pack_code.minify(TOY)
    assert "Docstrings go away" not in text and "A comment" not in text
    assert "product_of_operands" not in text                    # a local
    assert "compile_time_value" in text and "BLOCK_SIZE:int" in text  # read by a decorator
    assert "first_operand*second_operand" in text               # parameters are neither renamed nor copied
    assert "LIMIT=3" in text and "width:int=4" in text


def test_f_strings_are_written_for_the_oldest_python():
    """From 3.12 on the same quotes may stand inside and outside of braces, which 3.11 can not read."""
    assert pack_code.minify("""print(f"{d['a']} {', '.join(names)}")""") == """print(f"{d['a']} {', '.join(names)}")"""


def test_deterministic_and_invertible():
    packed = pack_code.pack(TOY)
    assert packed == pack_code.pack(TOY)
    assert pack_code.unpack(packed) == pack_code.minify(TOY)
    older = pack_code.pack(TOY, base85=True)
    assert pack_code.unpack(older) == pack_code.minify(TOY) and pack_code.is_base85(older) and not pack_code.is_base85(packed)
    assert pack_code.pack(TOY.replace("LIMIT = 3", "LIMIT = 4")) != packed
    with pytest.raises(ValueError, match="not a packed script"):
        pack_code.unpack(TOY.encode())


def test_command_line(toys, tmp_path, capsys):
    out = tmp_path / "build" / "toy.py"
    assert pack_code.main([str(toys[0]), str(out), "--check"]) == 0
    assert out.read_bytes() == toys[1].read_bytes()
    assert [p.name for p in out.parent.iterdir()] == ["toy.py"]
    sizes = dict(pair.split(":") for pair in capsys.readouterr().out.split() if ":" in pair)
    assert int(sizes["packed"]) == out.stat().st_size and int(sizes["readable"]) == len(TOY.encode())


def test_check_refuses_a_script_that_notices_being_packed(tmp_path, capsys):
    script = tmp_path / "toy.py"
    script.write_text(TOY.replace("__doc__", "str(Path(__file__).read_bytes()[:20])"))
    assert pack_code.main([str(script), str(tmp_path / "out.py"), "--check"]) == 1
    assert not (tmp_path / "out.py").exists()
    assert "another --help" in capsys.readouterr().err


def test_the_trainer_packs():
    script = ROOT / "train_gpt.py"
    code = script.read_bytes()
    packed = pack_code.pack(code.decode())
    expected = pack_code.help_output(code, script.name, ROOT)
    assert expected.strip() and pack_code.help_output(packed, script.name, ROOT) == expected


# ---- parts that are left out


PARTS = f"""\
{RULE}
# BASE - what the others need.
{RULE}
LIMIT = 3


def knob(default, doc, lo=0):
    return default, doc, lo


class Config:
    width: int = knob(4, "numbers in a row, as wide as "
                         "they are", lo=1)  # kept
    height: int = knob(5, "é, and ünder"), knob(6, "two in a line", 2)


{RULE}
# EXTRA - what nobody needs.
{RULE}
def extra():
    return LIMIT


{RULE}
# MAIN - the rest.
{RULE}
def main():
    EXTRA, extra = 1, 2  # a local of the same name is no need
    print(LIMIT + extra, Config.width, Config.height)


def asks():
    if "optional" in globals():
        return optional(also)
    return None


{RULE}
# SPARE - what is asked for only where it is there.
{RULE}
also = 4


def optional(value):
    return value


{RULE}
# END - where it begins.
{RULE}
if __name__ == "__main__":
    main()
"""


def test_a_section_that_nobody_needs_can_be_dropped(tmp_path):
    smaller = pack_code.drop(PARTS, ["EXTRA"])
    assert "def extra" not in smaller and smaller.count(RULE) == 8
    packed = tmp_path / "packed.py"
    packed.write_bytes(pack_code.pack(PARTS, ["EXTRA"]))
    process = run(packed)
    assert process.stdout.startswith("5 (4, 'numbers in a row") and not process.stderr
    assert "def extra" not in pack_code.unpack(packed.read_bytes())


def test_a_section_that_the_script_looks_for_can_be_dropped():
    assert "def optional" not in pack_code.drop(PARTS, ["SPARE"])
    with pytest.raises(ValueError, match=r"cannot leave out SPARE: the rest of the script needs also$"):
        pack_code.drop(PARTS.replace("return None", "return also"), ["SPARE"])


def test_help_can_be_dropped_and_nothing_else_changes():
    smaller = pack_code.drop(PARTS, ["help"])
    assert 'width: int = knob(4, "", lo=1)  # kept' in smaller
    assert 'height: int = knob(5, ""), knob(6, "", 2)' in smaller
    assert smaller.partition("class Config")[0] == PARTS.partition("class Config")[0]
    assert smaller.partition(RULE + "\n# EXTRA")[2] == PARTS.partition(RULE + "\n# EXTRA")[2]


@pytest.mark.parametrize(("part", "message"), [
    ("BASE", "cannot leave out BASE: the rest of the script needs Config, LIMIT"),
    ("MAIN", "cannot leave out MAIN: the rest of the script needs main"),
    ("NOTHING", "no section 'NOTHING'; there are BASE, EXTRA, MAIN, SPARE, END")])  # fmt: skip
def test_what_the_script_needs_cannot_be_dropped(part, message, tmp_path, capsys):
    script, out = tmp_path / "script.py", tmp_path / "out.py"
    script.write_text(PARTS)
    assert pack_code.main([str(script), str(out), "--drop", f"help,{part}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}") and not out.exists()


def test_a_packed_script_says_what_it_lacks():
    packed = pack_code.pack(PARTS, ["EXTRA", "help"])
    assert packed.startswith(b"# without EXTRA,help\n# coding:latin-1\nimport") and pack_code.dropped_parts(packed) == ["EXTRA", "help"]
    assert pack_code.pack(PARTS, pack_code.dropped_parts(packed)) == packed
    assert pack_code.unpack(packed) == pack_code.minify(pack_code.drop(PARTS, ["EXTRA", "help"]))
    assert pack_code.dropped_parts(pack_code.pack(PARTS)) == []


@pytest.fixture(scope="module")
def lean(tmp_path_factory) -> Path:
    """The trainer, packed without what a run on a CPU does not use, by the command line, which compares the helps."""
    out = tmp_path_factory.mktemp("lean") / "train_gpt.py"
    assert pack_code.main([str(ROOT / "train_gpt.py"), str(out), "--check", "--drop", "KERNELS,help"]) == 0
    return out


def test_the_trainer_without_kernels_trains_and_scores(lean, dataset, tmp_path):
    source = pack_code.unpack(lean.read_bytes())
    assert "def fused_mlp" not in source and "width of the residual stream" not in source
    assert len(lean.read_bytes()) < len(pack_code.pack((ROOT / "train_gpt.py").read_text())) - 9_700  # 12,000 in base 85
    settings = tiny_env(data_path=dataset, artifact_dir=tmp_path / "run", iterations=2, val_doc_fraction=0.3)
    env = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, str(lean)], env=env, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["code_bytes"] == lean.stat().st_size and result["val_bpb"] > 0
    asking = subprocess.run([sys.executable, str(lean)], env=env | {"QK_KERNEL": "triton"}, capture_output=True, text=True, timeout=900)
    assert asking.returncode == 1 and "QK_KERNEL=triton: no kernels in this script" in asking.stderr


@given(st.lists(st.one_of(st.sampled_from([b'"', b'""', b"\\", b"\0", b"\r", b"\n", b"\r\n", b"7", b"\x85"]), st.binary(max_size=4))))
def test_any_bytes_stand_in_a_latin_1_string(pieces):
    data, space = b"".join(pieces), {}
    source = f'# coding:latin-1\ndata = """{pack_code.literal(data)}""".encode("latin-1")\n'
    exec(compile(source.encode("latin-1"), "packed", "exec"), space)
    assert space["data"] == data


def test_the_shipped_script_is_small():
    """A byte of script is a byte less for the weights; raise this only by what an issue grants a feature."""
    assert len(pack_code.pack((ROOT / "train_gpt.py").read_text())) <= 69_500
