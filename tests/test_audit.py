"""The auditor: every kind of violation seen in the contest, planted into our evaluation or data path, is caught; clean runs pass."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, documents, tiny_config, tiny_env, write_dataset, write_shard
from hypothesis import given, settings, strategies as st

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import audit
import ledger as ledgers
import probes
import record
import rules

CPU = tg.World(0, 1, torch.device("cpu"), torch.float32)
KINDS: dict[str, tuple[str, str, str]] = {}


def kind(number: int, planted: str, caught_by: str):
    """Mark the test of a kind of violation; tools/validity.md lists them."""

    def mark(test):
        KINDS[f"V{number}"] = (planted, caught_by, test.__name__)
        return test

    return mark


def val_data(docs: list[np.ndarray]) -> tg.ValData:
    tokens = np.concatenate(docs).astype(np.uint16)
    return tg.ValData(tokens, np.where(tokens == tg.BOS_ID, 0, 1 + tokens % 3)[1:].astype(np.int32))


def some(count: int = 8, seed: int = 5, longest: int = 120) -> tg.ValData:
    return val_data(documents(count, seed, longest=longest))


def door_of(data=None, name="ttt", ledger=None) -> tg.Scorer:
    return tg.Scorer(data or some(), CPU, name, ledger)


def flat(value: float = 1.0):
    return lambda targets: torch.full(targets.shape, value)


def lines_of(path) -> list[dict]:
    """The ledger's lines, after walking the chain by its definition."""
    last, out = "", []
    for n, text in enumerate(Path(path).read_text().splitlines()):
        line = json.loads(text)
        assert (line["n"], line["prev"], line["hash"]) == (n, last, tg.Ledger.digest(line)), n
        last = line["hash"]
        out.append(line)
    return out


def look(cfg, model, seed: int = 0, rounds: int = 1, wrap=None, data=None) -> probes.Findings:
    """P1 to P3 of the scored pass; wrap(forward): what the cheat calls instead."""
    model = copy.deepcopy(model).requires_grad_(False).eval()
    forward = wrap(model) if wrap else model
    quiet = dataclasses.replace(cfg, phased_ttt_enabled=False)

    def replay(scorer):
        if not cfg.ttt_enabled:
            return tg.evaluate(quiet, CPU, forward, scorer)
        engine = tg.TttEngine(quiet, CPU, model, scorer)
        engine.forward = forward
        return tg.TttRun(quiet, engine, scorer, lambda line: None).run()

    masked = tg.METHODS["ttt" if cfg.ttt_enabled else cfg.eval_method].documents_masked
    return probes.probe_scoring(tg, data or some(seed=seed), CPU, cfg.vocab_size, replay, 3, 32, rounds, seed, masked)


@pytest.fixture
def findings(tmp_path):
    """Factory: what `probe_facts` says of the ledger and the files of a run with one thing changed, and the verdicts on it.

    start, artifact, end: other facts in these lines of the ledger; cfg: other variables; text_bytes: of the manifest.
    """

    def make(text_bytes=None, shard_tokens=None, early=False, seen=(), warm_ups=(("1", "1"),), weights=("a" * 32, "a" * 32), **changes):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        data, ledger = some(3), tg.Ledger(folder / "ledger.jsonl")
        size = int(data.target_bytes.sum())
        cfg = tiny_config(**dict(max_wallclock_seconds=600.0, max_eval_seconds=600.0) | changes.get("cfg", {}))
        write_shard(folder / "fineweb_val_000000.bin", data.tokens if shard_tokens is None else shard_tokens)
        ledger.add("start", dict(seed=42, seeds_declared="42,314,0", val_tokens=len(data.target_bytes), val_bytes=size, shards={})
                   | changes.get("start", {}))
        for before, after in warm_ups:
            ledger.add("warmup", dict(before=before, after=after))
        for name, seconds in dict(train=590.0, calibrate=4.0, quantize=10.0, eval=500.0).items():
            ledger.add("phase", dict(name=name, seconds=seconds))
        ledger.add("artifact", dict(file="a.ptz", bytes=15_900_000, code_bytes=99_999) | changes.get("artifact", {}))
        for when, digest in zip(("loaded", "first_score"), weights, strict=True):
            ledger.add("weights", dict(when=when, sha256=digest))
        scorer = tg.Scorer(data, CPU, "ttt", ledger)
        if early:
            scorer.targets_to_learn(np.arange(9), "slot", early=True)
            scorer.receipt()
        scorer.score(np.arange(scorer.total)[None], flat(2.0))
        score = scorer.finish()
        ledger.add("access", dict(seen=list(seen)))
        ledger.add("end", {"pass": "ttt", "val_loss": score.loss, "val_bpb": score.bpb, "tokens": score.tokens, "bytes": size,
                           "train_seconds": 590.0, "calib_seconds": 4.0, "eval_seconds": 500.0,
                           "train_budget_seconds": cfg.max_wallclock_seconds, "eval_budget_seconds": 600.0} | changes.get("end", {}))
        manifest = dict(splits=dict(val=dict(bytes=size if text_bytes is None else text_bytes)))
        files = SimpleNamespace(val=[folder / "fineweb_val_000000.bin"], manifest=manifest)
        account = ledgers.accounts(ledgers.read_chain(ledger.path))[-1]
        run = SimpleNamespace(script=tg, cfg=cfg, files=files, folder=folder, account=account, scored=True)
        found = probes.probe_facts(run)
        return found, rules.verdicts(cfg, found)

    return make


def test_a_clean_run_is_clean(findings):
    found, verdicts = findings()
    assert {name: v for name, (v, _) in found.items()} == dict.fromkeys(found, "PASS") | dict(P8="NOT-MEASURED")
    assert {v for rule, (v, _) in verdicts.items() if rule in ("R1", "R2", "R7", "R8", "R9", "R10", "R11")} == {"PASS"}


# ---------------------------------------------------------------------------------------------------- the 28 kinds


