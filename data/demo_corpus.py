"""
Build about 10 MB of English prose from what every installation already has: documentation inside Python source.

    python data/demo_corpus.py OUT.jsonl [--max-bytes 10000000] [--workers 2]

Docstrings, whole-line comments and help topics of the standard library and of the packages in DISTRIBUTIONS are
reduced to paragraphs of prose, deduplicated, bound into pages of one module each and shuffled. One page is one line,
{"text", "source"}; OUT.jsonl.meta.json beside it says which versions made it. Equal versions give equal bytes.
"""
from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from inspect import cleandoc
from itertools import groupby, pairwise
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

# Read in this order until max_bytes is reached. Only what requirements.txt pins or torch pulls in: a corpus that
# changed with the linter somebody has installed could not be compared with anyone else's.
DISTRIBUTIONS = {  # name -> top-level module
    "torch": "torch", "sympy": "sympy", "numpy": "numpy", "networkx": "networkx", "huggingface_hub": "huggingface_hub",
    "mpmath": "mpmath", "fsspec": "fsspec", "Jinja2": "jinja2", "filelock": "filelock", "tqdm": "tqdm",
    "typing_extensions": "typing_extensions", "sentencepiece": "sentencepiece",
}
# Tests say little in prose; vendored trees repeat other packages; the rest is left out of some Python installations.
SKIPPED_FOLDERS = {
    "__pycache__", "test", "tests", "_vendor", "vendored", "site-packages", "dist-packages", "lib-dynload",
    "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "distutils",
}
PAGE_BYTES = 3000       # about the mean document of FineWeb's validation split
MIN_PAGE_BYTES = 200

# ==================================================================================================
# PROSE - one text with reST, doctest and code in it -> its paragraphs of English.
# ==================================================================================================

FUNCTION_WORDS = frozenset(re.findall(r"\w+", """
    a all also an and any are as at be been but by can do does each for from given has have if in into is it its may
    more must no not of on one only or other same should so such than that the their them then there these they this
    to use used using was we when where which will with would you"""))

RULE = re.compile(r"^\s*([=\-~^\"'*#+.])\1{2,}[=\-~^\"'*#+.\s]*$")                # heading underlines, table borders
DIRECTIVE = re.compile(r"^\s*\.\. ?(?P<name>[\w:.-]+?)?::.*$|^\s*\.\. ")
PROSE_DIRECTIVES = frozenset((
    "note", "warning", "important", "tip", "seealso", "deprecated", "versionadded", "versionchanged", "admonition"))
FIELD = re.compile(r"^\s*:[^:`]+:(\s|$)")                                        # :param x:, :returns:
PROLOGUE = re.compile(r"#!|#.*coding[:=]")                                       # lines 1 and 2 of a script
BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\d+[.)]|\(?[a-z]\)|@param\b)\s+")
ARGUMENT = re.compile(r"^\s*`*\*{0,2}\w[\w.]*`*(?:, *\*{0,2}\w+)*(?P<typed> ?\([^)]*\)| ?\[[^\]]*\]| (?=:))?`* ?:\s")
NOT_PROSE = re.compile(
    r">>>|[{}|\\$]|\w@\w|==|->|=>|\*\*|//\w|\.\.\.\s*\w+\s*=|^\s*(?:TODO|FIXME|XXX|HACK|noqa|type:|pylint|mypy|ruff|"
    r"flake8|fmt:|usage:|pragma|def |class |import |from \w+ import )|copyright|\blicen[sc]|warrant|all rights reserved",
    re.IGNORECASE)
