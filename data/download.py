"""
Fetch published token shards into the folders where the trainer looks for them, and check every one.

    python data/download.py caseops|sp1024|sp8192 [--train-shards N] [--out DIR] [--source DIR_OR_REPO]
    python data/download.py caseops --verify-only

Interrupting is harmless: the same command goes on with what is missing. Exit code 0: complete and checked, 1: not, 2: usage.
"""
from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

MAGIC, VERSION, HEADER_BYTES, BOS_ID = 20240520, 1, 1024, 1
CASEOPS = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"


class Export(NamedTuple):
    """A published set of shards. Paths of the repo are kept below DATA_DIR/place; None means not known, not checked."""
    repo: str                                    # Hugging Face dataset
    folder: str                                  # of the shards, in the repo
    tokenizer: str                               # file in the repo
    place: str                                   # what the repo's root becomes, below DATA_DIR
    home: str                                    # where the trainer looks for the shards, below DATA_DIR
    train_shards: int | None = None
    min_shard_tokens: int = 0                    # of every train shard but the last of the export
    val_tokens: int | None = None
    val_docs: int | None = None
    val_bytes: int | None = None                 # original bytes of all targets; None: the export has no sidecar


EXPORTS = {  # if a repo is laid out differently, correct `folder` and `tokenizer` here: nothing else depends on them
    "caseops": Export("romeerp/parameter-golf-caseops-v1", f"datasets/datasets/{CASEOPS}",
                      "datasets/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
                      "datasets/fineweb10B_sp8192_caseops", f"datasets/fineweb10B_sp8192_caseops/datasets/datasets/{CASEOPS}",
                      train_shards=80, min_shard_tokens=90_000_000,
                      val_tokens=47_853_344, val_docs=50_000, val_bytes=151_080_645),
    "sp1024": Export("kevclark/parameter-golf", "datasets/fineweb10B_sp1024", "tokenizers/fineweb_1024_bpe.model",
                     ".", "datasets/fineweb10B_sp1024"),
    "sp8192": Export("kevclark/parameter-golf", "datasets/fineweb10B_sp8192", "tokenizers/fineweb_8192_bpe.model",
                     ".", "datasets/fineweb10B_sp8192"),
}


class DataError(Exception):
    """An expected failure. The message says what is wrong and what to do."""


# ==================================================================================================
# FETCHING - one callable per kind of source: fetch(patterns, dest) leaves matching files below dest, resuming.
# ==================================================================================================

Fetch = Callable[[list[str], Path], None]


def patterns(export: Export, train_shards: int | None) -> list[str]:
    """What to fetch: tokenizer, validation shards with their sidecars, the first train shards (None: all of them)."""
    train = ["fineweb_train_*.bin"] if train_shards is None else [f"fineweb_train_{i:06d}.bin" for i in range(train_shards)]
    return [export.tokenizer, *(f"{export.folder}/{name}" for name in ("fineweb_val_*.bin", "manifest*.json", *train))]


def from_hub(repo: str, endpoint: str | None = None) -> Fetch:
    """
    Fetch from a Hugging Face dataset. The hub client draws the progress bars, continues a broken transfer while it runs,
    and keeps whole files between runs: a killed run loses at most the few shards it was transferring.
    """
    def fetch(wanted: list[str], dest: Path) -> None:
        from huggingface_hub import snapshot_download  # takes a second to import, and only this path needs it
        try:
            snapshot_download(repo, repo_type="dataset", local_dir=dest, allow_patterns=wanted, endpoint=endpoint)
        except Exception as error:  # the client also lets its HTTP library's errors through
            raise DataError(
                f"could not fetch {repo}: {type(error).__name__}: {str(error).strip()}\n"
                "What is already here is kept; run the same command again when the network is back. Without a network: copy\n"
                "the repository's files from another machine and use --source FOLDER, or build data/demo_corpus.py's corpus."
            ) from error
    return fetch


def from_folder(folder: Path) -> Fetch:
    """Fetch from a local copy of the repo. An unfinished file keeps the suffix .incomplete and is continued."""
    def fetch(wanted: list[str], dest: Path) -> None:
        from huggingface_hub.utils import filter_repo_objects  # the same pattern rules as the hub's
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = [name for name in filter_repo_objects(names, allow_patterns=wanted) if not name.startswith(".cache/")]
        total = sum((folder / name).stat().st_size for name in names)
        with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name, disable=None) as bar:
            for name in names:
                copy_file(folder / name, dest / name, bar)
    return fetch