@kind(1, "weights adapted to validation tokens before they are scored", "scorer (optimizer guard), R7 (hash of the weights)")
def test_v1_adapting_before_scoring(findings, random_model):
    cfg = tiny_config()
    model = random_model(cfg)
    scorer, before = door_of(), tg.state_hash(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.from_numpy(scorer.inputs_for(0, np.arange(65)).astype(np.int64))[None]

    def adapt():
        model(tokens[:, :-1], tokens[:, 1:], layers=tg.layer_order(cfg, True)).mean().backward()
        optimizer.step()

    with scorer.only_released_steps(), pytest.raises(tg.RunError, match="released for learning"):
        adapt()
    assert tg.state_hash(model.state_dict()) == before
    adapt()  # outside, between artifact and first score
    verdicts = findings(weights=(before, tg.state_hash(model.state_dict())))[1]
    assert verdicts["R7"][0] == "FAIL"
    assert findings(early=True)[1]["R7"][0] == "FAIL", "or from what is scored later"


@kind(2, "a second scoring pass, and a score that is not the one of the token file", "scorer (bitmap), R11")
def test_v2_scoring_twice(findings):
    scorer = door_of()
    scorer.score(np.arange(10)[None], flat())
    with pytest.raises(tg.RunError, match=r"target in \[9, 12\] was about to be scored twice"):
        scorer.score(np.arange(9, 13)[None], flat())
    with pytest.raises(tg.RunError, match="twice"):
        scorer.score(np.array([[20, 20]]), flat())
    scorer.sync()
    with pytest.raises(tg.RunError, match="twice"):
        scorer.score(np.array([[3]]), flat())
    assert findings(end=dict(val_bpb=1.0))[1]["R11"][0] == "FAIL"


def ngram_key(forward):
    """A hashed n-gram cache whose key holds the target: a hit whenever the target is what a good guess would be."""

    def score(inputs, targets, **kw):
        boost = (targets * 2654435761 % 7 == 0).float()
        return forward(inputs, targets, **kw) - boost

    return score


@kind(3, "an n-gram cache with the target in its key", "P2")
def test_v3_target_in_the_key(random_model):
    assert look(tiny_config(), random_model(tiny_config()), wrap=ngram_key)["P2"][0] == "FAIL"


@kind(4, "a mixture whose parts do not add up to one", "P2")
def test_v4_unnormalised_mixture(random_model):
    def mixture(forward):
        return lambda inputs, targets, **kw: -torch.log(forward(inputs, targets, **kw).neg().exp() + 1e-3)

    found = look(tiny_config(), random_model(tiny_config()), wrap=mixture)
    assert found["P2"][0] == "FAIL" and found["P1"][0] == found["P3"][0] == "PASS"


@kind(5, "a byte model spread over tokens, scored on a subset", "P2, scorer (finish), P4")
def test_v5_byte_mixture_on_a_subset(random_model, findings):
    def spread(forward):
        return lambda inputs, targets, **kw: forward(inputs, targets, **kw) / (1 + (targets % 3))

    assert look(tiny_config(), random_model(tiny_config()), wrap=spread)["P2"][0] == "FAIL"
    scorer = door_of()
    scorer.score(np.arange(100)[None], flat())
    with pytest.raises(tg.RunError, match=f"scored 100 targets instead of {scorer.total}"):
        scorer.finish()
    assert findings(end=dict(tokens=100))[1]["R4"][0] == "FAIL"


def slot(forward):
    """A bias on the logits of a window, learned from the window's own targets, with which they are then scored."""

    def score(inputs, targets, **kw):
        own, every = torch.roll(inputs, -1, 1), torch.arange(64).expand(*inputs.shape, -1)
        with torch.no_grad():
            logits = -forward(inputs, every, **kw)
        bias = torch.zeros(64, requires_grad=True)
        for _ in range(3):
            with torch.enable_grad():
                loss = -(logits + bias).log_softmax(-1).gather(-1, own[..., None]).mean()
            bias.data -= torch.autograd.grad(loss, bias)[0]
        nats = -(logits + bias.detach()).log_softmax(-1)
        return nats.gather(-1, targets) if targets.ndim == 3 else nats.gather(-1, targets[..., None])[..., 0]

    return score


@kind(6, "SLOT: a bias learned from the targets that it then helps to score", "P1, P2 (the distribution moves with its target)")
def test_v6_slot(random_model):
    cfg = tiny_config(ttt_enabled=False)
    found = look(cfg, random_model(cfg), wrap=slot)
    assert found["P1"][0] == found["P2"][0] == "FAIL"


def gated_tilt(forward):
    """A normalised boost of a guess, switched by the very token that is to be predicted."""

    def score(inputs, targets, **kw):
        nats = -forward(inputs, torch.arange(64).expand(*inputs.shape, -1), **kw)
        nats = nats.scatter_add(-1, inputs[..., None], (torch.roll(inputs, -1, 1) % 7 / 7)[..., None]).log_softmax(-1).neg()
        return nats.gather(-1, targets) if targets.ndim == 3 else nats.gather(-1, targets[..., None])[..., 0]

    return score


@kind(7, "an n-gram hint gated by the realised token", "P1, P2 (the distribution moves with its target)")
def test_v7_gate_on_the_realised_token(random_model):
    cfg = tiny_config(ttt_enabled=False)
    found = look(cfg, random_model(cfg), wrap=gated_tilt, rounds=3)
    assert found["P1"][0] == found["P2"][0] == "FAIL" and "off by" in found["P2"][1]
    excess = float(found["P2"][1].rsplit(" ", 1)[1])
    assert excess < 1e-4, "each distribution adds up to one: the sum alone would not have told"


@kind(8, "validation documents prepared a second time, into the training data", "manifest (document ranges), P9, R3")
def test_v8_overlap(tmp_path, findings):
    folder, val = write_dataset(tmp_path / "data"), documents(15, 2)
    write_shard(folder / "leak.bin", np.concatenate([*documents(20, 1), *val[:4]]))
    shards = (*sorted(folder.glob("fineweb_train_*.bin")), folder / "leak.bin")
    clean, leak = (probes.probe_overlap(tg, files, np.concatenate(val), math.inf)["P9"] for files in (shards[:2], shards))
    assert clean[0] == "PASS" and leak[0] == "FAIL" and leak[1].startswith("4 of 15 documents are in 3 of 3")
    assert rules.verdicts(tiny_config(), dict(P9=leak))["R3"][0] == "FAIL"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["documents"] = [14, 135]
    (folder / "leak.bin").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(tg.RunError, match="overlap"):
        tg.Dataset.open(tiny_config(data_path=str(folder)), need_train=True)


def test_overlap_tells_copies_from_likenesses(tmp_path):
    val, rng = [np.r_[1, np.random.default_rng(i).integers(4, 64, 300)] for i in range(200)], np.random.default_rng(9)
    near = np.r_[1, rng.integers(4, 64, 59), val[7][60:]]  # another beginning
    write_shard(tmp_path / "a.bin", np.concatenate([np.r_[1, rng.integers(4, 64, 90)], val[3], near]))
    found = probes.probe_overlap(tg, (tmp_path / "a.bin",), np.concatenate(val), math.inf)["P9"]
    assert found == ("NEEDS-RULING", "1 of 200 documents are in 1 of 1 training shards, 1 more in part")
    assert "in 0 of 1 training shards" in probes.probe_overlap(tg, (tmp_path / "a.bin",), np.concatenate(val), -1.0)["P9"][1]


@kind(9, "the tail of the validation set dropped", "P4, R4")
def test_v9_truncated_tail(findings, dataset):
    cfg = tiny_config(data_path=str(dataset), eval_include_tail=False)
    data = tg.ValData.load(cfg, tg.Dataset.open(cfg, need_train=False))
    shard = tg.read_shard(dataset / "fineweb_val_000000.bin")
    assert len(data.target_bytes) < len(shard) - 1
    assert findings(shard_tokens=shard, end=dict(tokens=len(data.target_bytes)))[1]["R4"][0] == "FAIL"


def spoil_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["splits"]["val"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@kind(10, "validation shards made of other documents", "manifest (sha256)")
def test_v10_another_partition(tmp_path):
    folder = write_dataset(tmp_path / "data")
    size = len(tg.read_shard(folder / "fineweb_val_000000.bin"))
    write_shard(folder / "fineweb_val_000000.bin", np.resize(np.concatenate(documents(30, 77)), size))
    with pytest.raises(tg.RunError, match=r"fineweb_val_000000\.bin does not have the sha256"):
        tg.Dataset.open(tiny_config(data_path=str(folder)), need_train=False)


@kind(11, "a smaller validation set than the manifest's", "manifest (tokens)")
def test_v11_another_size(tmp_path):
    folder = write_dataset(tmp_path / "data")
    tokens = tg.read_shard(folder / "fineweb_val_000000.bin")
    write_shard(folder / "fineweb_val_000000.bin", np.array(tokens[: len(tokens) // 2]))
    with pytest.raises(tg.RunError, match="tokens, manifest.json says"):
        tg.Dataset.open(tiny_config(data_path=str(folder)), need_train=False)


PIECES = [("<pad>", "control"), ("<s>", "control"), ("</s>", "control"), ("<unk>", "unknown"), ("<0xE2>", "byte"), ("<0x96>", "byte"),
          ("<0x81>", "byte"), ("\u2581", ""), ("\u2581the", ""), ("cat", ""), ("\u2581sat", ""), ("old", "unused")]  # fmt: skip
TEXT = ["<s>", "\u2581the", "\u2581", "cat", "<0xE2>", "<0x96>", "<s>", "cat", "\u2581sat", "old", "cat"]
BYTES = 0 + 4 + 1 + 3 + 1 + 1 + 0 + 3 + 4 + 0 + 3 - 1  # of TEXT by the rule; the space after a BOS is not charged


class Pieces:
    """A SentencePiece model as large as this test."""

    def __init__(self, model_file=None):
        self.pieces = PIECES

    def vocab_size(self):
        return len(self.pieces)

    def id_to_piece(self, i):
        return self.pieces[i][0]

    def piece_to_id(self, piece):
        return [p for p, _ in self.pieces].index(piece) if piece in [p for p, _ in self.pieces] else 3

    def __getattr__(self, name):
        return lambda i: self.pieces[i][1] == name.removeprefix("is_")


@pytest.fixture
def count_bytes(tmp_path, monkeypatch, findings):
    """Factory: the verdict on the bytes of TEXT, counted by tables that spoil(size, lead, boundary) may have changed."""
    (tmp_path / "m.model").write_text("")
    tokens = np.array([[p for p, _ in PIECES].index(p) for p in TEXT], np.uint16)
    write_shard(tmp_path / "fineweb_val_000001.bin", tokens)
    right = tg.sentencepiece_byte_tables

    def verdict(spoil):
        cfg = tiny_config(caseops_enabled=False, vocab_size=len(PIECES), tokenizer_path=str(tmp_path / "m.model"))
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "sentencepiece", SimpleNamespace(SentencePieceProcessor=Pieces))
            patch.setattr(tg, "sentencepiece_byte_tables", lambda *args: spoil(*map(np.copy, right(*args))))
            data = tg.ValData.load(cfg, tg.Dataset((), (tmp_path / "fineweb_val_000001.bin",), (), {}, None, {}))
        counted = dict(tokens=len(tokens) - 1, bytes=int(data.target_bytes.sum()))
        found, verdicts = findings(text_bytes=BYTES, shard_tokens=tokens, end=counted)
        return found["P4"][0], verdicts["R4"][0]

    assert verdict(lambda *tables: tables) == ("PASS", "NOT-MEASURED"), "P10 has nothing to decode"
    return verdict


def plus_one(size, lead, boundary):
    return size + lead, lead, boundary


@kind(12, "the leading space counted in the table and again at use", "P4 (bytes of the text)")
def test_v12_space_counted_twice(count_bytes):
    assert count_bytes(plus_one) == ("FAIL", "FAIL")


@kind(13, "a vocabulary without the lone space: it is scored as three byte pieces", "tokenizer check, P4")
def test_v13_no_space_piece(count_bytes, monkeypatch, tmp_path):
    def three_bytes(size, lead, boundary):
        size[7] = 3
        return size, lead & (np.arange(len(lead)) != 7), boundary

    assert count_bytes(three_bytes) == ("FAIL", "FAIL")
    without = [p for p in PIECES if p[0] != "\u2581"]
    monkeypatch.setitem(sys.modules, "sentencepiece", SimpleNamespace(SentencePieceProcessor=Pieces))
    monkeypatch.setattr(sys.modules[__name__], "PIECES", without)
    with pytest.raises(tg.RunError, match="no piece for a lone space"):
        tg.sentencepiece_byte_tables(tmp_path / "m.model", len(without))


@kind(14, "byte pieces counted as three bytes", "P4 (bytes of the text)")
def test_v14_byte_pieces(count_bytes):
    assert count_bytes(lambda size, lead, boundary: (np.where(size == 1, 3, size), lead, boundary)) == ("FAIL", "FAIL")


@kind(15, "unused pieces and boundaries taken for text", "P4 (bytes of the text)")
def test_v15_unused_pieces(count_bytes):
    def unused(size, lead, boundary):
        size[11], boundary[:] = 3, False
        return size, lead, boundary

    assert count_bytes(unused) == ("FAIL", "FAIL")


@kind(16, "a normalisation that loses text", "P10, R4 needs a ruling")
def test_v16_lossy_text(monkeypatch, tmp_path):
    data = val_data([np.r_[1, np.arange(20, 40)], np.r_[1, np.arange(30, 50)]])
    data = tg.ValData(data.tokens, (data.tokens[1:] != 1).astype(np.int32))
    cfg = tiny_config(caseops_enabled=False, tokenizer_path=str(tmp_path / "m.model"))
    coded = SimpleNamespace(encode=lambda text: [ord(c) - 45 for c in text])
    for decode, expected in ((lambda ids: "".join(chr(i + 45) for i in ids), "PASS"),
                             (lambda ids: "".join(chr(i + 45) for i in ids).lower(), "NEEDS-RULING"),
                             (lambda ids: "".join(chr(i + 45) for i in ids[1:]), "NEEDS-RULING")):  # fmt: skip
        model = SimpleNamespace(decode=decode, encode=coded.encode)
        monkeypatch.setitem(sys.modules, "sentencepiece", SimpleNamespace(SentencePieceProcessor=lambda model_file, m=model: m))
        found = probes.probe_round_trip(tg, cfg, data, 8, 0)
        assert found[0] == expected, found
    assert found[1] == "2 of 2 documents and 2 of 40 bytes do not come back"
    assert rules.verdicts(tiny_config(), dict(P4=("PASS", ""), P5=("PASS", ""), P10=found))["R4"] == found


@kind(17, "a sidecar that claims more bytes than the text has, or belongs to other tokens", "P4, length check, manifest (sha256)")
def test_v17_inflated_sidecar(findings, tmp_path):
    assert findings(end=dict(bytes=10**6))[1]["R4"][0] == "FAIL"
    folder = write_dataset(tmp_path / "data", manifest=False)
    counts = tg.read_shard(folder / "fineweb_val_bytes_000000.bin")
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.array(counts[:-3]))
    cfg = tiny_config(data_path=str(folder))
    with pytest.raises(tg.RunError, match="byte sidecar holds"):
        tg.ValData.load(cfg, tg.Dataset.open(cfg, need_train=False))


@kind(18, "a smear gate that reaches across documents of a packed row", "P3")
def test_v18_smear_across_documents(random_model):
    cfg = tiny_config(ttt_enabled=False, smear_gate_bos_fix=False)
    found = look(cfg, random_model(cfg), rounds=3)
    assert found["P3"][0] == "FAIL" and found["P1"][0] == "PASS"


@kind(19, "a compile warm-up that learns from validation tokens", "P6 (hash of the state), scorer (optimizer guard)")
def test_v19_warm_up_that_learns(random_model, findings, tmp_path):
    model, path = random_model(tiny_config()), tmp_path / "ledger.jsonl"
    run = SimpleNamespace(ledger=tg.Ledger(path))

    def verdict() -> str:
        """On the last warm-up."""
        line = lines_of(path)[-1]
        return findings(warm_ups=[(line["before"], line["after"])])[1]["R8"][0]

    with tg.Run.unchanged(run, model.state_dict):
        pass
    assert verdict() == "PASS"
    with tg.Run.unchanged(run, model.state_dict):
        torch.rand(1)
    assert verdict() == "FAIL"
    with tg.Run.unchanged(run, model.state_dict), torch.no_grad():
        model.smear_lambda += 1e-6
    assert verdict() == "FAIL"
    assert [line["kind"] for line in lines_of(path)] == ["warmup"] * 3
    assert findings(warm_ups=())[1]["R8"][0] == "NOT-MEASURED"


@kind(20, "calibration outside the clock, or training data read while scoring", "P7, P11 (a training shard that is opened raises)")
def test_v20_calibration_outside_the_clock(findings, dataset):
    assert findings(end=dict(calib_seconds=11.0))[1]["R2"][0] == "FAIL"
    with pytest.raises(tg.RunError, match="no training shard"):
        tg.TrainLoader((), 16, 1, 64).next_step()
    with pytest.raises(tg.RunError, match="no training shard"):
        tg.calibration_windows((), 16, 1)
    train = dataset / "fineweb_train_000000.bin"
    for read in (tg.read_shard, Path.read_bytes, lambda path: os.close(os.open(os.fsencode(path), os.O_RDONLY))):
        with pytest.raises(tg.RunError, match="training data was about to be read"), tg.access_log() as log:
            tg.read_shard(dataset / "fineweb_val_000000.bin")
            read(train)
    seen = log.unexpected(dataset, [dataset / "fineweb_val_000000.bin"])
    assert seen == [("open", str(train))]
    assert findings(seen=seen)[1]["R9"] == ("FAIL", f"unexpected among the files, sockets and programs: open {train}")


@kind(21, "training that runs over its budget", "P7, R2")
def test_v21_training_too_long(findings):
    assert findings(end=dict(train_seconds=596.03, calib_seconds=4.1))[1]["R2"][0] == "FAIL"
    assert findings(end=dict(train_seconds=595.8, calib_seconds=4.1))[1]["R2"][0] == "PASS"
    assert findings(cfg=dict(max_wallclock_seconds=0.0))[1]["R2"][0] == "NOT-MEASURED"


@kind(22, "an evaluation that runs over its budget", "P7, stop before the batch that would")
def test_v22_evaluation_too_long(findings, random_model):
    assert findings(end=dict(eval_seconds=639.9))[1]["R2"][0] == "FAIL"
    cfg = tiny_config(max_eval_seconds=1e-6)
    with pytest.raises(tg.RunError, match="MAX_EVAL_SECONDS"):
        scorer = door_of()
        engine = tg.TttEngine(cfg, CPU, random_model(cfg).requires_grad_(False), scorer)
        tg.TttRun(cfg, engine, scorer, lambda line: None).run()


@kind(23, "an artifact over the cap", "R1 (sizes of files); record.py")
def test_v23_over_the_cap(findings):
    verdict = findings(artifact=dict(bytes=15_900_002))[1]["R1"]
    assert verdict == ("FAIL", "16,000,001 of 16,000,000 bytes, packed by brotli")


@kind(24, "code or weights that the counted files do not hold", "P11; clean room of tools/audit.py")
def test_v24_undeclared_files(tmp_path, monkeypatch, findings):
    monkeypatch.setattr(tg.tempfile, "gettempdir", lambda: "/nowhere")
    (tmp_path / "weights.bin").write_bytes(b"12")
    with tg.access_log() as log:
        (tmp_path / "weights.bin").read_bytes()
        Path(tg.torch.__file__).read_bytes()
        subprocess.run([sys.executable, "-c", ""], check=True)
        subprocess.run(["true"], check=True)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.settimeout(0.01)
            s.connect(("192.0.2.1", 80))
    seen = log.unexpected(tmp_path / "data", [])
    assert [event for event, _ in seen] == ["open", "subprocess.Popen", "subprocess.Popen", "socket.connect"]
    weights, python, program, host = (name for _, name in seen)
    assert weights.endswith("weights.bin") and program.endswith("true") and host == "192.0.2.1"
    assert [probes.expected(*entry) for entry in seen] == [False, True, False, False], python
    assert findings(seen=seen[1:2])[1]["R9"][0] == "PASS" and findings(seen=seen)[1]["R9"][0] == "FAIL"
    assert probes.expected("socket.connect", "127.0.0.1") and probes.expected("socket.connect", "/run/nscd/socket")
    log.seen = []
    (tmp_path / "weights.bin").read_bytes()
    assert not log.seen, "off, it does not listen"


@kind(25, "a seed that was not declared; seeds of several configurations in one mean", "P12; record.py")
def test_v25_seeds(findings):
    assert findings(start=dict(seed=7))[1]["R10"][0] == "FAIL"
    assert findings(start=dict(seeds_declared=""))[1]["R10"][0] == "NOT-MEASURED"
    shared = dict.fromkeys(record.SHARED, "x") | dict(data={})
    runs = [SimpleNamespace(result=shared | dict(seed=s, config_hash=h)) for s, h in ((1, "a"), (2, "a"), (3, "b"))]
    record.check_same_experiment(runs[:2])
    with pytest.raises(record.Broken, match="differ in config_hash"):
        record.check_same_experiment(runs)


@kind(26, "CaseOps data run as plain data", "manifest (transform)")
def test_v26_other_data_than_declared(dataset):
    with pytest.raises(tg.RunError, match="made with transform 'caseops', but CASEOPS_ENABLED=0"):
        tg.Dataset.open(tiny_config(data_path=str(dataset), caseops_enabled=False), need_train=False)


@kind(27, "training on the validation documents", "manifest (document ranges), P9, R3")
def test_v27_trained_on_validation(dataset):
    val = tg.read_shard(dataset / "fineweb_val_000000.bin")
    found = probes.probe_overlap(tg, (dataset / "fineweb_val_000000.bin",), val, math.inf)
    assert found["P9"][0] == "FAIL" and found["P9"][1].startswith("15 of 15 documents")


@kind(28, "a proxy of correctness in place of a probability", "P2")
def test_v28_proxy_score(random_model):
    def proxy(forward):
        table = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

        def score(inputs, targets, **kw):
            state = table[kw["positions"] % 64] if "positions" in kw else table[inputs]
            state = state if targets.ndim == 2 else state[..., None, :]
            return -torch.log(torch.sigmoid((state * table[targets]).sum(-1)))

        return score

    cfg = tiny_config(ttt_enabled=False)
    assert look(cfg, random_model(cfg), wrap=proxy)["P2"][0] == "FAIL"


def test_all_28_kinds_are_planted_and_listed():
    assert sorted(KINDS, key=lambda k: int(k[1:])) == [f"V{n}" for n in range(1, 29)]
    rows = ["| kind | planted | caught by | test |", "|---|---|---|---|"]
    rows += [f"| {k} | {planted} | {by} | `{test}` |" for k, (planted, by, test) in sorted(KINDS.items(), key=lambda i: int(i[0][1:]))]
    assert "\n".join(rows) in (ROOT / "tools/validity.md").read_text(), "\n" + "\n".join(rows)


# ---------------------------------------------------------------------------------------------------- clean runs


@pytest.mark.parametrize("changes", [{}, dict(ttt_enabled=False), dict(ttt_enabled=False, eval_method="sliding", eval_stride=64)])
def test_clean_runs_over_20_seeds_raise_nothing(changes, random_model):
    for seed in range(20):
        cfg = tiny_config(seed=seed, **changes)
        found = look(cfg, random_model(cfg, seed), seed=seed)
        expected = "PASS" if cfg.eval_method == "packed" else "NOT-MEASURED"
        assert found["P1"][0] == found["P2"][0] == "PASS" and found["P3"][0] == expected, (seed, found)


def test_a_probe_that_cannot_repeat_itself_says_so(random_model):
    noise = torch.Generator().manual_seed(0)

    def shaky(forward):
        def score(*args, **kw):
            nats = forward(*args, **kw)
            return nats + 1e-6 * torch.randn(nats.shape, generator=noise)

        return score

    found = look(tiny_config(ttt_enabled=False), random_model(tiny_config()), wrap=shaky)
    assert {v for v, _ in found.values()} == {"NOT-MEASURED"} and "scoring the same text twice" in found["P1"][1]


def test_verdicts_are_the_gravest_finding():
    cfg = tiny_config()
    several = [("PASS", "a"), ("NOT-MEASURED", "b"), ("NOT-MEASURED", "c")]
    assert rules.worst(several) == ("NOT-MEASURED", "b; c") and rules.worst([]) == ("NOT-MEASURED", "")
    assert rules.worst(several, all_evidence=True) == ("NOT-MEASURED", "b; c; a")
    assert rules.finding(True, "x") == ("PASS", "x") and rules.finding(False, "x", measurable=False) == ("NOT-MEASURED", "x")
    assert rules.verdicts(cfg, {})["R5"] == ("NOT-MEASURED", "no part of this stage")
    fine = dict(P4=("PASS", ""), P5=("PASS", ""), P10=("PASS", ""))
    assert rules.verdicts(cfg, fine)["R4"][0] == "PASS"
    assert rules.verdicts(dataclasses.replace(cfg, caseops_enabled=False), fine)["R4"][0] == "NEEDS-RULING"
    assert rules.verdicts(cfg, fine | dict(P5=("FAIL", "x")))["R4"] == ("FAIL", "x")


# ---------------------------------------------------------------------------------------------------- scorer and ledger


def test_the_door_releases_what_was_scored():
    scorer = door_of()
    with pytest.raises(tg.RunError, match="before it was scored"):
        scorer.targets_to_learn(np.arange(4))
    scorer.score(np.array([[0, 1, 2, -1]]), flat())
    assert scorer.targets_to_learn(np.array([[-1, 2]])).tolist() == [[tg.BOS_ID, int(some().tokens[3])]]
    with pytest.raises(tg.RunError, match="before it was scored"):
        scorer.targets_to_learn(np.arange(4))
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with scorer.only_released_steps():
        optimizer.step()  # one release, one step
        with pytest.raises(tg.RunError, match="released"):
            optimizer.step()
        scorer.targets_to_learn(np.arange(3), "base")
        for _ in range(5):
            optimizer.step()
        scorer.score(np.array([[5]]), flat())
        with pytest.raises(tg.RunError, match="released"):
            optimizer.step()
        scorer.targets_to_learn(np.array([7]), early=True)
        optimizer.step()
    optimizer.step()
    assert weight.item() == -8
    scorer.receipt()
    assert [early for what, early, _ in scorer.receipts if what == "adapters"] == [False, True]


def test_the_door_shows_prefixes_of_what_is_scored_next():
    scorer, tokens = door_of(), some().tokens
    assert scorer.inputs_for(3, np.array([-1, 5, 8])).tolist() == tokens[3:9].tolist()  # token 9 is the last target itself
    assert scorer.inputs_for(3, np.array([-1])).size == 0
    with pytest.raises(tg.RunError, match="before target 8 was read, and others are scored"):
        scorer.score(np.array([[5, 6, 7]]), flat())  # with a look at token 8, the target 7
    for start in (3, 6):  # several rows for one call
        scorer.inputs_for(start, np.arange(start, start + 3))
    scorer.score(np.arange(3, 9)[None], flat())
    scorer.score(np.arange(20, 25)[None], flat())  # nothing is due any more


@pytest.mark.parametrize("ahead", [1, 2, 40])
def test_the_door_finds_hints_that_look_ahead(ahead):
    scorer, tokens = door_of(), some().tokens
    order = np.arange(len(tokens) - 1)
    with pytest.raises(tg.RunError, match="depends on its target"):
        scorer.set_hints(order, lambda tokens, order: np.roll(tokens, -ahead)[:-1].astype(np.int32), 1.0)
    scorer.set_hints(order, lambda tokens, order: tokens[:-1].astype(np.int32), 1.0)
    assert np.array_equal(scorer.hints, tokens[:-1])


def test_receipts_and_ledger(tmp_path):
    ledger = tg.Ledger(tmp_path / "ledger.jsonl")
    scorer = door_of(name="ttt", ledger=ledger)
    scorer.score(np.array([[3, 4, 5, -1], [10, 11, -1, -1]]), flat(0.5))
    scorer.targets_to_learn(np.array([3, 4, 10]))
    scorer.receipt()
    scorer.score(np.r_[0:3, 6:10, 12 : scorer.total][None], flat(2.0))
    scorer.targets_to_learn(np.array([20]), early=True)
    scorer.sync()
    scorer.targets_to_learn(np.array([-1, 3, 4, 5, 6]), "base")
    score = scorer.finish()
    assert score.loss == (0.5 * 5 + 2.0 * (scorer.total - 5)) / scorer.total
    score_a, update_a, score_b, early, base, tokens = lines_of(ledger.path)
    size = scorer._data.target_bytes
    assert (score_a["ranges"], score_a["nats"]) == ([[3, 6], [10, 12]], [1.5, 1.0])
    assert score_a["bytes"] == [size[3:6].sum(), size[10:12].sum()] and score_a["pass"] == "ttt"
    assert (update_a["ranges"], update_a["what"], update_a["early"]) == ([[3, 5], [10, 11]], "adapters", False)
    assert score_b["ranges"] == [[0, 3], [6, 10], [12, scorer.total]]
    assert (early["ranges"], early["early"]) == ([[20, 21]], False), "it had been scored"
    assert (base["ranges"], base["what"]) == ([[3, 7]], "base")
    nats = np.load(tmp_path / tokens["file"])
    assert tokens["sha256"] == tg.sha256_file(tmp_path / "token_nats_ttt.npy") and nats.dtype == np.float32
    assert sum(score_a["nats"] + score_b["nats"]) == pytest.approx(nats.sum(dtype=float)) and nats[[2, 3]].tolist() == [2.0, 0.5]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 12), st.integers(1, 5))
def test_receipts_give_the_score_whatever_the_order(seed, calls, receipts):
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        scorer = door_of(some(3), ledger=tg.Ledger(Path(folder) / "ledger.jsonl"))
        nats = rng.exponential(size=scorer.total).astype(np.float32)
        for part in np.array_split(rng.permutation(scorer.total), calls):
            at = np.append(part, np.full(rng.integers(0, 4), -1))[None]
            scorer.score(at, lambda targets, at=at: torch.from_numpy(nats[at]))
            if len(part):
                scorer.targets_to_learn(rng.choice(part, min(len(part), 3), replace=False))
            if rng.integers(0, receipts) == 0:
                scorer.receipt()
        score = scorer.finish()
        replay(lines_of(scorer.ledger.path), scorer._data, score)
        assert score.loss == pytest.approx(nats.astype(float).mean(), rel=1e-12)
        assert np.array_equal(np.load(Path(folder) / "token_nats_ttt.npy"), nats)


def test_a_ledger_goes_on_and_an_edit_shows(tmp_path):
    path = tmp_path / "ledger.jsonl"
    tg.Ledger(path).add("start", dict(seed=1))
    again = tg.Ledger(path)
    again.add("score", dict(nats=[0.1]))
    again.add("end", {})
    assert [line["n"] for line in lines_of(path)] == [0, 1, 2]
    text = path.read_text()
    for old, new in (("0.1", "0.2"), ('"seed":1', '"seed":2'), (text.splitlines()[1] + "\n", "")):
        path.write_text(text.replace(old, new))
        with pytest.raises(AssertionError):
            lines_of(path)
    path.write_text(text[:-9])
    with pytest.raises(tg.RunError, match="does not end with a whole ledger line"):
        tg.Ledger(path)
    tg.Ledger(None).add("nothing", {})


def rank_main(rank: int, port: int, cfg: tg.Config, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = tg.World(rank, 2, torch.device("cpu"), torch.float32)
    model = tg.build_model(cfg, world, tg.choose_kernels(cfg, world)).requires_grad_(False).eval()
    scorer = tg.Scorer(some(14), world, "ttt", tg.Ledger(Path(folder) / "ledger.jsonl" if rank == 0 else None))
    score = tg.TttRun(cfg, tg.TttEngine(cfg, world, model, scorer), scorer, lambda line: None).run()
    twice = tg.Scorer(some(4), world, "twice", tg.Ledger(None))
    twice.score(np.arange(5)[None] + 3 * rank, flat())
    try:
        twice.sync()
        message = ""
    except tg.RunError as e:
        message = str(e)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps([score, message]))
    world.close()


def test_two_ranks_keep_one_ledger(tmp_path):
    cfg = tiny_config(ttt_lanes=3)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, args=(port, cfg, str(tmp_path)), nprocs=2)
    (score, message), other = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert (score, message) == tuple(other) and "two ranks scored the same targets" in message
    data, lines = some(14), lines_of(tmp_path / "ledger.jsonl")
    replay(lines, data, score)
    assert {line["what"] for line in lines if line["kind"] == "update"} == {"adapters", "base"}


