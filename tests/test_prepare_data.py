"""prepare_caseops_data.py: the files it writes, the bytes it counts, and what it does when it cannot finish."""

import errno
import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sentencepiece import SentencePieceProcessor

import lossless_caps
import prepare_caseops_data as prepare

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "prepare_caseops_data.py"
SHARED = ROOT.parent / "shared"
PUBLISHED_MODEL = SHARED / "tokenizers" / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
EDGES = [" \n padded\t ", "\ue001 ½ \ufb01ne", "", "Ünïcode 日本語 \U0001f600", "a\0b NASA"]


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["The", "the", "of", "and", "NASA", "iPhone", "cat,", "dog.", "McDonald", "1990s", "it's", "\u201cyes\u201d", "résumé"]
    words += ["", "so\n\nThen", "HTML"]
    return [" ".join(rng.choices(words, k=rng.randrange(5, 60))) for _ in range(n)]


DOCS = EDGES + sentences(60)


def write_docs(path: Path, docs: list[str]) -> Path:
    """JSON lines of both accepted kinds, compressed as the suffix says."""
    lines = [json.dumps(doc if i % 2 else {"text": doc, "id": i}) for i, doc in enumerate(docs)]
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")
    return path


def read_shards(folder: Path, name: str) -> np.ndarray:
    parts = []
    for path in sorted(folder.glob(f"fineweb_{name}_[0-9]*.bin")):
        raw = path.read_bytes()
        header = np.frombuffer(raw[:1024], "<i4")
        assert header[:3].tolist() == [20240520, 1, (len(raw) - 1024) // 2]
        assert not header[3:].any()
        parts.append(np.frombuffer(raw[1024:], "<u2"))
    return np.concatenate(parts)


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A CaseOps tokenizer of a few hundred pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "caseops.model"
    path.write_bytes(prepare.train_tokenizer(DOCS, 400, "caseops"))
    return path


@pytest.fixture
def run(tmp_path, model, capsys):
    """Prepare DOCS, or what `options` say instead, into tmp_path/name. Returns (exit status, stderr, folder)."""

    def run(name="out", docs=DOCS, val_docs=8, tokenizer=("--tokenizer", model), options=()):
        if not isinstance(docs, Path):
            docs = write_docs(tmp_path / "docs.jsonl", docs)
        split = ("--val-docs", val_docs) if val_docs else ()
        status = prepare.main([str(a) for a in ("--docs", docs, "--out", tmp_path / name, *tokenizer, *split, *options)])
        return status, capsys.readouterr().err, tmp_path / name

    return run


# ==================================================================================================
# WHAT IS WRITTEN
# ==================================================================================================


def test_tokens_are_bos_and_the_pieces_of_each_document(run, model):
    status, _, out = run(options=("--shard-tokens", 100))
    assert status == 0
    sp = SentencePieceProcessor(model_file=str(model))
    expected = [[1, *sp.encode(lossless_caps.encode(doc))] for doc in DOCS]
    assert read_shards(out, "val").tolist() == list(itertools.chain(*expected[:8]))
    assert read_shards(out, "train").tolist() == list(itertools.chain(*expected[8:]))
    assert not (out / ".partial").exists()
    manifest = read_manifest(out)
    for split in manifest["splits"].values():
        assert [s["tokens"] for s in split["shards"][:-1]] == [100] * (len(split["shards"]) - 1)
        assert 0 < split["shards"][-1]["tokens"] <= 100


def test_sidecar_sums_to_the_original_bytes(run):
    _, _, out = run()
    tokens, counts = read_shards(out, "val"), read_shards(out, "val_bytes")
    starts = np.flatnonzero(tokens == 1)
    assert len(starts) == 8 and len(counts) == len(tokens)
    assert not counts[starts].any()
    assert sorted(counts[(tokens >= 4) & (tokens <= 7)])[-2:] == [0, 3]  # one document holds one operator of its own
    charged = np.add.reduceat(counts.astype(int), starts)
    # What the normalizer strips at the edges is charged to nobody. NFKC leaves nothing else out of these documents.
    assert charged.tolist() == [len(doc.strip(" \n\t").encode()) for doc in DOCS[:8]]
    val = read_manifest(out)["splits"]["val"]
    assert val["bytes_charged"] == charged.sum()
    assert val["bytes_charged"] + val["bytes_uncharged"] == val["bytes"] == sum(len(doc.encode()) for doc in DOCS[:8])


def test_manifest_describes_the_files(run, model, tmp_path):
    _, _, out = run(options=("--shard-tokens", 250))
    manifest = read_manifest(out)
    assert list(manifest) == [
        "format", "transform", "tokenizer", "tokenizer_sha256", "vocab_size", "sources", "splits", "created_by",
    ]  # fmt: skip
    sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    assert manifest["tokenizer_sha256"] == sha256(model) == sha256(out / "tokenizer.model")
    assert manifest["vocab_size"] == SentencePieceProcessor(model_file=str(model)).get_piece_size()
    assert manifest["sources"] == [{"name": "docs.jsonl", "sha256": sha256(tmp_path / "docs.jsonl"), "documents": len(DOCS)}]
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert (val["documents"], train["documents"]) == ([0, 8], [8, len(DOCS)])
    assert train["bytes"] == sum(len(doc.encode()) for doc in DOCS[8:])
    listed = {"manifest.json", "tokenizer.model"}
    for split, key in ((train, "shards"), (val, "shards"), (val, "sidecar")):
        assert split["tokens"] == sum(shard["tokens"] for shard in split[key])
        for shard in split[key]:
            assert shard["sha256"] == sha256(out / shard["file"])
            assert (out / shard["file"]).stat().st_size == 1024 + 2 * shard["tokens"]
            listed.add(shard["file"])
    assert listed == set(contents(out))
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_any_number_of_workers_writes_the_same_bytes(run, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 700)  # many chunks; the parent cuts them, so the workers need not know
    _, _, one = run("one", options=("--shard-tokens", 300))
    status, _, two = run("two", options=("--shard-tokens", 300, "--workers", 2))
    assert status == 0
    assert contents(one) == contents(two)


def test_an_error_in_a_worker_reaches_the_user(run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('"a"\n"b"\n[1]\n"c"\n')
    status, err, out = run(docs=bad, val_docs=1, options=("--workers", 2))
    assert status == 1 and "bad.jsonl, line 3" in err and not list(out.iterdir())


def test_compression_changes_nothing(run, tmp_path):
    folders = [run(suffix, docs=write_docs(tmp_path / f"docs.jsonl{suffix}", DOCS))[2] for suffix in ("", ".gz", ".xz")]
    splits = [read_manifest(folder)["splits"] for folder in folders]
    assert splits[0] == splits[1] == splits[2]


def test_several_files_are_one_stream(run, tmp_path):
    whole = run("whole")[2]
    first, second = write_docs(tmp_path / "a.jsonl", DOCS[:6]), write_docs(tmp_path / "b.jsonl.gz", DOCS[6:])
    parts = run("parts", docs=first, options=("--docs", first, second))[2]
    assert read_manifest(whole)["splits"] == read_manifest(parts)["splits"]
    assert [source["documents"] for source in read_manifest(parts)["sources"]] == [6, len(DOCS) - 6]


def test_val_file_is_the_validation_split(run, tmp_path):
    whole = run("whole")[2]
    val, train = write_docs(tmp_path / "v.jsonl", DOCS[:8]), write_docs(tmp_path / "t.jsonl", DOCS[8:])
    split = run("split", docs=train, val_docs=None, options=("--val-file", val))[2]
    assert read_manifest(whole)["splits"] == read_manifest(split)["splits"]
    assert [source["name"] for source in read_manifest(split)["sources"]] == ["v.jsonl", "t.jsonl"]


def test_max_train_tokens_stops_between_documents(run):
    everything = read_shards(run("all")[2], "train")
    starts = np.flatnonzero(everything == 1)
    limit = int(starts[5]) + 1  # one token too few for the sixth document
    _, _, out = run("some", options=("--max-train-tokens", limit))
    manifest = read_manifest(out)
    assert np.array_equal(read_shards(out, "train"), everything[: starts[5]])
    assert manifest["splits"]["train"]["documents"] == [8, 13]
    assert manifest["sources"][0]["documents"] == 13
    assert manifest["splits"]["train"]["bytes"] == sum(len(doc.encode()) for doc in DOCS[8:13])


def test_copies_of_validation_documents_are_counted(run):
    status, err, out = run(docs=[*DOCS, DOCS[5], DOCS[6], DOCS[5]])
    assert status == 0 and "3 training documents are also validation documents" in err
    assert read_manifest(out)["splits"]["train"]["documents_also_in_val"] == 3


# ==================================================================================================
# TOKENIZERS
# ==================================================================================================


@given(st.lists(st.text("aAbTheo \n\t\u00a0\u2581\u3000\u200b\ue001\ue004\u0301\u0344\ufb01½é\0\u00ad日\U0001f600,.19"), max_size=6))
@settings(max_examples=150, deadline=None)
def test_word_by_word_is_what_sentencepiece_does(model, texts):
    encoder = prepare.document_encoder(str(model), "caseops")
    assert encoder.words.exact
    encoded = [lossless_caps.encode(text) for text in texts]
    expected = [encoder.sp.encode(text) for text in encoded]
    assert [ids.tolist() for ids in encoder.tokens(encoded)] == expected
    if not texts:
        return
    for text, ids, (got, counts, edges) in zip(texts, expected, encoder.tokens_and_bytes(encoded), strict=True):
        assert got.tolist() == ids
        assert (counts >= 0).all() and counts.sum() + edges == len(text.encode())


def test_a_word_that_normalizes_twice(model):
    encoder = prepare.DocumentEncoder(str(model), "caseops")
    for text in ("the x\u0344y of", "the cat of", "x\u0344y"):  # U+0344 becomes two marks, and those compose with a letter
        assert encoder.tokens([text])[0].tolist() == encoder.sp.encode(text)
    assert len(encoder.words.unstable) == 1 and "cat" in encoder.words


def test_word_cache_may_overflow(model, monkeypatch):
    monkeypatch.setattr(prepare, "WORD_CACHE_CHARACTERS", 40)
    encoder = prepare.DocumentEncoder(str(model), "caseops")
    for text in sentences(30, seed=1):
        assert encoder.tokens([text])[0].tolist() == encoder.sp.encode(text)
        assert encoder.words.characters < 1000


# (text, pieces by name or surface, bytes): the published vectors that any CaseOps tokenizer shares.
T, A, C, E = lossless_caps.OPERATORS
BYTE_VECTORS = [
    ("a\ue001b \ue002C", ["a", E, T, "b", "▁", E, A, T, "c"], [1, 0, 3, 1, 1, 0, 3, 0, 1]),
    ("  A  \n\n B ", [T, "a", "▁", T, "b"], [0, 1, 5, 0, 1]),
    ("☃", ["<0xE2>", "<0x98>", "<0x83>"], [0, 0, 3]),
    ("㍿", None, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]),  # NFKC makes four characters of it: all bytes on the last piece
    ("Q7", [T, "<0x71>", "7"], [0, 1, 1]),
    (" \n ", [], []),
]


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> prepare.DocumentEncoder:
    """A tokenizer without merges: a, b, c, 7, the space and the bytes."""
    path = tmp_path_factory.mktemp("letters") / "letters.model"
    path.write_bytes(prepare.train_tokenizer(["a b c 7"] * 3, 269, "caseops"))
    return prepare.DocumentEncoder(str(path), "caseops")


@pytest.mark.parametrize("text, pieces, counts", BYTE_VECTORS)
def test_byte_vectors(letters, text, pieces, counts):
    ids, got, _ = next(letters.tokens_and_bytes([lossless_caps.encode(text)]))
    assert got.tolist() == counts
    if pieces is not None:
        assert [letters.sp.id_to_piece(int(i)) for i in ids] == pieces


def test_golden_ids_and_bytes_where_present():
    if not PUBLISHED_MODEL.exists():
        return
    encoder = prepare.document_encoder(str(PUBLISHED_MODEL), "caseops")
    rows = [json.loads(line) for line in (SHARED / "golden" / "caseops.jsonl").read_text(encoding="utf-8").splitlines()]
    encoded = prepare.encode_all([row["text"] for row in rows])
    assert encoded == [row["encoded"] for row in rows]
    for row, (ids, counts, edges) in zip(rows, encoder.tokens_and_bytes(encoded), strict=True):
        assert (ids.tolist(), counts.tolist()) == (row["ids"], row["bytes"])
        assert counts.sum() + edges == len(row["text"].encode())


def test_train_tokenizer(run):
    status, _, out = run(tokenizer=("--train-tokenizer", 350))
    assert status == 0
    sp = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert [sp.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [sp.id_to_piece(i) for i in range(4, 8)] == list(lossless_caps.OPERATORS)
    assert [sp.id_to_piece(8 + b) for b in (0, 255)] == ["<0x00>", "<0xFF>"]
    pieces = [sp.id_to_piece(i) for i in range(264, sp.get_piece_size())]
    assert 300 < sp.get_piece_size() <= 350
    assert not any("A" <= c <= "Z" for piece in pieces for c in piece)
    assert contents(out) == contents(run("again", tokenizer=("--train-tokenizer", 350), options=("--workers", 2))[2])


def test_tokenizer_sees_only_training_documents(run):
    marked = ["catcatcat " * 50] * 8 + sentences(40)
    pieces = {}
    for val_docs in (1, 8):
        _, _, out = run(f"out{val_docs}", docs=marked, val_docs=val_docs, tokenizer=("--train-tokenizer", 320))
        sp = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
        pieces[val_docs] = {sp.id_to_piece(i) for i in range(sp.get_piece_size())}
    assert any("catcat" in piece for piece in pieces[1])
    assert not any("catcat" in piece for piece in pieces[8])


def test_tokenizer_sample_is_bounded(run):
    docs = ["common words of the first part"] * 20 + ["catcatcat " * 50] * 20
    _, _, out = run(docs=docs, val_docs=1, tokenizer=("--train-tokenizer", 320, "--tokenizer-sample-bytes", 15 * 30))
    sp = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert not any("catcat" in sp.id_to_piece(i) for i in range(sp.get_piece_size()))


def test_tokenizer_that_cannot_be_trained(run):
    for vocab_size, docs in ((100, DOCS), (300, ["a", "", " "])):
        status, err, out = run(docs=docs, val_docs=1, tokenizer=("--train-tokenizer", vocab_size))
        assert status == 1 and f"could not train a tokenizer of {vocab_size} pieces" in err and not list(out.iterdir())


def test_plain_transform(run):
    status, _, out = run(tokenizer=("--train-tokenizer", 350), options=("--transform", "none"))
    assert status == 0
    sp = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert sp.id_to_piece(4) == "<0x00>"
    assert read_shards(out, "val").tolist() == list(itertools.chain(*([1, *sp.encode(doc)] for doc in DOCS[:8])))
    manifest = read_manifest(out)
    assert manifest["transform"] == "none" and "sidecar" not in manifest["splits"]["val"]
    assert not list(out.glob("*bytes*"))
    status, err, _ = run("mixed", tokenizer=("--tokenizer", out / "tokenizer.model"))
    assert status == 1 and "not made for CaseOps" in err and "--transform none" in err


def test_a_file_that_is_no_model(run, tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    status, err, _ = run(tokenizer=("--tokenizer", tmp_path / "x.model"))
    assert status == 1 and "not a SentencePiece model" in err
    status, err, _ = run(tokenizer=("--tokenizer", tmp_path / "absent.model"))
    assert status == 1 and "absent.model" in err


# ==================================================================================================
# WHAT IS REFUSED
# ==================================================================================================


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("not json", "not valid JSON"),
        ('{"text": "cut', "not valid JSON"),
        ('{"txt": "a"}', 'without "text"'),
        ('{"text": 5}', '"text" is int'),
        ("[1, 2]", "found list"),
        ('"\\ud800"', "surrogate"),
    ],
)
def test_bad_lines_are_named(run, tmp_path, line, complaint):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f'"fine"\n\n{line}\n"fine"\n')
    status, err, out = run(docs=bad, val_docs=1)
    assert status == 1
    assert "bad.jsonl, line 3" in err and complaint in err and "Expected one document per line" in err
    assert not list(out.iterdir())