def copy_file(source: Path, target: Path, bar: tqdm) -> None:
    """Copy, continuing an earlier attempt; `target` has the source's size as soon as it exists under its own name."""
    size = source.stat().st_size
    if target.exists() and target.stat().st_size == size:
        bar.update(size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".incomplete")
    if partial.exists() and partial.stat().st_size > size:
        partial.unlink()
    with open(source, "rb") as r, open(partial, "ab") as w:
        r.seek(w.tell())
        bar.update(w.tell())
        while chunk := r.read(1 << 20):
            w.write(chunk)
            bar.update(len(chunk))
    if partial.stat().st_size != size:
        raise DataError(f"{source} changed while it was copied: copied {partial.stat().st_size:,} bytes, expected {size:,}; "
                        f"delete {partial} and run again")
    os.replace(partial, target)


def fetcher(source: str) -> Fetch:
    """A folder that exists, else a repo id."""
    if Path(source).is_dir():
        return from_folder(Path(source))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return from_hub(source)
    raise DataError(f"--source {source}: neither an existing folder nor a repository name like owner/name")


def settle(export: Export, data_dir: Path) -> None:
    """Where the repo's layout is not the trainer's, a relative link leads from the one to the other."""
    shards, home = data_dir / export.place / export.folder, data_dir / export.home
    if shards.is_dir() and not os.path.lexists(home):
        home.parent.mkdir(parents=True, exist_ok=True)
        home.symlink_to(os.path.relpath(shards, home.parent), target_is_directory=True)


# ==================================================================================================
# CHECKS - each failure names the file, what was found, what was expected and what to do.
# ==================================================================================================

def broken(path: Path, found: str, expected: str) -> DataError:
    return DataError(f"{path}\n  found    {found}\n  expected {expected}\n  delete this file and run the same command again")


