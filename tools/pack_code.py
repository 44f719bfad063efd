"""Write the script that is shipped: minified, compressed, self-extracting.

    python tools/pack_code.py train_gpt.py build/train_gpt.py --check

The packed file is what runs and what is counted; the readable script is its twin. Only names, spelling and layout
change: every statement, assertion and check survives, so both behave alike. `--check` writes nothing unless the packed
script answers `--help` exactly like the readable one.
"""

import argparse
import ast
import base64
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import brotli
import python_minifier
from python_minifier.f_string import OuterFString

# The source is compiled under a name that no file has and registered in linecache under that name: there tracebacks,
# inspect.getsource and the compilers that read a function's text find it. The interpreter's built-in traceback printer
# reads files only, hence the hook, for the process that runs the script.
STUB = """\
import base64,brotli,linecache,sys,traceback
_s=brotli.decompress(base64.b85decode("{payload}")).decode()
_f=__file__+":source"
linecache.cache[_f]=len(_s),None,_s.splitlines(True),_f
if __name__=="__main__":sys.excepthook=traceback.print_exception
exec(compile(_s,_f,"exec"))
"""
PAYLOAD = re.compile(rb'b85decode\("([^"]+)"\)')
HELP_SECONDS = 120


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


def pack(source: str) -> bytes:
    """The self-extracting script. Equal sources give equal bytes."""
    compressed = brotli.compress(minify(source).encode(), quality=11, lgwin=24)
    return STUB.format(payload=base64.b85encode(compressed).decode()).encode()


def unpack(packed: bytes) -> str:
    """The minified source inside a packed script."""
    payload = PAYLOAD.search(packed)
    if payload is None:
        raise ValueError("not a packed script: it holds no base85 payload")
    return brotli.decompress(base64.b85decode(payload[1])).decode()


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
    args = parser.parse_args(argv)
    readable = args.script.read_bytes()
    packed = pack(readable.decode())
    if args.check:
        name, library = args.script.name, args.script.parent
        if help_output(packed, name, library) != help_output(readable, name, library):
            print("error: the packed script prints another --help than the readable one", file=sys.stderr)
            return 1
    write_atomically(args.out, packed)
    print(f"readable:{len(readable)} minified:{len(unpack(packed).encode())} packed:{len(packed)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
