"""
Turn documents into the token shards that train_gpt.py reads, with the bytes of original text behind every val token.

    python prepare_caseops_data.py --docs docs_selected.jsonl --out data/caseops --tokenizer caseops.model --workers 16
    python prepare_caseops_data.py --docs train.jsonl.xz --val-file val.jsonl.xz --out data/books --train-tokenizer 8192

OUT then holds
    fineweb_train_000000.bin ..     tokens; a document is BOS and its pieces, and may continue in the next shard
    fineweb_val_000000.bin ..       the same for the validation documents
    fineweb_val_bytes_000000.bin .. parallel to the val shards: UTF-8 bytes of the original text that each token stands for
    tokenizer.model                 the tokenizer that was used
    manifest.json                   sources, sums and hashes. Written last: a folder without it is not finished

A shard is 256 little-endian int32 (magic, version, token count, zeros) and then one little-endian uint16 per token.
The output is a function of the documents and the options that name data; --workers changes nothing but the time.
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

import lossless_caps

BOS_ID = 1
FIRST_OPERATOR_ID = 4
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
UINT16_MAX = 65535
SPACE = "\u2581"  # SentencePiece writes a space so
CHUNK_BYTES = 1 << 20  # one task of a worker: this much JSON, and the line that crosses the limit
WORD_CACHE_CHARACTERS = 1 << 22  # about half a million words
SPLITS = ("train", "val")


class PrepareError(Exception):
    """Says what is wrong and where, what was expected and what to do. `main` prints it and returns 1."""


@contextlib.contextmanager
def file_errors(action: str, path: Path) -> Iterator[None]:
    """Name the file and a remedy in whatever goes wrong while reading or writing it."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        what = "that the file is there, readable and complete" if action == "read" else "permissions and free space"
        raise PrepareError(f"cannot {action} {path}: {reason}. Check {what}, then run the command again.") from e


# ==================================================================================================
# SOURCES - files of documents. One JSON value per line, compressed or not, hashed while they are read.
# ==================================================================================================


class HashingFile(io.RawIOBase):
    """A file opened for reading that knows the SHA-256 and the number of the bytes read so far."""

    def __init__(self, path: Path):
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self.sha256, self.position = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self.file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:n])
        self.position += n
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass
class Source:
    """One --docs or --val-file file. `documents` counts those that reached a split."""

    path: Path
    documents: int = 0
    raw: HashingFile | None = None
    buffered: io.BufferedReader | None = None  # kept, because it closes `raw` when it goes

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number, line) of every line that is not blank."""
        with file_errors("read", self.path):
            self.raw = HashingFile(self.path)
            self.buffered = io.BufferedReader(self.raw, 1 << 20)
            opener = {".gz": gzip.open, ".xz": lzma.open}.get(self.path.suffix, lambda file: file)
            for number, line in enumerate(opener(self.buffered), 1):
                if line.strip():
                    yield number, line

    def digest(self) -> str:
        """SHA-256 of the whole file, read to its end if the documents were not all needed."""
        with file_errors("read", self.path):
            self.raw = self.raw or HashingFile(self.path)
            while self.raw.read(1 << 20):
                pass
            self.raw.close()
            return self.raw.sha256.hexdigest()


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one source: the unit of work, cut the same way for any number of workers."""

    name: str
    numbers: list[int]
    lines: list[bytes]


def document_lines(sources: list[Source]) -> Iterator[tuple[Source, int, bytes]]:
    for source in sources:
        for number, line in source.lines():
            yield source, number, line


def cut_chunks(documents: Iterable[tuple[Source, int, bytes]]) -> Iterator[tuple[Source, Chunk]]:
    source, numbers, lines, size = None, [], [], 0
    for next_source, number, line in documents:
        if lines and (next_source is not source or size >= CHUNK_BYTES):
            yield source, Chunk(source.path.name, numbers, lines)
            numbers, lines, size = [], [], 0
        source, size = next_source, size + len(line)
        numbers.append(number)
        lines.append(line)
    if lines:
        yield source, Chunk(source.path.name, numbers, lines)


