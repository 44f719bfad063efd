"""The documents: short, and true about the paths, variables and commands they name."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

import train_gpt as tg

PAGES = ["README.md", "LOG.md", "bench/README.md", "data/README.md", "records/README.md", "tools/validity.md"]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
VARIABLES = {name.upper() for name in tg.Config.__dataclass_fields__}
ELSEWHERE = {  # variables of other programs
    "ATEN_CPU_CAPABILITY", "TRITON_INTERPRET", "TORCH_INDEX", "CUDA_HOME", "OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_", "PATH", "R"}  # fmt: skip


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_front_page_fits_on_two_screens():
    assert TEXTS["README.md"].count("\n") <= 110


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.resolve().relative_to(ROOT.resolve()).as_posix()), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_files_that_exist(page):
    for path in re.findall(r"(?:python|bash) ((?:tools|bench|data|records|tests)?/?\w[\w./-]*\.(?:py|sh))", TEXTS[page]):
        made_here = path.startswith("build/") or path == "run.sh"  # that of a record folder
        assert made_here or (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tools|bench|data|tests)/[\w./]+\.\w+)`", TEXTS[page]):
        assert (ROOT / path).exists() or path.startswith("data/demo"), path


@pytest.mark.parametrize("page", [page for page in PAGES if page != "LOG.md"])
def test_variables_exist(page):
    named = set(re.findall(r"\b([A-Z][A-Z0-9_]{2,})=", TEXTS[page]))
    assert named <= VARIABLES | ELSEWHERE, named - VARIABLES - ELSEWHERE


def test_the_front_page_names_every_section():
    sections = re.findall(r"^# =+\n# ([A-Z -]+?) - ", (ROOT / "train_gpt.py").read_text(), re.M)
    table = TEXTS["README.md"].partition("| section |")[2].partition("\n\n")[0]
    assert sections and [name for name in sections if name not in table] == []


def test_the_example_of_a_change_still_applies():
    """The line that README changes stands in the record that it copies, and its variables are the record's."""
    shell = re.search(r"```bash\n(.*?)```", TEXTS["README.md"], re.S)[1]
    record = ROOT / re.search(r" R=(\S+)", shell)[1]
    old, new = re.search(r"sed -i 's/(.*?)/(.*?)/'", shell).groups()
    readable = (record / "train_gpt_readable.py").read_text()
    assert readable.count(old) == 1
    ast.parse(readable.replace(old, new))
    seeds = re.search(r"for seed in ([\d ]+);", shell)[1].split()
    assert "SEEDS_DECLARED=" + ",".join(seeds) in (record / "run.sh").read_text()
    assert Path(record / "run.sh").exists() and "ARTIFACT_DIR" not in (record / "run.sh").read_text()