def test_bytes_that_are_not_utf8(run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'"fine"\n"\xff"\n')
    status, err, _ = run(docs=bad, val_docs=1)
    assert status == 1 and "bad.jsonl, line 2" in err


def test_too_few_documents(run, tmp_path):
    status, err, _ = run(val_docs=len(DOCS) + 1)
    assert status == 1 and f"--docs hold {len(DOCS)} documents" in err and "--val-docs" in err
    status, err, _ = run(val_docs=len(DOCS))
    assert status == 1 and "none to train on" in err
    status, err, _ = run(docs=[], val_docs=1)
    assert status == 1 and "--docs hold 0 documents" in err
    status, err, _ = run(options=("--max-train-tokens", 1))
    assert status == 1 and "Raise --max-train-tokens" in err
    empty = write_docs(tmp_path / "empty.jsonl", [])
    status, err, out = run(val_docs=None, options=("--val-file", empty))
    assert status == 1 and "empty.jsonl holds no documents" in err
    assert not list(out.iterdir())


def test_validation_text_is_not_trained_on(run, tmp_path):
    status, err, _ = run(val_docs=None, options=("--val-file", tmp_path / "docs.jsonl"))
    assert status == 1 and "also one of --docs" in err


def test_huge_whitespace_does_not_fit_the_sidecar(run):
    status, err, _ = run(docs=["a" + " " * 70_000 + "b", "c"], val_docs=1)
    assert status == 1 and "docs.jsonl, line 1" in err and "70000 bytes" in err


