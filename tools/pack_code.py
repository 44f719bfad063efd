"""Write the script that is shipped: minified, compressed, self-extracting.

    python tools/pack_code.py train_gpt.py build/train_gpt.py --check
    python tools/pack_code.py train_gpt.py build/train_gpt.py --check --drop KERNELS,help

The packed file is what runs and what is counted; the readable script is its twin. Only names, spelling and layout
change: every statement, assertion and check survives, so both behave alike. `--check` writes nothing unless the packed
script answers `--help` exactly like the readable one.

`--drop` leaves out what a configuration does not use: KERNELS (the script then runs on its definitions), any section that
no other one needs, and `help`, what every variable means. The packed script names what it lacks in its first line.
"""

import argparse
import ast
import base64
import os
import re
import subprocess
import symtable
import sys
import tempfile
from pathlib import Path
from unittest import mock

import brotli
import python_minifier
from outline import cut_section
from python_minifier.f_string import OuterFString

# The source is compiled under a name that no file has and registered in linecache under that name: there tracebacks,
# inspect.getsource and the compilers that read a function's text find it. The interpreter's built-in traceback printer
# reads files only, hence the hook, for the process that runs the script.
#
# In Latin-1 every byte is a character, so the compressed bytes stand in a string as they are, but for a few escapes: 2 %
# more than the bytes, where base85 takes 25 %.
STUB = """\
# coding:latin-1
import brotli,linecache,sys,traceback
_s=brotli.decompress(\"""{payload}\""".encode("latin-1")).decode()
"""
BASE85_STUB = """\
import base64,brotli,linecache,sys,traceback
_s=brotli.decompress(base64.b85decode("{payload}")).decode()
"""  # of records made before
STUB_END = """\
_f=__file__+":source"
linecache.cache[_f]=len(_s),None,_s.splitlines(True),_f
if __name__=="__main__":sys.excepthook=traceback.print_exception
exec(compile(_s,_f,"exec"))
"""
BASE85_PAYLOAD = re.compile(rb'b85decode\("([^"]+)"\)')
PAYLOAD = re.compile(rb'brotli\.decompress\((""".*""")\.encode', re.DOTALL)
LACKS = re.compile(rb"\A# without ([^\n]+)\n")
HELP_SECONDS = 900


def names_to_keep(tree: ast.Module) -> set[str]:
    """All parameters: the minifier copies a parameter to rename it, and the copy would keep a tensor alive.
    And every name inside a decorated function: triton.jit compiles the text, where a copied compile-time parameter
    would become an ordinary variable."""
    names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.decorator_list:
            names |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return names


class InlineDocstring(ast.NodeTransformer):
    """Replace the variable __doc__ by the text of the module's docstring, which minifying drops."""

    def visit_Module(self, tree: ast.Module) -> ast.AST:
        self.text = ast.get_docstring(tree, clean=False)
        return self.generic_visit(tree)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(self.text) if node.id == "__doc__" and isinstance(node.ctx, ast.Load) else node


def bound_names(section: str) -> set[str]:
    """Collect the names that the top level of a piece of script binds."""
    top = symtable.symtable(section, "section", "exec")
    return {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()}


def global_names(table: symtable.SymbolTable) -> set[str]:
    """Collect the global names that a scope and those inside it read."""
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced() and symbol.is_global()}
    return own.union(*(global_names(child) for child in table.get_children()))


def without_help(source: str) -> str:
    """Empty the second argument of every `knob(default, "what it means", ..)`."""
    lines = source.encode().splitlines(keepends=True)
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    knobs = [call for call in calls if getattr(call.func, "id", "") == "knob" and len(call.args) > 1]
    if not knobs:
        raise ValueError("there is no help to leave out: the script declares no knob(default, meaning)")
    texts = {(call.args[1].lineno, call.args[1].col_offset): call.args[1] for call in knobs}
    for _, text in sorted(texts.items(), reverse=True):  # from below, so that the lines above keep their places
        first, last = text.lineno - 1, text.end_lineno - 1
        head, tail = lines[first][: text.col_offset], lines[last][text.end_col_offset :]
        lines[first : last + 1] = [head + b'""' + tail]
    return b"".join(lines).decode()


class WithoutAnswered(ast.NodeTransformer):
    """Remove what runs only `if "NAME" in globals()`, for the names given: the script itself does without them."""

    def __init__(self, names: set[str]):
        self.names = names

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        guards = {f"{name!r} in globals()" for name in self.names}
        if ast.unparse(node.test) in guards:
            node.body = [ast.Pass()]
        return node


def needs(rest: str, section: str) -> set[str]:
    """Find the names of a section that the rest of the script cannot do without."""
    names = bound_names(section) - bound_names(rest)
    unguarded = ast.unparse(WithoutAnswered(names).visit(ast.parse(rest)))
    return names & global_names(symtable.symtable(unguarded, "rest", "exec"))