def replay(lines: list[dict], data: tg.ValData, score) -> None:
    """The receipts alone give the score, in an order in which nothing is learned from before it was scored."""
    scored, nats, size = np.zeros(len(data.target_bytes), bool), 0.0, 0
    for line in (line for line in lines if line.get("pass") == "ttt"):
        at = np.concatenate([np.arange(a, b) for a, b in line.get("ranges", [])] or [[]]).astype(int)
        if line["kind"] == "score":
            assert not scored[at].any()
            scored[at] = True
            nats, size = nats + math.fsum(line["nats"]), size + sum(line["bytes"])
            assert line["bytes"] == [data.target_bytes[a:b].sum() for a, b in line["ranges"]]
        elif line["kind"] == "update":
            assert scored[at].all() and not line["early"]
    assert scored.all()
    assert nats / math.log(2) / size == pytest.approx(score[1], abs=1e-9) and size == score[3]


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run_main(dataset, tmp_path_factory):
    """main() in this process, once: (folder, result, console)."""

    def run(out, **changes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train_gpt.py"])
            for name, value in tiny_env(data_path=dataset, artifact_dir=out, iterations=2, **(
                    dict(seeds_declared="5,6", seed=5) | changes)).items():
                patch.setenv(name, value)
            assert tg.main() == 0
        return json.loads((out / "result.json").read_text())

    return run


def test_a_whole_run(run_main, tmp_path, dataset, capsys):
    result = run_main(tmp_path)
    console = capsys.readouterr().out
    assert f"\njudge this run: python tools/audit.py run {tmp_path}\n" in console
    run_lines = lines_of(tmp_path / "ledger.jsonl")
    by_kind = {k: [line for line in run_lines if line["kind"] == k] for k in dict.fromkeys(line["kind"] for line in run_lines)}
    (start,), (end,), (access,) = by_kind["start"], by_kind["end"], by_kind["access"]
    assert run_lines[0] is start and run_lines[-1] is end and access["seen"] == []
    assert result["ledger"] == dict(lines=len(run_lines), last_hash=end["hash"])
    assert not {"probe", "verdicts"} & by_kind.keys(), "the run does not judge itself"
    assert start["shards"] == {p.name: tg.sha256_file(p) for p in dataset.glob("*.bin")}
    assert (start["seed"], start["seeds_declared"], start["val_tokens"]) == (5, "5,6", 1711)
    cfg = tiny_config(data_path=str(dataset))
    val = tg.ValData.load(cfg, tg.Dataset.open(cfg, need_train=False))
    replay(run_lines, val, [result["val_loss"], result["val_bpb"], 1711, end["bytes"]])
    assert [w["when"] for w in by_kind["weights"]] == ["loaded", "first_score"] and len({w["sha256"] for w in by_kind["weights"]}) == 1
    assert [t["pass"] for t in by_kind["tokens"]] == ["pre_quant", "quantized", "ttt"]
    assert (end["val_bpb"], end["tokens"], end["pass"]) == (result["val_bpb"], 1711, "ttt")
    assert all(end[name] == result[name] for name in ("train_seconds", "calib_seconds", "eval_seconds", "train_budget_seconds"))
    assert by_kind["artifact"][0]["sha256"] == result["artifact_sha256"]
    assert sum(p["seconds"] for p in by_kind["phase"]) == pytest.approx(result["wall_seconds"], abs=0.01)  # rounded to ms, by phase


def test_a_whole_run_is_judged(run_main, tmp_path, dataset, capsys):
    result = run_main(tmp_path)
    capsys.readouterr()
    assert audit.main(["run", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    kept = json.loads((tmp_path / "audit.json").read_text())
    verdicts = kept["verdicts"]
    assert {rule: v for rule, (v, _) in verdicts.items()} == dict.fromkeys(rules.RULES, "PASS") | dict.fromkeys(
        ("R2", "R4", "R12"), "NOT-MEASURED")  # no budget, no text, no clean room
    assert shown.out.splitlines() == [f"{rule:<4}{verdict:<14}{evidence}" for rule, (verdict, evidence) in verdicts.items()]
    assert "apart from the evaluation's clock" in shown.err and "judged before" not in shown.err
    assert set(kept["findings"]) == {*(f"P{n}" for n in range(1, 13)), "bytes", "order", "sum"}
    assert kept["findings"]["P4"] == ["PASS", "1711 of 1711 targets, 3361 of 3361 bytes"]
    assert (kept["mode"], kept["lines"], kept["last_hash"]) == ("sample", *result["ledger"].values())
    assert audit.main(["run", str(tmp_path)]) == 0 and "judged before" in capsys.readouterr().err

    again = run_main(tmp_path, stage="eval")
    assert again["val_bpb"] == result["val_bpb"]
    assert [line["kind"] for line in lines_of(tmp_path / "ledger.jsonl")].count("start") == 2
    assert probes.stored_audit(tmp_path) is None, "it was of another run"
    cheat(run_main, tmp_path, dataset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "compile_forward", dishonest(tg.compile_forward, dataset))
        cheated = probes.judge(tmp_path)
    assert {rule for rule, (v, _) in cheated["verdicts"].items() if v == "FAIL"} == {"R5", "R7", "R9", "R10"}
    assert str(dataset / "weights.txt") in cheated["verdicts"]["R9"][1]


def test_who_cannot_be_judged(run_main, tmp_path):
    """No script of a stranger is imported, and what contradicts itself is no run."""
    run_main(tmp_path, ttt_enabled=False)
    stranger = tmp_path / "train_gpt.py"
    stranger.write_text("raise SystemExit('imported')")
    with pytest.raises(rules.Broken, match="none of .*train_gpt.py is the script that ran .* a stranger's is only run in the clean room"):
        probes.judge(tmp_path, stranger)
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(result | dict(ledger=dict(lines=1, last_hash="0"))))
    with pytest.raises(rules.Broken, match="does not keep the head of the ledger"):
        probes.judge(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(result))
    other = write_dataset(tmp_path / "other", val_docs=9)
    with pytest.raises(rules.Broken, match=r"fineweb_val_000000\.bin in .* is not what the run scored"):
        probes.judge(tmp_path, data=other)


def test_no_training_shard_is_opened_when_a_run_is_replayed(run_main, tmp_path, dataset):
    run_main(tmp_path, ttt_enabled=False)
    real = tg.packed_batches

    def peeking(*args):
        tg.read_shard(dataset / "fineweb_train_000000.bin")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tg.METHODS, "packed", tg.METHODS["packed"]._replace(batches=peeking))
        with pytest.raises(tg.RunError, match="training data was about to be read in an evaluation"):
            probes.judge(tmp_path)


def test_every_rule_is_documented():
    documented = (ROOT / "tools/validity.md").read_text()
    assert all(f"| {name} | {rule.asks} | " in documented for name, rule in rules.RULES.items())


def dishonest(real, dataset):
    """Other weights than the artifact's, a file from beside the data, no probabilities."""
    (dataset / "weights.txt").touch()

    def compile_forward(model, *args, **kw):
        (dataset / "weights.txt").read_text()
        with torch.no_grad():
            model.smear_lambda += 0.01
        return ngram_key(real(model, *args, **kw))

    return compile_forward


def cheat(run_main, folder, dataset) -> dict:
    """The same evaluation by a dishonest script, with a lucky seed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "compile_forward", dishonest(tg.compile_forward, dataset))
        return run_main(folder, stage="eval", seed=7)
