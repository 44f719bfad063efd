"""data/demo_corpus.py on a made-up package and on a few modules of the standard library."""
import importlib
import json
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # worker processes have to find the module by its name
demo_corpus = importlib.import_module("demo_corpus")

# 40 distinct paragraphs: `fingerprint` ignores digits, so the words themselves have to differ.
ANIMALS = "badger beaver bison camel crane eagle falcon ferret gecko heron".split()  # noqa: SIM905
PLACES = "meadow valley harbour desert".split()  # noqa: SIM905
PROSE = [f"The {animal} of the {place} is one of the animals that we would like to see again before the winter."
         for animal in ANIMALS for place in PLACES]


def write(root: Path, name: str, source: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else textwrap.dedent(source).encode())


@pytest.fixture
def tree(tmp_path):
    """A package with every kind of text that is read, and every kind of file that is not."""
    root = tmp_path / "lib"
    first_line, second_line = PROSE[2].split(" that ")
    write(root, "pkg/a.py", f'''
        """{PROSE[0]}

        {PROSE[1]}
        """
        # {first_line} that
        # {second_line}
        #
        # {PROSE[3]}
        class C:
            def f(self):
                """{PROSE[4]}

                # {PROSE[37]}
                """
                text = "{PROSE[30]}"
                if self:
                    # {PROSE[5]}
                    return 1

        add_docstr(C.f, r"""
        f(x) -> y

        {PROSE[6]}
        """.format(a=1))
        ''')
    write(root, "pkg/b.py", f'"""{PROSE[0].upper().capitalize()}\n\n{PROSE[7]}\n\n{PROSE[8]}\n"""\n')
    write(root, "pkg/latin.py", b"# -*- coding: latin-1 -*-\n# " + PROSE[9].replace("again", "\xe0 nouveau").encode("latin-1"))
    write(root, "pkg/broken.py", f'"""{PROSE[31]}"""\ndef (:\n')
    write(root, "pkg/notutf8.py", b"# \xff\xfe " + PROSE[32].encode())
    write(root, "pkg/nul.py", b"# \0 " + PROSE[33].encode())
    write(root, "pkg/tests/test_a.py", f'"""{PROSE[34]}"""')
    write(root, "pkg/_vendor/x.py", f'"""{PROSE[35]}"""')
    write(root, "pkg/readme.txt", PROSE[36])
    write(root, "pydoc_data/topics.py", "topics = {'if': " + repr("\n".join(["The title", "*********", "", PROSE[10]])) + "}\n")
    return root


def sources(root: Path, *tops: str) -> list:
    return [demo_corpus.Source(top, "1.0", str(root), demo_corpus.module_names(root, root / top)) for top in tops]


def corpus_text(out: Path) -> str:
    return "\n".join(json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines())


def test_docstrings_comments_and_topics_are_read_once_each(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_corpus, "MIN_PAGE_BYTES", 0)
    out = tmp_path / "out.jsonl"
    demo_corpus.build(out, sources(tree, "pkg", "pydoc_data"), 10**6, workers=1, progress=False)
    found = sorted(corpus_text(out).splitlines())
    # b.py repeats PROSE[0] in other capitals: the copy of the file that comes first is kept.
    assert found == sorted([*PROSE[:9], PROSE[9].replace("again", "\xe0 nouveau"), PROSE[10]])


