"""Print the sections of the script: where each begins, its code tokens, tokens a line and packed bytes.

    python tools/outline.py [train_gpt.py] [--packed]

Code tokens are those of Python's tokenizer without comments, docstrings, newlines and indents. Packed bytes are what the section
adds to the compressed script: the difference between packing with it and without it.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import brotli

RULE = "# " + "=" * 98
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
HEAVY = 35  # tokens of a line that is hard to read


class Section(NamedTuple):
    """One section of a script. `lines` maps line numbers to their code tokens; lines without code are absent."""

    name: str
    purpose: str
    start: int  # line of its title
    lines: dict[int, int]

    @property
    def tokens(self) -> int:
        return sum(self.lines.values())

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / max(1, len(self.lines))


def docstring_lines(tree: ast.Module) -> set[int]:
    """Collect the line numbers of all docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node) is not None]
    lines: set[int] = set()
    for owner in owners:
        docstring = owner.body[0]
        lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def tokens_by_line(source: str) -> dict[int, int]:
    """Count the code tokens of every line that has any."""
    docstrings = docstring_lines(ast.parse(source))
    counts: dict[int, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type not in LAYOUT and line not in docstrings:
            counts[line] = counts.get(line, 0) + 1
    return counts


def titles(source: str) -> list[tuple[int, str, str]]:
    """Find the section titles, "NAME - what it is for" between two rules: [(line, name, purpose)]."""
    lines = source.splitlines()
    between = [i for i in range(1, len(lines) - 1) if lines[i - 1] == lines[i + 1] == RULE]
    return [(i + 1, *lines[i][2:].split(" - ", 1)) for i in between]


def outline(source: str) -> list[Section]:
    """Cut a script into its sections, the lines above the first one being "HEAD"."""
    counts = tokens_by_line(source)
    heads = [(1, "HEAD", "Imports and constants."), *titles(source)]
    ends = [start for start, *_ in heads[1:]] + [source.count("\n") + 2]
    return [
        Section(name, purpose, start, {line: n for line, n in counts.items() if start <= line < end})
        for (start, name, purpose), end in zip(heads, ends, strict=True)
    ]


def cut_section(source: str, name: str) -> tuple[str, str, str]:
    """Cut a script into what stands above a section, the section from its first rule on, and what stands below.

    Raises ValueError when there is no section of that name.
    """
    found = titles(source)
    names = [title for _, title, _ in found]
    if name not in names:
        raise ValueError(f"no section {name!r}; there are {', '.join(names) or 'none'}")
    lines = source.splitlines(keepends=True)
    marks = [start - 2 for start, *_ in found] + [len(lines)]
    index = names.index(name)
    first, end = marks[index : index + 2]
    return "".join(lines[:first]), "".join(lines[first:end]), "".join(lines[end:])


def without_section(source: str, name: str) -> str:
    """Leave one section out of a script. Raises ValueError when there is none of that name."""
    above, _, below = cut_section(source, name)
    return above + below


def packed_bytes(source: str) -> dict[str, int]:
    """Measure what every section adds to the minified and compressed script, in bytes."""
    from pack_code import minify  # it needs python-minifier

    def size(text: str) -> int:
        return len(brotli.compress(minify(text).encode(), quality=11, lgwin=24)) * 5 // 4  # base85

    whole = size(source)
    return {name: whole - size(without_section(source, name)) for _, name, _ in titles(source)} | {"total": whole}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, nargs="?", default=Path(__file__).parents[1] / "train_gpt.py")
    parser.add_argument("--packed", action="store_true", help="measure packed bytes too; a minute")
    args = parser.parse_args(argv)
    try:
        source = args.script.read_text()
        sections = outline(source)
        packed = packed_bytes(source) if args.packed else {}
    except (OSError, SyntaxError) as e:
        print(f"error: cannot read {args.script}: {e}", file=sys.stderr)
        return 1
    print(f"{'section':<20}{'line':>6}{'code lines':>12}{'tokens':>8}{'a line':>8}{'heavy':>7}{'packed':>9}")
    for s in sections:
        heavy = sum(n >= HEAVY for n in s.lines.values())
        size = packed.get(s.name, 0)
        print(f"{s.name:<20}{s.start:>6}{len(s.lines):>12}{s.tokens:>8}{s.tokens_per_line:>8.1f}{heavy:>7}{size:>9}")
    lines = [n for s in sections for n in s.lines.values()]
    wide = sum(len(line) > 110 for line in source.splitlines())
    print(f"{'file':<20}{'':>6}{len(lines):>12}{sum(lines):>8}{sum(lines) / len(lines):>8.1f}"
          f"{sum(n >= HEAVY for n in lines):>7}{packed.get('total', 0):>9}")
    print(f"{wide} lines over 110 columns")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