def test_damaged_and_missing_sources(run, tmp_path):
    path = write_docs(tmp_path / "docs.jsonl.xz", DOCS)
    path.write_bytes(path.read_bytes()[:-40])
    status, err, out = run(docs=path)
    assert status == 1 and "docs.jsonl.xz" in err and not list(out.iterdir())
    status, err, _ = run(docs=tmp_path / "absent.jsonl")
    assert status == 1 and "absent.jsonl: No such file" in err


def test_finished_data_is_never_overwritten(run):
    out = run()[2]
    before = contents(out)
    status, err, _ = run()
    assert status == 1 and "already holds manifest.json" in err and "Choose another --out" in err
    (out / "manifest.json").unlink()
    status, err, _ = run()
    assert status == 1 and "already holds fineweb_train_000000.bin" in err
    assert contents(out) == {name: raw for name, raw in before.items() if name != "manifest.json"}


def test_full_disk(run, monkeypatch):
    def fsync(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    status, err, out = run()
    assert status == 1 and "cannot write" in err and "No space left" in err and "fineweb_" in err
    assert not list(out.iterdir())


def test_usage_errors_exit_with_2(run):
    for options in (("--workers", 0), ("--transform", "upper"), ("--val-file", "x"), ("--train-tokenizer", 300)):
        with pytest.raises(SystemExit) as caught:
            run(options=options)
        assert caught.value.code == 2


def test_help_lists_every_option():
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    options = ["docs", "out", "tokenizer", "train-tokenizer", "tokenizer-sample-bytes", "val-docs", "val-file", "max-train-tokens",
               "shard-tokens", "transform", "workers"]  # fmt: skip
    assert all(f"--{option} " in done.stdout for option in options)
    assert "(default: 50000" in done.stdout


# ==================================================================================================
# WHAT A DEAD RUN LEAVES
# ==================================================================================================


def test_killed_while_encoding(run, tmp_path, model):
    docs = write_docs(tmp_path / "docs.jsonl", sentences(12_000))  # three chunks: seconds of work after the first shard
    out, options = tmp_path / "out", ("--shard-tokens", "20000")
    command = [sys.executable, SCRIPT, "--docs", docs, "--out", out, "--tokenizer", model, "--val-docs", "8", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / ".partial" / "fineweb_train_000001.bin").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    again = run(docs=docs, options=options)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert again[0] == 1 and "another run is writing" in again[1]
    assert [path.name for path in out.iterdir()] == [".partial"]

    status, _, out = run(docs=docs, options=options)
    assert status == 0
    assert contents(out) == contents(run("undisturbed", docs=docs, options=options)[2])


@pytest.mark.parametrize("moved", [0, 2, 5])
def test_killed_while_moving_the_files(run, tmp_path, model, moved):
    whole = run("whole", options=("--shard-tokens", 500))[2]
    out, docs = tmp_path / "out", tmp_path / "docs.jsonl"
    code = f"""if True:
        import os, prepare_caseops_data as prepare
        rename, left = prepare.Path.rename, [{moved + 1}]
        def dying_rename(self, target):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            rename(self, target)
        prepare.Path.rename = dying_rename
        prepare.main(["--docs", {str(docs)!r}, "--out", {str(out)!r}, "--tokenizer", {str(model)!r}, "--val-docs", "8",
                      "--shard-tokens", "500"])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 9
    assert not (out / "manifest.json").exists()
    assert len(list(out.glob("*.bin"))) == moved
    status, _, out = run(options=("--shard-tokens", 500))
    assert status == 0
    assert contents(out) == contents(whole)


def test_workers_end_with_a_killed_run(tmp_path, model):
    docs = write_docs(tmp_path / "docs.jsonl", sentences(12_000))
    command = [sys.executable, SCRIPT, "--docs", docs, "--out", tmp_path / "out", "--tokenizer", model, "--val-docs", "8"]
    process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not list((tmp_path / "out" / ".partial").glob("fineweb_*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    # The workers hold the other end of this pipe: it ends when they have.
    started = time.monotonic()
    process.stdout.read()
    assert time.monotonic() - started < 5