def test_sources_are_relative_and_paragraphs_keep_file_order(tree, tmp_path):
    out = tmp_path / "out.jsonl"
    demo_corpus.build(out, sources(tree, "pkg"), 10**6, workers=1, progress=False)
    documents = {d["source"]: d["text"] for d in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert documents["pkg/a.py"] == "\n".join(PROSE[:7])
    assert set(documents) == {"pkg/a.py"}, "pages below MIN_PAGE_BYTES are left out"


CASES = {  # text -> paragraphs of prose
    "wrapped lines": ("The first line of a paragraph goes on\nin the next line and then it ends in a full stop.",
                      ["The first line of a paragraph goes on in the next line and then it ends in a full stop."]),
    "code": ("for i in range(10): total = total + values[i] * weights[i] and so on until the end of it.", []),
    "doctest": (">>> print('This is the sort of line that would be prose if it were not for the prompt.')", []),
    "table": ("====  ====\nThis is the heading that a table has and it is long enough to be taken for prose\n====  ====", []),
    "digits": ("The sizes are 1024, 2048, 4096, 8192, 16384, 32768 and 65536, and the last of them is 131072.", []),
    "too short": ("This is not long.", []),
    "licence": ("Permission is granted to use this file under the license that is found in the root of the tree.", []),
    "no small words": ("Alpha beta gamma delta epsilon zeta theta iota kappa lambda omicron sigma upsilon omega.", []),
    "heading": ("A heading that is as long as a paragraph and has all of the small words\n" + "=" * 70, []),
    "markup": ("Use :func:`~torch.abs` or ``x`` as in the `manual <http://a.b>`_, which is **not** the *same* as this [1]_.",
               ["Use torch.abs or x as in the manual, which is not the same as this."]),
    "literal block": ("The next lines are an example of what is meant by it, and it is left out::\n\n"
                      "    This is in the block and would be taken for prose if it were not indented.\n\n"
                      "After the block it goes on with a paragraph that is as good as any of the others.",
                      ["After the block it goes on with a paragraph that is as good as any of the others."]),
    "directives": (".. math::\n\n    This is in the formula and would be taken for prose if it were not indented.\n\n"
                   ".. note::\n\n    This is in the note, and a note is as good as any other paragraph of the text.",
                   ["This is in the note, and a note is as good as any other paragraph of the text."]),
    "google arguments": ("Args:\n    dim (int, optional): the dimension to reduce, which is the last one if it is not given.\n"
                         "    out (Tensor): the tensor to which the result is written, if it is not to be a new one.",
                         ["The dimension to reduce, which is the last one if it is not given.",
                          "The tensor to which the result is written, if it is not to be a new one."]),
    "numpy arguments": ("axis : int, optional\n    The axis along which it is done, which is the last one if it is not given.",
                        ["The axis along which it is done, which is the last one if it is not given."]),
    "bullets": ("- this is the first of the items and it is long enough to be kept\n  as it is.\n"
                "- this is the other one of the items and it has no stop at the end, so it goes",
                ["This is the first of the items and it is long enough to be kept as it is."]),
    "missing stop": ("This comment was written by someone who did not care to put a stop at the end",
                     ["This comment was written by someone who did not care to put a stop at the end."]),
    "half a sentence": ("This comment is cut in the middle of what its author would have liked to say of the", []),
    "name first": ("numel() is the number of the elements that are in the tensor, as it is in all of the others.", []),
}


@pytest.mark.parametrize("case", CASES)
def test_prose_filter(case):
    text, expected = CASES[case]
    assert list(demo_corpus.paragraphs(text)) == expected


def test_pages_are_page_sized_and_lose_nothing():
    bound = demo_corpus.pages(PROSE)
    assert "\n".join(bound).split("\n") == PROSE
    assert len(bound) == 1 + sum(map(len, PROSE)) // demo_corpus.PAGE_BYTES
    little_more = PROSE[:33]
    assert 0 < sum(map(len, little_more)) - demo_corpus.PAGE_BYTES < demo_corpus.PAGE_BYTES // 4
    assert demo_corpus.pages(little_more) == ["\n".join(little_more)]


def test_order_depends_on_the_content_only():
    documents = [(text, "m.py") for text in PROSE]
    shuffled = demo_corpus.shuffled(documents, 10**6)
    assert shuffled == demo_corpus.shuffled(documents[::-1], 10**6)
    assert [d["text"] for d in shuffled] != PROSE and sorted(d["text"] for d in shuffled) == sorted(PROSE)
    first_three = sum(len(d["text"]) for d in shuffled[:3])
    assert demo_corpus.shuffled(documents, first_three) == shuffled[:3], "a smaller corpus is the start of a larger one"
    assert demo_corpus.shuffled(documents, first_three - 1) == shuffled[:2]


def test_stops_at_the_first_source_that_is_enough(tree):
    documents, versions = demo_corpus.collect(sources(tree, "pkg", "pydoc_data"), 400, workers=1, progress=False)
    assert list(versions) == ["pkg"] and {name for _, name in documents} == {"pkg/a.py"}


def test_equal_bytes_whatever_the_workers(tmp_path):
    """A few real packages, read by one process and by two: the same file. This is what the meta file's sha256 promises."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found = [name for top in ("concurrent", "email", "json", "logging")
             for name in demo_corpus.module_names(stdlib, stdlib / top)]
    source = demo_corpus.Source("python", "x", str(stdlib), found)
    metas = [demo_corpus.build(tmp_path / f"{n}.jsonl", [source], 60_000, workers=n, progress=False) for n in (1, 2)]
    one, two = ((tmp_path / f"{n}.jsonl").read_bytes() for n in (1, 2))
    assert one == two and metas[0] == metas[1]
    assert 40_000 < metas[0]["text_bytes"] <= 60_000
    assert str(stdlib) not in one.decode()
    texts = corpus_text(tmp_path / "1.jsonl").splitlines()
    assert len(texts) == len(set(texts))


def test_installed_sources_are_a_fixed_list_and_have_no_tests():
    listed = list(demo_corpus.installed_sources())
    assert listed[0].name == "python" and "pydoc_data/topics.py" in listed[0].names
    assert [s.name for s in listed[1:]] == [name for name in demo_corpus.DISTRIBUTIONS if name in {s.name for s in listed}]
    assert not {"pytest", "ruff", "hypothesis"} & set(demo_corpus.DISTRIBUTIONS)
    for source in listed:
        assert source.names == sorted(source.names) and (Path(source.root) / source.names[0]).is_file()
        assert not any(Path(name).is_absolute() or "/tests/" in name for name in source.names)


def test_command_line(tree, tmp_path, monkeypatch, capsys):
    installed = sources(tree, "pkg")
    monkeypatch.setattr(demo_corpus, "installed_sources", lambda: iter(installed))
    out = tmp_path / "new folder" / "demo.jsonl"
    command = [str(out), "--workers", "1"]

    assert demo_corpus.main(command) == 0
    meta = json.loads((out.parent / "demo.jsonl.meta.json").read_text())
    assert meta["versions"] == {"pkg": "1.0"} and meta["documents"] == 1 and meta["bytes"] == out.stat().st_size
    assert meta["sha256"] == demo_corpus.sha256(out)
    assert {p.name for p in out.parent.iterdir()} == {"demo.jsonl", "demo.jsonl.meta.json"}, "no temporary files stay"

    def builds(*args: str) -> bool:
        capsys.readouterr()
        assert demo_corpus.main([*command, *args]) == 0
        return "up to date" not in capsys.readouterr().out

    assert not builds()
    assert builds("--max-bytes", "5000") and not builds("--max-bytes", "5000")
    out.write_text(out.read_text() + "\n")
    assert builds("--max-bytes", "5000")
    installed[0] = installed[0]._replace(version="1.1")
    assert builds("--max-bytes", "5000") and not builds("--max-bytes", "5000")


def test_failures_are_one_line(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_corpus, "installed_sources", lambda: iter([]))
    assert demo_corpus.main([str(tmp_path / "x.jsonl"), "--workers", "1"]) == 1
    assert "found no prose" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        demo_corpus.main([str(tmp_path / "x.jsonl"), "--max-bytes", "0"])
    assert stop.value.code == 2


def test_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")

    def lines():
        yield "new\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_corpus.replace(path, lines())
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]
