"""DATA: damaged input never becomes a number, rows never mix documents, and every byte of the validation set is counted once."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import documents, tiny_config, write_dataset, write_shard
from hypothesis import given, settings, strategies as st

import train_gpt as tg

CPU = torch.device("cpu")


@pytest.fixture
def folder(dataset, tmp_path):
    """A copy of the dataset that a test may damage."""
    return shutil.copytree(dataset, tmp_path / "data")


def load(folder, **changes) -> tuple[tg.Dataset, tg.ValData]:
    cfg = tiny_config(data_path=str(folder), **changes)
    files = tg.Dataset.open(cfg, need_train=True)
    return files, tg.ValData.load(cfg, files)


def rewrite(folder, name: str, tokens) -> None:
    """Replace a file and what the manifest says of it."""
    write_shard(folder / name, tokens)
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for entry in (*split["shards"], *split.get("sidecar", ())):
            if entry["file"] == name:
                entry |= dict(tokens=len(tokens), sha256=tg.sha256_file(folder / name))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(folder, edit) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cut(path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def damage(path, at: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= value
    path.write_bytes(bytes(data))


# ---- one shard


def test_shard_round_trip(tmp_path):
    tokens = np.arange(0, 65536, 7)
    write_shard(tmp_path / "s.bin", tokens)
    assert np.array_equal(tg.read_shard(tmp_path / "s.bin"), tokens)


@pytest.mark.parametrize("edit, message", [
    (lambda p: damage(p, 0, 1), "is no token shard"),
    (lambda p: damage(p, 4, 3), "is no token shard"),
    (lambda p: cut(p, 1000), "is no token shard"),
    (lambda p: cut(p, 0), "is no token shard"),
    (lambda p: cut(p, 1024), "is damaged: 1044 bytes expected for 10 tokens, found 1024"),
    (lambda p: cut(p, 1043), "is damaged"),
    (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "is damaged: 1044 bytes expected for 10 tokens, found 1045"),
    (lambda p: p.write_bytes(p.read_bytes() + b"\0\0"), "is damaged"),
    (lambda p: damage(p, 11, 0x80), "is damaged"),
    (lambda p: p.unlink(), "cannot read shard"),
    (lambda p: (p.unlink(), p.mkdir()), "cannot read shard"),
], ids=["magic", "version", "short header", "empty file", "no body", "half a token", "a byte more", "a token more", "negative count",
        "missing", "folder"])  # fmt: skip
def test_damaged_shard(tmp_path, edit, message):
    path = tmp_path / "s.bin"
    write_shard(path, np.arange(10))
    edit(path)
    with pytest.raises(tg.RunError, match=message) as caught:
        tg.read_shard(path)
    assert str(path) in str(caught.value)


def test_shard_without_tokens_is_empty(tmp_path):
    write_shard(tmp_path / "s.bin", [])
    assert len(tg.read_shard(tmp_path / "s.bin")) == 0


# ---- the folder and its manifest


def test_good_folder(dataset):
    files, data = load(dataset)
    assert [p.name for p in files.train] == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    assert [p.name for p in files.val] == ["fineweb_val_000000.bin"]
    assert [p.name for p in files.sidecar] == ["fineweb_val_bytes_000000.bin"]
    assert files.manifest_sha256 == tg.sha256_file(dataset / "manifest.json")
    assert len(data.target_bytes) == len(data.tokens) - 1 == len(tg.read_shard(files.val[0])) - 1


@pytest.mark.parametrize("edit, message", [
    (lambda d: shutil.rmtree(d), "no fineweb_train_"),
    (lambda d: [p.unlink() for p in d.glob("fineweb_train_*")], "no fineweb_train_"),
    (lambda d: (d / "fineweb_val_000000.bin").unlink(), "no fineweb_val_\\*"),
    (lambda d: (d / "fineweb_val_bytes_000000.bin").unlink(), "no fineweb_val_bytes_.*CASEOPS_ENABLED=0"),
    (lambda d: (d / "manifest.json").write_text("{"), "cannot read .*manifest.json"),
    (lambda d: edit_manifest(d, lambda m: m["splits"]["train"].update(documents=[14, 100])), "overlap"),
    (lambda d: edit_manifest(d, lambda m: m["splits"]["val"].update(documents=[20, 30])), "overlap"),
    (lambda d: edit_manifest(d, lambda m: m.update(vocab_size=8192)), "vocabulary of 8192, but VOCAB_SIZE=64"),
    (lambda d: damage(d / "fineweb_val_000000.bin", 1100, 1), "sha256"),
    (lambda d: damage(d / "fineweb_val_bytes_000000.bin", 1100, 1), "sha256"),
    (lambda d: damage(d / "fineweb_train_000001.bin", 1100, 1), "sha256"),
    (lambda d: write_shard(d / "fineweb_train_000001.bin", [1, 5]), "holds 2 tokens, manifest.json says"),
    (lambda d: write_shard(d / "fineweb_train_000002.bin", [1, 5]), "fineweb_train_000002.bin is not in manifest.json"),
], ids=["no folder", "no train", "no val", "no sidecar", "manifest damaged", "overlap", "overlap elsewhere", "vocabulary", "val changed",
        "sidecar changed", "train changed", "other length", "unlisted"])  # fmt: skip
def test_bad_folder(folder, edit, message):
    edit(folder)
    with pytest.raises(tg.RunError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("train, val", [([15, 135], [0, 15]), ([0, 15], [15, 30])])
def test_touching_splits_do_not_overlap(folder, train, val):
    edit_manifest(folder, lambda m: (m["splits"]["train"].update(documents=train), m["splits"]["val"].update(documents=val)))
    load(folder)


def test_a_run_that_only_evaluates_needs_no_training_data(folder):
    for path in folder.glob("fineweb_train_*"):
        path.unlink()
    assert tg.Dataset.open(tiny_config(data_path=str(folder)), need_train=False).train == ()


def test_folder_without_manifest_is_accepted(tmp_path):
    files, _ = load(write_dataset(tmp_path / "plain", manifest=False))
    assert files.manifest == {} and files.manifest_sha256 is None


def test_other_files_are_nobodys_business(folder):
    (folder / "README.txt").write_text("hello")
    write_shard(folder / "backup_train_000000.bin", [1, 2])
    load(folder)


# ---- validation data


def test_sidecar_shorter_than_the_tokens(folder):
    rewrite(folder, "fineweb_val_bytes_000000.bin", tg.read_shard(folder / "fineweb_val_bytes_000000.bin")[:-1])
    with pytest.raises(tg.RunError, match=r"byte sidecar holds .* does not belong to this validation set"):
        load(folder)


@pytest.mark.parametrize("tokens, message", [
    ([], "validation set is empty"),
    ([1], "validation set is empty"),
    ([5, 6, 1, 7], "starts with token 5, not with a document start"),
    ([1, 5, 64], "holds token id 64, but VOCAB_SIZE=64"),
])  # fmt: skip
def test_bad_validation_tokens(folder, tokens, message):
    rewrite(folder, "fineweb_val_000000.bin", tokens)
    rewrite(folder, "fineweb_val_bytes_000000.bin", [1] * len(tokens))
    with pytest.raises(tg.RunError, match=message):
        load(folder)


def test_validation_set_of_no_bytes(folder):
    rewrite(folder, "fineweb_val_000000.bin", [1, 5, 6])
    rewrite(folder, "fineweb_val_bytes_000000.bin", [9, 0, 0])  # the count of a token that is no target
    with pytest.raises(tg.RunError, match="0 bytes"):
        load(folder)


def test_bytes_belong_to_targets(folder):
    rewrite(folder, "fineweb_val_000000.bin", [1, 10, 11, 1, 12])
    rewrite(folder, "fineweb_val_bytes_000000.bin", [0, 100, 110, 0, 60000])
    _, data = load(folder)
    assert data.tokens.tolist() == [1, 10, 11, 1, 12]
    assert data.target_bytes.tolist() == [100, 110, 0, 60000], "target_bytes[i] belongs to tokens[i + 1]; uint16 must not wrap"


def test_documents_cover_each_target_once(dataset):
    _, data = load(dataset)
    starts, ends = data.documents()
    assert len(starts) == 15
    assert np.array_equal(np.concatenate([np.arange(s, e) for s, e in zip(starts, ends, strict=True)]), np.arange(len(data.target_bytes)))
    assert (data.tokens[starts] == tg.BOS_ID).all()
    assert all(np.flatnonzero(data.tokens[s:e] == tg.BOS_ID).tolist() == [0] for s, e in zip(starts, ends, strict=True))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=8))
def test_documents_cover_each_target_once_whatever_their_lengths(lengths):
    tokens = np.concatenate([[1] + [9] * n for n in lengths]).astype(np.uint16)
    data = tg.ValData(tokens, np.ones(len(tokens) - 1, np.int32))
    starts, ends = data.documents()
    covered = [i for s, e in zip(starts, ends, strict=True) for i in range(s, e)]
    assert covered == list(range(len(tokens) - 1)) and all(ends > starts)


@pytest.mark.parametrize("tail, expected", [(True, 1711), (False, 1664)])
def test_tail(dataset, tail, expected):
    _, data = load(dataset, eval_include_tail=tail)
    assert len(data.target_bytes) == len(data.tokens) - 1 == expected
    assert np.array_equal(data.target_bytes, load(dataset)[1].target_bytes[:expected])


def test_subset_is_whole_documents_with_their_bytes(dataset):
    _, whole = load(dataset)
    _, part = load(dataset, val_doc_fraction=0.4)
    assert len(part.documents()[0]) == 6
    assert len(part.target_bytes) == len(part.tokens) - 1

    def content(data):
        spans = zip(*data.documents(), strict=True)
        return [(tuple(data.tokens[s:e].tolist()), tuple(data.target_bytes[s : e - 1].tolist())) for s, e in spans]

    last = content(part)[-1][0]
    in_order = iter(content(whole))
    for tokens, counts in content(part)[:-1]:
        assert (tokens, counts) in in_order  # consumes: file order is kept
    assert any(tokens[: len(last)] == last for tokens, _ in in_order)


def test_subset_does_not_depend_on_the_seed(dataset):
    _, a = load(dataset, val_doc_fraction=0.5)
    _, b = load(dataset, val_doc_fraction=0.5, seed=99)
    assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.target_bytes, b.target_bytes)


def test_subset_of_everything_is_everything(dataset):
    _, whole = load(dataset)
    part = whole.subset(1.0)
    assert np.array_equal(part.tokens, whole.tokens) and np.array_equal(part.target_bytes, whole.target_bytes)


# ---- bytes without a sidecar: the SentencePiece rule


TEXTS = [f"the quick brown fox {i} jumps over {j} lazy dogs, and then some more" for i in range(30) for j in range(10)]


def train_tokenizer(folder, texts=TEXTS, **options):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), model_type="bpe", byte_fallback=True, pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, minloglevel=2, hard_vocab_limit=False, **(dict(vocab_size=340) | options))  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, train_tokenizer(folder)


def plain_dataset(folder, model, tokenizer_folder, docs):
    """A dataset without sidecar; returns its configuration."""
    folder.mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.model", folder)
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate([[tg.BOS_ID, *model.encode(text)] for text in docs]))
    return tiny_config(data_path=str(folder), caseops_enabled=False, vocab_size=model.vocab_size())


@pytest.mark.parametrize("docs", [
    ["the quick brown fox 3 jumps over 4 lazy dogs", "more dogs, and then some", "a"],
    ["the fox", "ZEBRA! xyz~ @#%", "over the lazy  dog"],
    ["naïve fox 日本語 dogs", "ß the 😀 brown", "\u00a0x"],
], ids=["known words", "byte fallback", "not ASCII"])  # fmt: skip
def test_bytes_are_those_of_the_decoded_text(tokenizer, tmp_path, docs):
    folder, model = tokenizer
    cfg = plain_dataset(tmp_path / "d", model, folder, docs)
    data = tg.ValData.load(cfg, tg.Dataset.open(cfg, need_train=False))
    starts, ends = data.documents()
    for text, s, e in zip(docs, starts, ends, strict=True):
        counted = int(data.target_bytes[s : e if e == len(data.target_bytes) else e - 1].sum())
        assert counted == len(model.decode(model.encode(text)).encode())
        if text.isascii() and "  " not in text:
            assert counted == len(text)
    boundaries = data.tokens[1:] == tg.BOS_ID
    assert not data.target_bytes[boundaries].any(), "a document start is no text"


def test_byte_tables(tokenizer):
    folder, model = tokenizer
    size, lead, boundary = tg.sentencepiece_byte_tables(folder / "tokenizer.model", model.vocab_size())
    assert boundary[:4].all() and boundary.sum() == 4 and not size[boundary].any() and not lead[boundary].any()
    assert (size[[model.piece_to_id(f"<0x{b:02X}>") for b in range(256)]] == 1).all()
    space = model.piece_to_id("\u2581")
    assert size[space] == 0 and lead[space], "a space is one byte, not the three of its marker"
    word = model.piece_to_id("\u2581the")
    assert (size[word], lead[word]) == (3, True)


def test_tokenizer_without_a_space_piece(tmp_path):
    train_tokenizer(tmp_path, texts=["abcdefgh" * 3, "hgfedcba"] * 20, add_dummy_prefix=False, vocab_size=275)
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    with pytest.raises(tg.RunError, match="no piece for a lone space"):
        tg.sentencepiece_byte_tables(tmp_path / "tokenizer.model", model.vocab_size())


def test_tokenizer_of_another_size_or_nowhere(tokenizer, tmp_path):
    folder, model = tokenizer
    with pytest.raises(tg.RunError, match=rf"has {model.vocab_size()} pieces, but VOCAB_SIZE=8192"):
        tg.sentencepiece_byte_tables(folder / "tokenizer.model", 8192)
    with pytest.raises(tg.RunError, match="TOKENIZER_PATH"):
        tg.sentencepiece_byte_tables(tmp_path / "tokenizer.model", 8192)


# ---- attention segments


def test_cu_seqlens_example():
    out = tg.document_cu_seqlens(np.array([5, 900]), 2048, 512)
    assert out.dtype == np.int32 and len(out) == 64
    assert out[:7].tolist() == [0, 5, 517, 900, 1412, 1924, 2048] and set(out[7:].tolist()) == {2048}


@pytest.mark.parametrize("bos, total, cap, expected", [
    ([], 10, 0, [0, 10]),
    ([], 10, 4, [0, 4, 8, 10]),
    ([0], 8, 4, [0, 4, 8]),
    ([0, 3], 8, 0, [0, 3, 8]),
    ([7], 8, 4, [0, 4, 7, 8]),
])  # fmt: skip
def test_cu_seqlens_corners(bos, total, cap, expected):
    out = tg.document_cu_seqlens(np.array(bos, dtype=np.int64), total, cap)
    assert out.tolist() == expected + [total] * (64 - len(expected))


ROWS = st.integers(1, 400).flatmap(lambda total: st.tuples(st.just(total), st.sets(st.integers(0, total - 1))))


@settings(max_examples=200, deadline=None)
@given(ROWS, st.integers(0, 60), st.sampled_from([1, 8, 64]))
def test_cu_seqlens_properties(row, cap, bucket):
    total, bos = row
    out = tg.document_cu_seqlens(np.array(sorted(bos), dtype=np.int64), total, cap, bucket)
    boundaries = np.unique(out)
    assert out[0] == 0 and out[-1] == total and len(out) % bucket == 0 and (np.diff(out) >= 0).all()
    assert len(out) - (len(boundaries)) < bucket, "no more padding than needed"
    assert bos <= set(boundaries.tolist()), "no segment crosses a document"
    lengths = np.diff(boundaries)
    assert lengths.sum() == total and (not cap or lengths.max() <= cap)
    documents_start = sorted({0, *bos})
    extra = set(boundaries.tolist()) - {total, *documents_start}
    assert all((b - max(s for s in documents_start if s < b)) % cap == 0 for b in extra), "cuts only where the cap asks for them"


def test_packed_row():
    tokens = np.array([9, 1, 8, 7, 6, 1, 5], np.uint16)
    row = tg.packed_row(tokens, 2, CPU)
    assert row.inputs.tolist() == [[9, 1, 8, 7, 6, 1]] and row.targets.tolist() == [[1, 8, 7, 6, 1, 5]]
    assert row.inputs.dtype == row.targets.dtype == torch.int64 and row.segments.cu_seqlens.dtype == torch.int32
    assert row.segments.cu_seqlens[:6].tolist() == [0, 1, 3, 5, 6, 6] and row.segments.max_len == 2
    assert row.lengths.tolist() == [1, 2, 2, 1]


# ---- the training loader


@pytest.fixture
def shards(tmp_path):
    """Three shards whose tokens tell where they lie: a leading partial document, then BOS, then numbers."""
    paths = []
    for i, (lead, size) in enumerate([(0, 100), (7, 64), (3, 90)]):
        tokens = 1000 * (i + 1) + np.arange(size)
        tokens[lead] = tg.BOS_ID
        paths.append(tmp_path / f"fineweb_train_{i:06d}.bin")
        write_shard(paths[-1], tokens)
    return tuple(paths)


def take(shards, steps: int, position=None, row=9, rows=2, vocab=65536):
    loader = tg.TrainLoader(shards, row, rows, vocab, position)
    try:
        return [loader.next_step() for _ in range(steps)], loader.position
    finally:
        loader.close()


def expected_order(shards, row=9, rows=2):
    """The same by hand: whole steps from the first BOS of each shard on, the tail dropped."""
    out = []
    for path in shards:
        tokens = np.array(tg.read_shard(path))
        tokens = tokens[np.flatnonzero(tokens == tg.BOS_ID)[0]:]
        whole = len(tokens) // (rows * (row + 1))
        out += list(tokens[: whole * rows * (row + 1)].reshape(whole, rows, row + 1))
    return out


def test_loader_reads_in_file_order_and_wraps(shards):
    order = expected_order(shards)
    assert len(order) == 5 + 2 + 4
    steps, _ = take(shards, 2 * len(order) + 3)
    for i, step in enumerate(steps):
        assert np.array_equal(step, order[i % len(order)]), i


def test_loader_resumes_at_its_position(shards):
    steps, _ = take(shards, 16)
    for k in (1, 5, 6, 11, 12):
        _, position = take(shards, k)
        again, _ = take(shards, 16 - k, position)
        assert all(np.array_equal(a, b) for a, b in zip(again, steps[k:], strict=True)), k


def test_rows_differ_by_row_size_not_by_number_of_rows_per_step(shards):
    flat = np.concatenate([s.reshape(-1) for s in take(shards[:1], 5, rows=2)[0]])
    assert np.array_equal(flat, np.concatenate([s.reshape(-1) for s in take(shards[:1], 10, rows=1)[0]]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_rows_of_a_step(dataset, size):
    """Whatever the number of ranks, together they see the same rows in the same order, each row once."""
    cfg = tiny_config(data_path=str(dataset), train_batch_tokens=1024)
    files = tg.Dataset.open(cfg, need_train=True)

    class Alone(tg.World):
        """A rank of `size` that nobody answers."""

        def sum_(self, *tensors):
            pass

    class Recorder(tg.Trainer):
        def __init__(self, rank):
            self.cfg, self.world, self.files, self.accumulate = cfg, Alone(rank, size, CPU, torch.float32), files, cfg.micro_batches // size
            self.loader, self.seen, self.optimizer, self.forward, self.graphs = self.open_loader(), [], self, self.record, None
            self.utilization = tg.Utilization(self.world)

        def record(self, inputs, targets, **_):
            self.seen.append(torch.cat([inputs[0], targets[0, -1:]]).numpy())
            return torch.zeros(1, requires_grad=True)

        def step(self, lr, momentum):
            pass

    reference, _ = take(files.train, 3, row=256, rows=4, vocab=64)
    ranks = [Recorder(rank) for rank in range(size)]
    for expected in reference:
        for r in ranks:
            r.seen.clear()
            r.train_step(r.loader.next_step(), 64, False, 1.0, 0.9)
        assert np.array_equal(np.concatenate([r.seen for r in ranks]), expected)
    for r in ranks:
        r.loader.close()


@pytest.mark.parametrize("rows, message", [(7, None), (9, None), (10, None), (11, "no training shard holds a step of 11 x 10 tokens")])
def test_too_little_training_data(shards, rows, message):
    if message is None:
        take(shards, 3, rows=rows)  # shards that are too small are skipped as long as one is not
        return
    with pytest.raises(tg.RunError, match=message):
        take(shards, 1, rows=rows)


def test_training_shard_without_documents(tmp_path):
    write_shard(tmp_path / "t.bin", [5] * 100)
    with pytest.raises(tg.RunError, match=r"t\.bin holds no document start"):
        take((tmp_path / "t.bin",), 1)


def test_training_token_outside_the_vocabulary(shards):
    with pytest.raises(tg.RunError, match=r"fineweb_train_000000.bin holds token id 10\d\d, but VOCAB_SIZE=64"):
        take(shards, 1, vocab=64)


def test_a_shard_that_turns_bad_while_training_is_named(shards):
    loader = tg.TrainLoader(shards, 9, 2, 65536)
    cut(shards[1], 1100)
    with pytest.raises(tg.RunError, match=r"fineweb_train_000001\.bin is damaged"):
        for _ in range(8):
            loader.next_step()
    loader.close()


# ---- calibration


def test_calibration_windows_are_deterministic(shards):
    a, b = (tg.calibration_windows(shards, 9, 12) for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, tg.calibration_windows(shards, 9, 12, seed=1), strict=True))


def test_calibration_uses_everything_before_it_repeats(shards):
    everything = sum((n - 1) // 9 for n in (100, 64, 90))
    windows = tg.calibration_windows(shards, 9, 3 * everything)
    assert all(len(w) == 10 for w in windows)
    keys = [tuple(w.tolist()) for w in windows]
    distinct = len(set(keys))
    assert distinct >= everything - 3, "a random phase costs each shard at most one window"
    for start in range(0, 3 * distinct, distinct):
        chunk = keys[start : start + distinct]
        assert len(set(chunk)) == len(chunk)


def test_calibration_covers_all_shards(shards):
    files = {int(w.max()) // 1000 for w in tg.calibration_windows(shards, 9, 15)}
    assert files == {1, 2, 3}


def test_calibration_needs_one_window(shards):
    assert len(tg.calibration_windows(shards, 63, 2)) == 2
    with pytest.raises(tg.RunError, match="no training shard holds 101 tokens"):
        tg.calibration_windows(shards, 100, 1)


def test_world_is_frozen(world):
    with pytest.raises(dataclasses.FrozenInstanceError):
        world.rank = 1


def test_fixture_documents_begin_with_bos():
    assert all(d[0] == tg.BOS_ID and (d[1:] != tg.BOS_ID).all() for d in documents(20, 3))