def parse_document(line: bytes, where: str) -> tuple[str, bytes]:
    """The text of one line, and its UTF-8 bytes."""
    expected = 'Expected one document per line: a JSON string, or an object with a string "text". Mend or remove the line.'
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise PrepareError(f"{where}: not valid JSON in UTF-8 ({e}). {expected}") from e
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        found = f'"text" is {type(text).__name__}' if isinstance(value, dict) and "text" in value else type(value).__name__
        found = 'an object without "text"' if found == "dict" else found
        raise PrepareError(f"{where}: found {found}. {expected}")
    try:
        return text, text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise PrepareError(f"{where}: half a surrogate pair has no UTF-8 ({e}). {expected}") from e


# ==================================================================================================
# TOKENIZER - check a SentencePiece model, train one, and encode documents to ids and byte counts.
# ==================================================================================================


def check_tokenizer(path: Path, transform: str) -> SentencePieceProcessor:
    """Load a model. Refuse one that would lose text, or that does not isolate the four case operators."""
    with file_errors("read", path):
        model = path.read_bytes()
    try:
        sp = SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
        raise PrepareError(f"{path} is not a SentencePiece model ({e}). Give --tokenizer a .model file.") from e
    if sp.get_piece_size() > UINT16_MAX + 1:
        raise PrepareError(f"{path} has {sp.get_piece_size()} pieces; a shard holds ids below 65536. Use fewer.")
    if sp.bos_id() != BOS_ID:
        raise PrepareError(f"{path} has BOS id {sp.bos_id()}, expected {BOS_ID}. Train one that fits with --train-tokenizer.")
    if sum(map(sp.is_byte, range(sp.get_piece_size()))) != 256:
        raise PrepareError(f"{path} has no byte fallback, so characters would be lost. Try --train-tokenizer.")
    ids = [sp.piece_to_id(c) for c in lossless_caps.OPERATORS]
    if transform == "caseops" and ids != list(range(FIRST_OPERATOR_ID, FIRST_OPERATOR_ID + 4)):
        raise PrepareError(f"{path} was not made for CaseOps: U+E001..U+E004 have ids {ids}, expected 4, 5, 6, 7. "
                           "Use a CaseOps model, --train-tokenizer, or --transform none.")  # fmt: skip
    return sp


def train_tokenizer(texts: Iterable[str], vocab_size: int, transform: str) -> bytes:
    """A BPE model with the settings of the published CaseOps tokenizer, trained on the lines of `texts`."""
    caseops = transform == "caseops"
    lines = (line for text in texts for line in (lossless_caps.encode(text) if caseops else text).split("\n") if line.strip())
    model = io.BytesIO()
    options = {"user_defined_symbols": list(lossless_caps.OPERATORS)} if caseops else {}
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False,
            character_coverage=0.999, split_digits=True, byte_fallback=True, normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False, remove_extra_whitespaces=True, pad_id=0, bos_id=BOS_ID, eos_id=2, unk_id=3,
            pad_piece="<pad>", max_sentence_length=1 << 24, num_threads=1, minloglevel=2, **options,
        )  # fmt: skip
    except RuntimeError as e:
        raise PrepareError(f"SentencePiece could not train a tokenizer of {vocab_size} pieces: {e}. "
                           "VOCAB must hold 256 bytes, the specials and the alphabet.") from e  # fmt: skip
    return model.getvalue()


class WordIds(dict):
    """Normalized word -> its ids as uint16 bytes, as SentencePiece segments it after a space."""

    def __init__(self, sp: SentencePieceProcessor, pieces: list[str]):
        super().__init__()
        self.sp, self.characters = sp, 0
        self.unstable: set[str] = set()  # words that normalizing a second time would change: they cannot be segmented alone
        self.opens_word = np.array([p.startswith(SPACE) for p in pieces])
        # If no piece continues across a space, BPE segments each word on its own and a document is the sum of its words.
        # Unigram models, whose scores are not whole numbers, sum scores over a sentence and may round differently.
        is_bpe = all(sp.get_score(i).is_integer() for i in range(len(pieces)))
        self.exact = is_bpe and SPACE in pieces and not any(SPACE in p[1:] for p in pieces)

    def learn(self, words: set[str]) -> None:
        """Segment all that is new in one call."""
        if self.characters > WORD_CACHE_CHARACTERS:
            self.clear()
            self.unstable.clear()
            self.characters = 0
        new = [word for word in words if word not in self and word not in self.unstable]
        self.characters += sum(map(len, new))
        if not self._is_stable(new):
            self.unstable.update(word for word in new if not self._is_stable([word]))
            new = [word for word in new if word not in self.unstable]
            if not self._is_stable(new):
                return
        ids = np.array(self.sp.encode(self._sentence(new, " ")), np.uint16)
        at = np.flatnonzero(self.opens_word[ids])[-len(new) :].tolist() if new else []
        raw = ids.tobytes()
        for word, start, end in zip(new, at, [*at[1:], len(ids)], strict=False):
            self[word] = raw[2 * start : 2 * end]

    def _sentence(self, words: list[str], space: str) -> str:
        return space.join(["a", *words])  # spaces before the first word of all would be stripped

    def _is_stable(self, words: list[str]) -> bool:
        return self.sp.normalize(self._sentence(words, " ")).lstrip(SPACE) == self._sentence(words, SPACE)