def drop(source: str, parts: list[str]) -> str:
    """Leave sections, or "help", out of a readable script. Raises ValueError naming what the rest needs of a section."""
    for part in parts:
        if part == "help":
            source = without_help(source)
            continue
        above, section, below = cut_section(source, part)
        source = above + below
        if missing := needs(source, section):
            raise ValueError(f"cannot leave out {part}: the rest of the script needs {', '.join(sorted(missing))}")
    return source


print_f_string = OuterFString.__init__  # (self, node, pep701): from Python 3.12 on with the same quotes inside as outside


def minify(source: str) -> str:
    """The same program without comments, docstrings and long local names, in words that Python 3.11 can read."""
    tree = InlineDocstring().visit(ast.parse(source))
    keep_annotations = python_minifier.RemoveAnnotationsOptions(
        remove_variable_annotations=False,  # dataclass fields, and constexpr variables of kernels
        remove_return_annotations=False,    # torch.library reads both of these to infer an operator's schema,
        remove_argument_annotations=False,  # and triton finds compile-time arguments by them
        remove_class_attribute_annotations=False)
    with mock.patch.object(OuterFString, "__init__", lambda self, node, pep701: print_f_string(self, node, pep701=False)):
        return python_minifier.minify(
            ast.unparse(tree), remove_annotations=keep_annotations, remove_literal_statements=True, hoist_literals=False,
            rename_locals=True, preserve_locals=sorted(names_to_keep(tree)), rename_globals=False,
            remove_asserts=False, remove_debug=False, preserve_shebang=False)


def literal(data: bytes) -> str:
    """Write bytes as the inside of a string between triple quotes, one Latin-1 character a byte.

    Escaped is what a source file cannot hold or would change: backslash, NUL, carriage return, and a quote that would end
    the string.
    """
    if data.endswith(b'"'):
        return literal(data[:-1]) + '\\"'
    text = data.decode("latin-1").replace("\\", "\\\\")
    return text.replace("\0", "\\x00").replace("\r", "\\r").replace('""', '"\\"')


def pack(source: str, parts: list[str] | None = None, base85: bool = False) -> bytes:
    """Make the self-extracting script, without the `parts` that `drop` names. Equal sources give equal bytes.

    base85: as records were packed before.
    """
    parts = parts or []
    compressed = brotli.compress(minify(drop(source, parts)).encode(), quality=11, lgwin=24)
    title = f"# without {','.join(parts)}\n" if parts else ""
    if base85:
        return (title + BASE85_STUB.format(payload=base64.b85encode(compressed).decode()) + STUB_END).encode()
    return (title + STUB.format(payload=literal(compressed)) + STUB_END).encode("latin-1")


def is_base85(packed: bytes) -> bool:
    """Tell whether a packed script has the form that records had before."""
    return BASE85_PAYLOAD.search(packed) is not None


def dropped_parts(packed: bytes) -> list[str]:
    """Read what a packed script was packed without."""
    title = LACKS.match(packed)
    return title[1].decode().split(",") if title else []


def unpack(packed: bytes) -> str:
    """The minified source inside a packed script."""
    if old := BASE85_PAYLOAD.search(packed):
        return brotli.decompress(base64.b85decode(old[1])).decode()
    payload = PAYLOAD.search(packed)
    if payload is None:
        raise ValueError("not a packed script: it holds no payload")
    return brotli.decompress(ast.literal_eval(payload[1].decode("latin-1")).encode("latin-1")).decode()


def help_output(code: bytes, name: str, library: Path) -> str:
    """What `python NAME --help` prints when NAME holds `code` and the modules in `library` can be imported."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(code)
        environment = {**os.environ, "PYTHONPATH": str(library.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.run([sys.executable, name, "--help"], cwd=folder, env=environment, timeout=HELP_SECONDS,
                                 capture_output=True, text=True)
    if process.returncode != 0:
        raise ValueError(f"{name} --help ends with exit code {process.returncode}: {process.stderr[-1000:].strip()}")
    return process.stdout


def check_help(packed: bytes, readable: bytes, script: Path) -> None:
    """Raise ValueError unless a packed script prints the --help of its readable twin, less what it was packed without."""
    twin = drop(readable.decode(), dropped_parts(packed)).encode()
    outputs = [help_output(code, script.name, script.parent) for code in (packed, twin)]
    if outputs[0] != outputs[1]:
        raise ValueError("the packed script prints another --help than the readable one")


def write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    os.replace(draft, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="the readable script")
    parser.add_argument("out", type=Path, help="the packed script to write")
    parser.add_argument("--check", action="store_true", help="compare what both print for --help before writing")
    parser.add_argument("--drop", default="", metavar="SECTION,..", help="leave these sections out, and/or help")
    args = parser.parse_args(argv)
    parts = [part.strip() for part in args.drop.split(",") if part.strip()]
    try:
        readable = args.script.read_bytes()
        packed = pack(readable.decode(), parts)
        if args.check:
            check_help(packed, readable, args.script)
    except (OSError, SyntaxError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    write_atomically(args.out, packed)
    print(f"readable:{len(readable)} minified:{len(unpack(packed).encode())} packed:{len(packed)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