CODE_WORD = re.compile(r"\w_\w|\w\(|\[|\w=|^[_.]+\w|\w\.[a-z]\w*[.(_]|\w/\w+/")
MARKUP = [  # in this order
    (re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)\s*(?:<[^`>]*>)?`"), r"\1"),         # :func:`~torch.abs`
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),                          # `text <url>`_
    (re.compile(r"!?\[([^\]]+)\]\(\S+?\)"), r"\1"),                             # [text](url)
    (re.compile(r"`([^`]+)`_{0,2}"), r"\1"),
    (re.compile(r"\*\*(\S(?:[^*]*\S)?)\*\*"), r"\1"),
    (re.compile(r"(?<!\w)\*(\w(?:[^*]*\w)?)\*(?!\w)"), r"\1"),
    (re.compile(r" ?\[[\w#*]+\]_"), ""),                                        # [1]_
    (re.compile(r"\s+"), " "),
]


def plain(text: str) -> str:
    """Inline reST and Markdown become the words a reader sees; white space becomes single spaces."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def sentence(text: str) -> str:
    """
    `text` with the capital or the full stop that a hurried author left out, "" where it lacks both or stops half-way:
    what lacks both is mostly a fragment of a list or of code.
    """
    if not text or text.endswith(("::", ",")):
        return ""
    stopped = text[-1] in ".!?:\"')"
    if text[0].isupper():
        cut_short = not stopped and (not text[-1].isalnum() or text.split()[-1].lower() in FUNCTION_WORDS)
        return "" if cut_short else text if stopped else text + "."
    # Only an ordinary first word may be capitalised: `numel() counts ...` and `x0 is ...` are names.
    return text[0].upper() + text[1:] if stopped and re.match(r"[a-z]+(-[a-z]+)?,? ", text) else ""


def is_prose(text: str) -> bool:
    """A paragraph of English: long enough, mostly letters, with the small words that code and tables lack."""
    words = text.split()
    if len(text) < 60 or len(words) < 10 or NOT_PROSE.search(text):
        return False
    if sum(c.isalpha() or c == " " for c in text) <= 0.8 * len(text):
        return False
    small = sum(word.strip(".,;:()\"'").lower() in FUNCTION_WORDS for word in words)
    return small >= 0.2 * len(words) and sum(map(bool, map(CODE_WORD.search, words))) <= 0.15 * len(words)


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines between blank lines, without literal blocks, directives' options and heading rules."""
    literal = None                                 # indentation of the line that opened a literal block
    block: list[str] = []
    for line in [*text.expandtabs().splitlines(), ""]:
        if literal is not None and line.strip():
            if indentation(line) > literal:
                continue
            literal = None
        directive = DIRECTIVE.match(line)
        if line.strip() and not directive and not RULE.match(line):
            block.append(line)
        elif RULE.match(line) and block:
            block.pop()                            # the heading above its underline
        if directive or line.rstrip().endswith("::"):
            name = directive["name"] if directive else None
            literal = None if name in PROSE_DIRECTIVES else indentation(line)
        if block and (not line.strip() or directive):
            yield block
            block = []


def starts_item(previous: str, line: str) -> bool:
    """Whether `line` opens a list item or a described argument, or returns to the left after one."""
    if BULLET.match(line) or FIELD.match(line) or indentation(line) < indentation(previous):
        return True
    # "order: ..." may also be the middle of a wrapped sentence, unless a type stands before the colon.
    argument = ARGUMENT.match(line)
    return bool(argument) and (argument["typed"] is not None or previous.rstrip()[-1] in ".:?!)")


def description(item: list[str]) -> str:
    """The item's words without its bullet, field name, argument name, or the line naming what the next lines describe."""
    if len(item) > 1 and indentation(item[1]) > indentation(item[0]) and not BULLET.match(item[0]):
        argument = ARGUMENT.match(item[0])
        if len(item[0].split()) <= 3 or (argument and argument["typed"] == " "):  # "x : int, optional" above its text
            item = item[1:]
    text = " ".join(item)
    for marker in (BULLET, FIELD, ARGUMENT):
        text = marker.sub("", text, count=1)
    return plain(text)


def paragraphs(text: str) -> Iterator[str]:
    """Prose of a dedented text. A list item or a described argument is a paragraph of its own."""
    for block in blocks(text):
        if any(line.lstrip().startswith((">>>", "...", "$ ", "# ")) for line in block):
            continue
        starts = [0, *(i for i in range(1, len(block)) if starts_item(block[i - 1], block[i])), len(block)]
        for a, b in pairwise(starts):
            if sum(map(len, block[a:b])) >= 60 and is_prose(item := sentence(description(block[a:b]))):
                yield item


# ==================================================================================================
# FILES - one source file -> the texts people wrote into it.
# ==================================================================================================

def docstrings(tree: ast.Module) -> Iterator[tuple[int, int, str]]:
    """(first line, last line, text) of docstrings and of texts attached by calls such as add_docstr(torch.abs, ...)."""
    bodies = [tree]
    while bodies:                                  # statements only: walking every expression costs 5x the time
        node = bodies.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.excepthandler):
                bodies.append(child)
        if not isinstance(node, ast.Expr):
            continue
        if isinstance(node.value, ast.Constant):
            texts = [node.value]
        elif isinstance(node.value, ast.Call) and "add" in getattr(node.value.func, "attr", getattr(node.value.func, "id", "")):
            texts = [n for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
        else:
            continue
        for constant in texts:
            if isinstance(constant.value, str):
                yield constant.lineno, constant.end_lineno, cleandoc(constant.value)


def comments(lines: list[str], taken: set[int]) -> Iterator[tuple[int, int, str]]:
    """(first line, last line, text) of each run of whole-line comments at one indentation, docstring lines excluded."""
    def key(numbered: tuple[int, str]):
        number, line = numbered
        comment = line.lstrip().startswith("#") and number not in taken and not (number <= 2 and PROLOGUE.match(line))
        return indentation(line) if comment else None

    for indent, run in groupby(enumerate(lines, start=1), key):
        if indent is not None:
            numbers, rows = zip(*run, strict=True)
            yield numbers[0], numbers[-1], cleandoc("\n".join(re.sub(r"^\s*#[#:!]* ?", "", row) for row in rows))


def file_prose(root: str, name: str) -> list[str]:
    """Paragraphs of prose in root/name, in file order. What cannot be read or parsed has none."""
    try:
        source = importlib.util.decode_source((Path(root) / name).read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    if name == "pydoc_data/topics.py":             # help("...") texts, the values of one dictionary
        texts = [(n.lineno, n.end_lineno, cleandoc(n.value)) for n in ast.walk(tree)
                 if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    else:
        texts = list(docstrings(tree))
        taken = {number for first, last, _ in texts for number in range(first, last + 1)}
        texts += comments(source.splitlines(), taken)
    return [p for _, _, text in sorted(texts) for p in paragraphs(text)]


class Source(NamedTuple):
    """A tree of modules. `names` are sorted paths relative to `root`, with forward slashes."""
    name: str
    version: str
    root: str
    names: list[str]


def module_names(root: Path, top: Path) -> list[str]:
    """Python files below `top` as sorted paths relative to `root`; folders of SKIPPED_FOLDERS are not entered."""
    names = []
    for folder, folders, files in os.walk(top):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith("config-")]
        names += [(Path(folder) / f).relative_to(root).as_posix() for f in files if f.endswith(".py")]
    return sorted(names)


def installed_sources() -> Iterator[Source]:
    """The standard library, then every distribution of DISTRIBUTIONS that is installed. Imports none of them."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    yield Source("python", platform.python_version(), str(stdlib), module_names(stdlib, stdlib))
    for distribution, module in DISTRIBUTIONS.items():
        try:
            version = importlib.metadata.version(distribution)
            spec = importlib.util.find_spec(module)
        except (importlib.metadata.PackageNotFoundError, ImportError, ValueError):
            continue
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        if spec.submodule_search_locations:
            root = origin.parent.parent
            yield Source(distribution, version, str(root), module_names(root, origin.parent))
        else:
            yield Source(distribution, version, str(origin.parent), [origin.name])


# ==================================================================================================
# CORPUS - paragraphs -> unique paragraphs -> pages -> a file.
# ==================================================================================================

def pages(texts: list[str]) -> list[str]:
    """Consecutive paragraphs bound to about PAGE_BYTES; a short last page joins the one before, a lone short page goes."""
    bound: list[list[str]] = []
    for text in texts:
        if not bound or sum(map(len, bound[-1])) >= PAGE_BYTES:
            bound.append([])
        bound[-1].append(text)
    if len(bound) > 1 and sum(map(len, bound[-1])) < PAGE_BYTES // 4:
        short = bound.pop()
        bound[-1] += short
    joined = ["\n".join(page) for page in bound]
    return [page for page in joined if len(page.encode()) >= MIN_PAGE_BYTES]


def fingerprint(text: str) -> bytes:
    """Equal for paragraphs that differ only in digits, punctuation and case: years, versions, hard-wrapped variants."""
    return hashlib.blake2b(re.sub(r"[\W\d_]+", "", text).lower().encode(), digest_size=12).digest()


def start_worker() -> None:
    gc.disable()                                   # a syntax tree has no cycles, and looking for them costs a third
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # the parent ends its workers


def collect(sources, max_bytes: int, workers: int, progress: bool = True) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(page, source path) pairs in reading order from as many sources as max_bytes needs, and the versions read."""
    documents, versions, seen = [], {}, set()
    size = 0
    quiet = None if progress else True  # None: a bar on a terminal only
    with Pool(workers, start_worker) if workers > 1 else nullcontext() as pool, tqdm(unit="file", disable=quiet) as bar:
        read_all = partial(pool.imap, chunksize=16) if pool else map
        for source in sources:
            if size >= max_bytes:
                break
            versions[source.name] = source.version
            bar.total = bar.n + len(source.names)
            bar.set_description(source.name)
            read = partial(file_prose, source.root)
            # Results arrive in the order of the names, so the number of workers cannot change which copy is kept.
            for name, found in zip(source.names, read_all(read, source.names), strict=True):
                fresh = []
                for text in found:
                    if (mark := fingerprint(text)) not in seen:
                        seen.add(mark)
                        fresh.append(text)
                documents += [(page, name) for page in pages(fresh)]
                size += sum(len(text.encode()) + 1 for text in fresh)
                bar.update()
            bar.set_postfix_str(f"{size / 1e6:.1f} MB of prose")
    return documents, versions


def shuffled(documents: list[tuple[str, str]], max_bytes: int) -> list[dict]:
    """Documents ordered by a hash of their content, cut before the one whose text would pass max_bytes in total."""
    kept, size = [], 0
    for text, source in sorted(documents, key=lambda d: (hashlib.blake2b(d[0].encode()).digest(), d[1])):
        size += len(text.encode())
        if size > max_bytes:
            break
        kept.append({"text": text, "source": source})
    return kept


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def replace(path: Path, lines: Iterator[str]) -> None:
    """Write a file that is either the old one or the complete new one, whenever it is read."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as f:
            f.writelines(lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def meta_path(out: Path) -> Path:
    return out.with_name(out.name + ".meta.json")


def up_to_date(out: Path, max_bytes: int, installed: dict[str, str]) -> bool:
    """`out` holds what its meta file says, and the meta file says what this script would build now."""
    try:
        meta = json.loads(meta_path(out).read_text(encoding="utf-8"))
        return (meta["builder"] == sha256(Path(__file__)) and meta["max_bytes"] == max_bytes
                and all(installed.get(name) == version for name, version in meta["versions"].items())
                and meta["sha256"] == sha256(out))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build(out: Path, sources, max_bytes: int, workers: int, progress: bool = True) -> dict:
    """Write `out` and its meta file; return the meta data."""
    documents, versions = collect(sources, max_bytes, workers, progress)
    kept = shuffled(documents, max_bytes)
    if not kept:
        raise ValueError("found no prose: is the standard library installed as .py files?")
    out.parent.mkdir(parents=True, exist_ok=True)
    meta_path(out).unlink(missing_ok=True)         # an interrupted rebuild must not leave a meta file that lies
    replace(out, (json.dumps(document, ensure_ascii=False) + "\n" for document in kept))
    meta = {
        "sha256": sha256(out), "bytes": out.stat().st_size, "documents": len(kept),
        "text_bytes": sum(len(document["text"].encode()) for document in kept),
        "max_bytes": max_bytes, "versions": versions, "builder": sha256(Path(__file__)),
    }
    replace(meta_path(out), iter([json.dumps(meta, indent=1) + "\n"]))
    return meta


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="file to write; OUT.jsonl.meta.json goes beside it")
    parser.add_argument("--max-bytes", type=int, default=10_000_000, help="UTF-8 bytes of text at most (default %(default)s)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)")
    args = parser.parse_args(argv)
    if args.max_bytes < 1 or args.workers < 1:
        parser.error("--max-bytes and --workers must be positive")
    sources = list(installed_sources())
    if up_to_date(args.out, args.max_bytes, {s.name: s.version for s in sources}):
        print(f"{args.out} is up to date")
        return 0
    try:
        meta = build(args.out, sources, args.max_bytes, args.workers)
    except KeyboardInterrupt:
        print("\ndemo_corpus: interrupted, nothing written", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"demo_corpus: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {meta['documents']} documents, {meta['text_bytes']:,} bytes of text, sha256 {meta['sha256'][:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