def shard_tokens(path: Path) -> int:
    """Token count of a shard whose header and size agree with the format."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise broken(path, f"{size:,} bytes", f"a header of {HEADER_BYTES:,} bytes")
    magic, version, tokens = (int(x) for x in np.fromfile(path, dtype="<i4", count=3))
    if (magic, version) != (MAGIC, VERSION):
        raise broken(path, f"magic {magic} version {version}", f"magic {MAGIC} version {VERSION}")
    if size != HEADER_BYTES + 2 * tokens:
        raise broken(path, f"{size:,} bytes", f"{HEADER_BYTES + 2 * tokens:,} bytes for the {tokens:,} tokens of its header")
    return tokens


def shard_body(path: Path) -> np.ndarray:
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES) if shard_tokens(path) else np.empty(0, np.uint16)


def train_paths(folder: Path, wanted: int | None) -> list[Path]:
    """Train shards 0, 1, 2, ... without a gap; at least `wanted` of them where that is given."""
    paths = sorted(folder.glob("fineweb_train_[0-9][0-9][0-9][0-9][0-9][0-9].bin"))
    count = max(int(paths[-1].stem[-6:]) + 1 if paths else 0, wanted or 0)
    for path in (folder / f"fineweb_train_{i:06d}.bin" for i in range(count)):
        if path not in paths:
            raise DataError(f"{path}\n  missing; {len(paths)} of {count} train shards are here\n"
                            "  run the same command again to fetch the rest")
    return paths


def check_sidecars(export: Export, val: list[Path]) -> None:
    """One byte count per validation token; all targets together weigh val_bytes. The first token is never a target."""
    total = 0
    for path in val:
        sidecar = path.with_name(path.name.replace("fineweb_val_", "fineweb_val_bytes_"))
        if not sidecar.exists():
            raise DataError(f"{sidecar}\n  missing: without it {path.name} cannot be scored in bits per byte\n"
                            "  run the same command again")
        counts, tokens = shard_body(sidecar), shard_tokens(path)
        if len(counts) != tokens:
            raise broken(sidecar, f"{len(counts):,} byte counts", f"{tokens:,}, one for each token of {path.name}")
        total += int(counts[path == val[0]:].sum(dtype=np.int64))
    if total != export.val_bytes:
        raise DataError(f"{val[0].parent}/fineweb_val_bytes_*.bin\n  found    {total:,} bytes over all targets\n"
                        f"  expected {export.val_bytes:,}\n  delete the validation shards and their sidecars and run again")


def check_validation(export: Export, folder: Path) -> np.ndarray:
    """The validation tokens, after checking their number, their documents and their sidecars."""
    val = sorted(p for p in folder.glob("fineweb_val_*.bin") if "_bytes_" not in p.name)
    if not val:
        raise DataError(f"{folder}\n  holds no fineweb_val_*.bin; run without --verify-only to fetch them\n"
                        f"  if that fetched nothing, {export.repo} is laid out differently: "
                        f"look at its file list and correct EXPORTS in {Path(__file__).name}")
    tokens = np.concatenate([shard_body(path) for path in val])
    docs = int((tokens == BOS_ID).sum())
    advice = "  delete the validation shards and run the same command again"
    if export.val_tokens not in (None, len(tokens)):
        raise DataError(f"{folder}/fineweb_val_*.bin\n  found    {len(tokens):,} validation tokens\n"
                        f"  expected {export.val_tokens:,}\n{advice}")
    if docs == 0 or export.val_docs not in (None, docs):
        raise DataError(f"{folder}/fineweb_val_*.bin\n  found    {docs:,} documents (BOS tokens)\n"
                        f"  expected {'at least 1' if export.val_docs is None else f'{export.val_docs:,}'}\n{advice}")
    if export.val_bytes is not None:
        check_sidecars(export, val)
    return tokens


def check_overlap(train: Path, val: np.ndarray) -> None:
    """
    The first whole train document must not be a validation document. Splits cut at different places overlap from the
    first train document on, so this one comparison finds a train set made with too few validation documents.
    """
    head = shard_body(train)[:1_000_000]
    starts = np.flatnonzero(head == BOS_ID)
    if len(starts) < 2:
        return
    document = head[starts[0]:starts[1]]
    ends = np.append(np.flatnonzero(val == BOS_ID), len(val))
    for start in ends[:-1][np.diff(ends) == len(document)]:
        if np.array_equal(val[start:start + len(document)], document):
            raise DataError(f"{train}\n  found    its first document in the validation set as well, at token {start:,}\n"
                            "  expected train and validation documents to be disjoint\n"
                            "  these shards were cut with another number of validation documents: delete them and run again")


def check_train(export: Export, paths: list[Path], val: np.ndarray) -> int:
    """Tokens of all train shards, after checking each and the split."""
    total = 0
    for i, path in enumerate(tqdm(paths, desc="train shards", unit="shard", disable=None)):
        tokens = shard_tokens(path)
        if tokens < export.min_shard_tokens and i + 1 != export.train_shards:
            raise broken(path, f"{tokens:,} tokens", f"at least {export.min_shard_tokens:,}: "
                         "shards this small come from another split, which may share documents with validation")
        total += tokens
    if paths:
        check_overlap(paths[0], val)
    return total


def verify(export: Export, data_dir: Path, train_shards: int | None) -> str:
    """Check everything that is there and that at least `train_shards` train shards are; return a summary."""
    folder = data_dir / export.home
    val = check_validation(export, folder)
    paths = train_paths(folder, train_shards)
    total = check_train(export, paths, val)
    tokenizer = data_dir / export.place / export.tokenizer
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}\n  missing; run the same command again, or correct `tokenizer` in EXPORTS of "
                        f"{Path(__file__).name} if {export.repo} is laid out differently")
    return f"{folder}: {len(val):,} validation tokens, {len(paths)} train shards with {total:,} tokens, all checked"


# ==================================================================================================
# MAIN
# ==================================================================================================

def main(argv: list[str] | None = None, exports: dict[str, Export] = EXPORTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("export", choices=exports, help="which shards")
    parser.add_argument("--train-shards", type=int, metavar="N", help="only the first N train shards (default: all)")
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="DIR", help="the trainer's DATA_DIR (default ./data)")
    parser.add_argument("--source", metavar="DIR_OR_REPO", help="local copy of the repo, or another Hugging Face dataset")
    parser.add_argument("--verify-only", action="store_true", help="fetch nothing, check what is there")
    args = parser.parse_args(argv)
    if args.train_shards is not None and args.train_shards < 0:
        parser.error("--train-shards must not be negative")
    export = exports[args.export]
    wanted = args.train_shards
    try:
        if not args.verify_only:
            fetcher(args.source or export.repo)(patterns(export, wanted), args.out / export.place)
            settle(export, args.out)
            wanted = export.train_shards if wanted is None else wanted
        print(verify(export, args.out, wanted))
    except KeyboardInterrupt:
        print("\ndownload: interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 1
    except (DataError, OSError) as error:
        print(f"download: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