class DocumentEncoder:
    """Texts -> token ids, and for encoded texts the original bytes behind each id."""

    def __init__(self, model: str, transform: str):
        self.sp = check_tokenizer(Path(model), transform)
        pieces = [self.sp.id_to_piece(i) for i in range(self.sp.get_piece_size())]
        # UTF-8 bytes of normalized text that each id covers
        self.piece_bytes = np.array([1 if self.sp.is_byte(i) else len(p.encode("utf-8")) for i, p in enumerate(pieces)])
        self.words = WordIds(self.sp, pieces)

    def tokens(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, uint16: what `SentencePieceProcessor.encode` gives, three times faster on English."""
        return self._tokens(texts, [self.sp.normalize(text) for text in texts])

    def _tokens(self, texts: list[str], normalized: list[str]) -> list[np.ndarray]:
        if not self.words.exact:
            return [np.array(self.sp.encode(text), np.uint16) for text in texts]
        words = [n.split(SPACE) for n in normalized]
        self.words.learn(set().union(*(rest for _, *rest in words)))
        return [self._join_words(*pair) for pair in zip(texts, words, strict=True)]

    def _join_words(self, text: str, words: list[str]) -> np.ndarray:
        first, *rest = words
        with contextlib.suppress(KeyError):
            if self.sp.normalize(first) == first:
                head = np.array(self.sp.encode(first), np.uint16).tobytes()
                return np.frombuffer(head + b"".join(map(self.words.__getitem__, rest)), np.uint16)
        return np.array(self.sp.encode(text), np.uint16)

    def tokens_and_bytes(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """For each encoded text its ids, the bytes of the original each one stands for, and those at the edges that none does.

        A piece is charged for the stretch of text whose normalization it ends, so that collapsed whitespace goes to the
        space that remains. Byte pieces inside a character end nothing: the last one is charged for the character.
        """
        # origins: for each character of the normalized text, and for its end, an index into the text
        normalized, origins = zip(*(self.sp.normalize(text, with_offsets=True) for text in texts), strict=True)
        offsets = lossless_caps.original_offsets("\0".join(texts))
        start = 0  # of the text among the joined ones
        for text, norm, origin, ids in zip(texts, normalized, origins, self._tokens(texts, normalized), strict=True):
            before = offsets[start : start + len(text) + 1] - offsets[start]  # bytes of the original before each character
            start += len(text) + 1
            if len(ids) == 0:
                yield ids, np.zeros(0, np.int64), int(before[-1])
                continue
            u8 = np.frombuffer(norm.encode("utf-8"), np.uint8)
            ends = np.cumsum(self.piece_bytes[ids])
            if ends[-1] != len(u8):
                raise PrepareError(f"the pieces of {text[:40]!r}.. do not add up to its normalization: a bug, report it")
            starts = np.append(np.flatnonzero((u8 & 0xC0) != 0x80), len(u8))
            character = np.searchsorted(starts, ends, side="right") - 1  # the first that the piece does not cover to its end
            before_norm = before[np.array(origin)]
            edges = before_norm[0] + before[-1] - before_norm[-1]
            yield ids, np.diff(before_norm[character], prepend=before_norm[0]), int(edges)


# ==================================================================================================
# WORKERS - chunks of lines in, arrays out, in order.
# ==================================================================================================


@dataclass
class Encoded:
    """A chunk of n documents with T tokens in all, BOS included."""

    tokens: np.ndarray  # (T,) uint16
    counts: np.ndarray | None  # (T,) uint16, original bytes per token; None without the sidecar
    doc_tokens: np.ndarray  # (n,)
    doc_bytes: np.ndarray  # (n,) UTF-8 length of the original text
    doc_hash: np.ndarray  # (n,) uint64 of the original text
    uncharged: int = 0  # bytes of all n documents that no token stands for

    def first(self, n: int) -> "Encoded":
        t = self.doc_tokens[:n].sum()
        counts = None if self.counts is None else self.counts[:t]
        return Encoded(self.tokens[:t], counts, self.doc_tokens[:n], self.doc_bytes[:n], self.doc_hash[:n])


@lru_cache(maxsize=1)
def document_encoder(model: str, transform: str) -> DocumentEncoder:
    return DocumentEncoder(model, transform)


def encode_chunk(chunk: Chunk, model: str, transform: str, sidecar: bool) -> Encoded:
    encoder = document_encoder(model, transform)
    where = [f"{chunk.name}, line {number}" for number in chunk.numbers]
    parsed = [parse_document(line, at) for line, at in zip(chunk.lines, where, strict=True)]
    texts = [text for text, _ in parsed]
    if transform == "caseops":
        texts = encode_all(texts)
    bos, ids, counts, uncharged = np.array([BOS_ID], np.uint16), [], [], 0
    if sidecar:
        for (doc_ids, doc_counts, edges), (_, raw), at in zip(encoder.tokens_and_bytes(texts), parsed, where, strict=True):
            check_counts(doc_counts, edges, len(raw), at)
            ids += [bos, doc_ids]
            counts += [np.zeros(1, np.uint16), doc_counts.astype(np.uint16)]
            uncharged += edges
    else:
        for doc_ids in encoder.tokens(texts):
            ids += [bos, doc_ids]
    return Encoded(
        tokens=np.concatenate(ids),
        counts=np.concatenate(counts) if sidecar else None,
        doc_tokens=np.array([1 + len(i) for i in ids[1::2]]),
        doc_bytes=np.array([len(raw) for _, raw in parsed]),
        doc_hash=np.frombuffer(b"".join(hashlib.blake2b(raw, digest_size=8).digest() for _, raw in parsed), "<u8"),
        uncharged=uncharged,
    )


def encode_all(texts: list[str]) -> list[str]:
    """`lossless_caps.encode` of each: all at once, because a NUL between documents ends a word and nothing else."""
    encoded = lossless_caps.encode("\0".join(texts)).split("\0")
    return encoded if len(encoded) == len(texts) else [lossless_caps.encode(text) for text in texts]


def check_counts(counts: np.ndarray, uncharged: int, expected: int, where: str) -> None:
    if counts.sum() + uncharged != expected:
        raise PrepareError(f"{where}: charged {counts.sum()} and {uncharged} of {expected} bytes: a bug, report it")
    if len(counts) and counts.max() > UINT16_MAX:
        raise PrepareError(
            f"{where}: one token stands for {counts.max()} bytes of text, but the sidecar holds at most {UINT16_MAX}. "
            "The document has a huge run of whitespace: shorten it or remove the line."
        )


def start_worker() -> None:
    """Leave Ctrl-C to the main process, and end when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


@contextlib.contextmanager
def ordered_map(workers: int) -> Iterator[Callable]:
    """A `map(function, (key, argument) pairs)` yielding (key, result) in order; a few chunks per worker are under way."""
    if workers == 1:
        yield lambda function, pairs: ((key, function(argument)) for key, argument in pairs)
        return

    def pooled(function, pairs):
        pending, pairs = deque(), iter(pairs)
        while True:
            for key, argument in islice(pairs, 3 * workers - len(pending)):
                pending.append((key, pool.submit(function, argument)))
            if not pending:
                return
            key, future = pending.popleft()
            yield key, future.result()

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        try:
            yield pooled
        except BrokenProcessPool as e:
            raise PrepareError("a worker died, perhaps for want of memory. Run the command again with fewer --workers.") from e
        finally:
            pool.shutdown(cancel_futures=True)


# ==================================================================================================
# SHARDS - arrays -> files of at most --shard-tokens values.
# ==================================================================================================


class ShardWriter:
    """Appends uint16 values to fineweb_<name>_%06d.bin files in `folder`."""

    def __init__(self, folder: Path, name: str, shard_tokens: int):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.shards: list[dict] = []
        self.file, self.n = None, 0

    def append(self, values: np.ndarray) -> None:
        while len(values):
            with file_errors("write", self._path()):
                if self.file is None:
                    self.file, self.n = open(self._path(), "wb"), 0  # noqa: SIM115 - closed when the shard is full
                    self.file.write(bytes(SHARD_HEADER_BYTES))  # until the count is known
                part, values = np.split(values, [self.shard_tokens - self.n])
                self.file.write(part.astype("<u2").tobytes())
                self.n += len(part)
            if self.n == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Finish the current shard, if there is one: header, disk, hash."""
        if self.file is None:
            return
        path, header = self._path(), np.zeros(SHARD_HEADER_BYTES // 4, "<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, self.n
        with file_errors("write", path):
            with self.file:
                self.file.seek(0)
                self.file.write(header.tobytes())
                self.file.flush()
                os.fsync(self.file.fileno())
            with open(path, "rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        self.shards.append({"file": path.name, "tokens": self.n, "sha256": sha256})
        self.file = None

    def _path(self) -> Path:
        return self.folder / f"fineweb_{self.name}_{len(self.shards):06d}.bin"


@dataclass
class Split:
    """One split: its writers, and the sums that the manifest states."""

    tokens: ShardWriter
    sidecar: ShardWriter | None
    documents: int = 0
    token_count: int = 0
    bytes: int = 0
    bytes_charged: int = 0
    bytes_uncharged: int = 0
    hashes: list[np.ndarray] = field(default_factory=list)

    def append(self, part: Encoded) -> None:
        self.tokens.append(part.tokens)
        if self.sidecar:
            self.sidecar.append(part.counts)
            self.bytes_charged += int(part.counts.sum(dtype=np.int64))
            self.bytes_uncharged += part.uncharged
        self.documents += len(part.doc_tokens)
        self.token_count += len(part.tokens)
        self.bytes += int(part.doc_bytes.sum())
        self.hashes.append(part.doc_hash)

    def close(self, first_document: int) -> dict:
        """Finish the shards. What the manifest says about them."""
        self.tokens.close()
        entry = {
            "documents": [first_document, first_document + self.documents],
            "tokens": self.token_count,
            "bytes": self.bytes,
            "shards": self.tokens.shards,
        }
        if self.sidecar:
            self.sidecar.close()
            charged, uncharged = self.bytes_charged, self.bytes_uncharged
            if charged + uncharged != self.bytes:
                raise PrepareError(f"the sidecar adds up to {charged} + {uncharged} bytes, but the documents have {self.bytes}")
            entry |= {"bytes_charged": charged, "bytes_uncharged": uncharged, "sidecar": self.sidecar.shards}
        return entry


# ==================================================================================================
# FOLDER - everything is written in OUT/.partial and moved when it is complete, the manifest last.
# ==================================================================================================


def listed_shards(manifest: dict) -> list[str]:
    return [shard["file"] for split in manifest["splits"].values() for shard in split["shards"] + split.get("sidecar", [])]


@contextlib.contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """OUT/.partial, empty and locked. Clears what a run that died has left; refuses finished data and a run that is alive."""
    work = out / ".partial"
    with contextlib.ExitStack() as stack:
        with file_errors("write", out):
            if (out / "manifest.json").exists():
                raise PrepareError(f"{out} already holds manifest.json. Choose another --out, or delete that folder.")
            work.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(work / "lock", "w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, whichever way that is
        except BlockingIOError as e:
            raise PrepareError(f"another run is writing to {out}. Wait for it, or choose another --out.") from e
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        with file_errors("write", work):
            if (work / "manifest.json").exists():  # that run died while it was moving these
                for name in listed_shards(json.loads((work / "manifest.json").read_bytes())):
                    (out / name).unlink(missing_ok=True)
            for path in work.iterdir():
                if path.name != "lock":
                    path.unlink()
        if shards := sorted(path.name for split in SPLITS for path in out.glob(f"fineweb_{split}_*.bin")):
            raise PrepareError(f"{out} already holds {shards[0]} ({len(shards)} shards). Choose another --out, or delete them.")
        yield work


def publish(work: Path, out: Path, manifest: dict) -> None:
    """Move the shards, the tokenizer and the manifest from `work` to `out`, in this order."""
    with file_errors("write", out):
        draft = work / "manifest.draft"
        with open(draft, "w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.rename(work / "manifest.json")  # from here a later run knows which files in OUT are this run's
        for name in [*listed_shards(manifest), manifest["tokenizer"], "manifest.json"]:
            (work / name).rename(out / name)


# ==================================================================================================
# MAIN
# ==================================================================================================


def split_documents(args: argparse.Namespace) -> tuple[list[Source], Iterator, Iterator]:
    """All sources in document order, the validation documents and the training documents. Exhaust validation first."""
    docs = [Source(path) for path in args.docs]
    if args.val_file:
        val_source = Source(args.val_file)
        return [val_source, *docs], document_lines([val_source]), document_lines(docs)
    documents = document_lines(docs)
    return docs, islice(documents, args.val_docs), documents


def tokenizer_sample(args: argparse.Namespace) -> Iterator[str]:
    """The first training documents, up to --tokenizer-sample-bytes of text."""
    _, val, train = split_documents(args)
    deque(val, maxlen=0)
    budget = args.tokenizer_sample_bytes
    for source, number, line in train:
        text, raw = parse_document(line, f"{source.path.name}, line {number}")
        budget -= len(raw)
        if budget < 0:
            return
        yield text


def place_tokenizer(args: argparse.Namespace, work: Path) -> tuple[Path, SentencePieceProcessor]:
    """Train or copy the tokenizer to `work`, where the workers read it."""
    path, kept = work / "tokenizer.model", args.out / "tokenizer.model"
    if args.train_tokenizer:
        model = train_tokenizer(tokenizer_sample(args), args.train_tokenizer, args.transform)
    else:
        with file_errors("read", args.tokenizer):
            model = args.tokenizer.read_bytes()
        check_tokenizer(args.tokenizer, args.transform)
    with file_errors("write", path):
        if kept.exists() and kept.read_bytes() != model:
            raise PrepareError(f"{kept} is a different tokenizer. Choose another --out, or delete that file.")
        path.write_bytes(model)
    return path, check_tokenizer(path, args.transform)


def write_split(split: Split, encoded: Iterator[tuple[Source, Encoded]], max_tokens: int | None, progress: Callable) -> None:
    """Append documents to `split`: all of them, or the longest prefix of whole documents within `max_tokens`."""
    for source, part in encoded:
        n = len(part.doc_tokens)
        if max_tokens is not None:
            n = int(np.searchsorted(np.cumsum(part.doc_tokens), max_tokens - split.token_count, side="right"))
        split.append(part.first(n) if n < len(part.doc_tokens) else part)
        source.documents += n
        progress()
        if n < len(part.doc_tokens):
            return


def check_splits(args: argparse.Namespace, val: Split, train: Split) -> None:
    if args.val_file and val.documents == 0:
        raise PrepareError(f"{args.val_file} holds no documents. Expected at least one line.")
    if not args.val_file and val.documents < args.val_docs:
        raise PrepareError(
            f"--docs hold {val.documents} documents; the first {args.val_docs} are for validation, the rest for training. "
            "Lower --val-docs, add documents, or name a --val-file."
        )
    if train.documents == 0:
        remedy = "Raise --max-train-tokens" if args.max_train_tokens else "Lower --val-docs"
        raise PrepareError(f"all {val.documents} documents are for validation, none to train on. {remedy}, or add documents.")


def make_manifest(args, sources: list[Source], sp: SentencePieceProcessor, val_split: Split, train_split: Split) -> dict:
    """What the folder was made from and what is in it: nothing that depends on the machine, the paths or the time."""
    val, train = val_split.close(0), train_split.close(val_split.documents)
    copies = np.isin(np.concatenate(train_split.hashes), np.concatenate(val_split.hashes))
    train["documents_also_in_val"] = int(copies.sum())
    entries = [{"name": s.path.name, "sha256": s.digest(), "documents": s.documents} for s in sources]
    if args.val_file and entries[0]["sha256"] in [entry["sha256"] for entry in entries[1:]]:
        raise PrepareError(f"{args.val_file} is also one of --docs: validation would be on training text. Remove one.")
    return {
        "format": 1,
        "transform": args.transform,
        "tokenizer": "tokenizer.model",
        "tokenizer_sha256": hashlib.sha256(sp.serialized_model_proto()).hexdigest(),
        "vocab_size": sp.get_piece_size(),
        "sources": entries,
        "splits": {"train": train, "val": val},
        "created_by": {"sentencepiece": sentencepiece.__version__, "numpy": np.__version__},
    }


def run(args: argparse.Namespace) -> None:
    sources, val_documents, train_documents = split_documents(args)
    for source in sources:
        with file_errors("read", source.path):
            open(source.path, "rb").close()
    document_encoder.cache_clear()  # this process may have prepared data before, with another model under the same name
    with working_folder(args.out) as work:
        model, sp = place_tokenizer(args, work)
        sidecar = args.transform == "caseops"
        writer = partial(ShardWriter, work, shard_tokens=args.shard_tokens)
        val = Split(writer("val"), writer("val_bytes") if sidecar else None)
        train = Split(writer("train"), None)

        look = {"desc": "prepare", "unit": "B", "unit_scale": True, "mininterval": 0.5 if sys.stderr.isatty() else 30}
        size = sum(source.path.stat().st_size for source in sources)
        with ordered_map(args.workers) as mapped, tqdm(total=size, **look) as bar:
            progress = lambda: bar.update(sum(s.raw.position for s in sources if s.raw) - bar.n)  # noqa: E731
            encode = partial(encode_chunk, model=str(model), transform=args.transform)
            encoded_val = mapped(partial(encode, sidecar=sidecar), cut_chunks(val_documents))
            write_split(val, encoded_val, None, progress)
            encoded_train = mapped(partial(encode, sidecar=False), cut_chunks(train_documents))
            write_split(train, encoded_train, args.max_train_tokens, progress)
        check_splits(args, val, train)
        manifest = make_manifest(args, sources, sp, val, train)
        publish(work, args.out, manifest)
    for name, split in manifest["splits"].items():
        first, end = split["documents"]
        print(f"{name} documents:{end - first} tokens:{split['tokens']} bytes:{split['bytes']} shards:{len(split['shards'])}")
    if copies := manifest["splits"]["train"]["documents_also_in_val"]:
        print(f"warning: {copies} training documents are also validation documents, word for word", file=sys.stderr)


def positive(text: str) -> int:
    if (value := int(text.replace("_", ""))) < 1:
        raise ValueError
    return value


positive.__name__ = "positive whole number"  # argparse names the type in its message


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    add = parser.add_argument
    add("--docs", type=Path, nargs="+", required=True, metavar="FILE",
        help='.jsonl, .jsonl.gz or .jsonl.xz, read in this order; a line is a JSON string or an object with a string "text"')
    add("--out", type=Path, required=True, metavar="DIR", help="folder to create; one that holds prepared data is refused")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, metavar="MODEL",
                           help="SentencePiece model; for caseops, one with U+E001..U+E004 as ids 4..7")
    tokenizer.add_argument("--train-tokenizer", type=positive, metavar="VOCAB",
                           help="train a BPE model of at most VOCAB pieces on the first training documents instead")
    add("--tokenizer-sample-bytes", type=positive, default=20_000_000, metavar="N",
        help="text to train that tokenizer on (default: %(default)s)")
    val = parser.add_mutually_exclusive_group()
    val.add_argument("--val-docs", type=positive, default=50_000, metavar="N",
                     help="the first N documents are the validation split (default: %(default)s, as in the contest)")
    val.add_argument("--val-file", type=Path, metavar="FILE", help="the validation split is exactly this file's documents")
    add("--max-train-tokens", type=positive, metavar="N",
        help="stop before the training document that would exceed N tokens (default: no limit)")
    add("--shard-tokens", type=positive, default=100_000_000, metavar="N", help="tokens per shard (default: %(default)s)")
    add("--transform", choices=("caseops", "none"), default="caseops",
        help="caseops moves letter case into operators and writes the byte sidecar; none tokenizes the text as it is, with "
             "no sidecar (default: %(default)s)")
    add("--workers", type=positive, default=1, metavar="N",
        help="processes; any number gives the same files (default: %(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if (args.train_tokenizer or 0) > UINT16_MAX + 1:
        parser.error(f"--train-tokenizer: expected at most {UINT16_MAX + 1} pieces, a shard holds 16-bit ids")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (PrepareError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
