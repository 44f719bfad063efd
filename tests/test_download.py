"""data/download.py against tiny exports: a local folder, and the real hub client talking to a hub on 127.0.0.1."""
import hashlib
import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

SPEC = importlib.util.spec_from_file_location("download", Path(__file__).parents[1] / "data" / "download.py")
download = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(download)

FOLDER, TOKENIZER = "datasets/datasets/toy", "datasets/tokenizers/toy.model"
TOY = download.Export("someone/toy", FOLDER, TOKENIZER, "datasets/mirror", f"datasets/mirror/{FOLDER}",
                      train_shards=3, min_shard_tokens=9, val_tokens=8, val_docs=2, val_bytes=21)
VAL, VAL_BYTES = [1, 300, 301, 1, 302, 303, 304, 305], [0, 3, 3, 0, 3, 4, 4, 4]
TRAIN = [[1, 300, 301, 302, 1, 400, 401, 402, 403], [404, 405, 1, 500, 501, 502, 503, 504, 505], [506, 1, 600]]


def write_shard(path: Path, tokens: list[int], magic: int = 20240520, version: int = 1, claimed: int | None = None) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if claimed is None else claimed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u2").tobytes())


@pytest.fixture
def repo(tmp_path):
    """A local copy of the toy repository, with files nobody asked for."""
    root = tmp_path / "repo"
    write_shard(root / FOLDER / "fineweb_val_000000.bin", VAL[:5])
    write_shard(root / FOLDER / "fineweb_val_000001.bin", VAL[5:])
    write_shard(root / FOLDER / "fineweb_val_bytes_000000.bin", VAL_BYTES[:5])
    write_shard(root / FOLDER / "fineweb_val_bytes_000001.bin", VAL_BYTES[5:])
    for i, tokens in enumerate(TRAIN):
        write_shard(root / FOLDER / f"fineweb_train_{i:06d}.bin", tokens)
    (root / TOKENIZER).parent.mkdir()
    (root / TOKENIZER).write_bytes(b"model")
    (root / "docs_selected.jsonl").write_text("45 GiB\n")
    return root


def run(out: Path, *args: str, export=TOY) -> int:
    return download.main(["toy", "--out", str(out), *args], exports={"toy": export})


def home(out: Path) -> Path:
    return out / TOY.home


def names(out: Path) -> set[str]:
    return {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and ".cache" not in p.parts}


def test_folder_source_fetches_what_was_asked_and_nothing_else(repo, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(out, "--source", str(repo), "--train-shards", "2") == 0
    assert "8 validation tokens, 2 train shards with 18 tokens" in capsys.readouterr().out
    shards = [f"fineweb_{part}_{i:06d}.bin" for part in ("train", "val", "val_bytes") for i in range(2)]
    assert names(out) == {f"{TOY.home}/{shard}" for shard in shards} | {f"{TOY.place}/{TOKENIZER}"}
    assert run(out, "--source", str(repo)) == 0
    assert "3 train shards with 21 tokens" in capsys.readouterr().out
    assert run(out, "--verify-only") == 0


def test_published_exports_land_where_the_trainer_looks():
    caseops = download.EXPORTS["caseops"]
    assert f"{caseops.place}/{caseops.folder}" == caseops.home
    assert caseops.home == ("datasets/fineweb10B_sp8192_caseops/datasets/datasets/"
                            "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved")
    assert f"{caseops.place}/{caseops.tokenizer}" == (
        "datasets/fineweb10B_sp8192_caseops/datasets/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model")
    for name in ("sp1024", "sp8192"):
        assert download.EXPORTS[name].home == f"datasets/fineweb10B_{name}"


def test_another_layout_is_linked_to_the_trainers_place(repo, tmp_path):
    out = tmp_path / "data"
    export = TOY._replace(home="datasets/toy")
    assert run(out, "--source", str(repo), export=export) == 0
    assert (out / "datasets/toy/fineweb_val_000000.bin").is_file()
    assert not (out / "datasets/toy").readlink().is_absolute()


def test_interrupted_copy_goes_on_where_it_stopped(repo, tmp_path):
    out = tmp_path / "data"
    shard = "fineweb_train_000001.bin"
    whole = (repo / FOLDER / shard).read_bytes()
    home(out).mkdir(parents=True)
    # Bytes the source does not have: they survive only if the first 30 bytes are kept and not copied again.
    (home(out) / f"{shard}.incomplete").write_bytes(whole[:20] + b"0123456789")
    (home(out) / "fineweb_train_000002.bin").write_bytes(b"cut short under its final name")
    assert run(out, "--source", str(repo)) == 0
    assert (home(out) / shard).read_bytes() == whole[:20] + b"0123456789" + whole[30:]
    assert (home(out) / "fineweb_train_000002.bin").read_bytes() == (repo / FOLDER / "fineweb_train_000002.bin").read_bytes()
    assert not list(out.rglob("*.incomplete"))


def test_all_train_shards_are_expected_unless_fewer_are_asked_for(repo, tmp_path, capsys):
    (repo / FOLDER / "fineweb_train_000002.bin").unlink()
    assert run(tmp_path / "data", "--source", str(repo)) == 1
    assert "2 of 3 train shards" in capsys.readouterr().err
    assert run(tmp_path / "data", "--source", str(repo), "--train-shards", "2") == 0


def test_longer_leftover_than_the_source_is_not_used(repo, tmp_path):
    out = tmp_path / "data"
    home(out).mkdir(parents=True)
    (home(out) / "fineweb_train_000000.bin.incomplete").write_bytes(b"x" * 5000)
    assert run(out, "--source", str(repo)) == 0


DAMAGE = {  # what is wrong -> (file, how it is written, words of the message)
    "magic": ("fineweb_train_000000.bin", lambda p: write_shard(p, TRAIN[0], magic=7), ["magic 7", "magic 20240520", "delete"]),
    "version": ("fineweb_train_000000.bin", lambda p: write_shard(p, TRAIN[0], version=2), ["version 2", "version 1"]),
    "cut short": ("fineweb_train_000001.bin", lambda p: write_shard(p, TRAIN[1], claimed=10), ["1,042 bytes", "1,044 bytes"]),
    "too long": ("fineweb_train_000001.bin", lambda p: write_shard(p, TRAIN[1], claimed=8), ["1,042 bytes", "1,040 bytes"]),
    "no header": ("fineweb_train_000001.bin", lambda p: p.write_bytes(b"<html>"), ["6 bytes", "1,024"]),
    "small shard": ("fineweb_train_000000.bin", lambda p: write_shard(p, [1, 2, 3]), ["3 tokens", "at least 9", "validation"]),
    "missing shard": ("fineweb_train_000001.bin", Path.unlink, ["missing", "2 of 3"]),
    "short validation": ("fineweb_val_000001.bin", lambda p: write_shard(p, VAL[5:7]), ["7 validation tokens", "expected 8"]),
    "documents": ("fineweb_val_000001.bin", lambda p: write_shard(p, [1, 9, 9]), ["3 documents", "expected 2"]),
    "no sidecar": ("fineweb_val_bytes_000001.bin", Path.unlink, ["missing", "bits per byte"]),
    "short sidecar": ("fineweb_val_bytes_000001.bin", lambda p: write_shard(p, [4, 8]), ["2 byte counts", "3, one for each"]),
    "byte sum": ("fineweb_val_bytes_000001.bin", lambda p: write_shard(p, [4, 4, 5]), ["22 bytes", "expected 21"]),
    "overlap": ("fineweb_train_000000.bin", lambda p: write_shard(p, [9, *VAL[:3], 1, 7, 8, 9, 9]), ["at token 0", "disjoint"]),
    "no tokenizer": ("../../tokenizers/toy.model", Path.unlink, ["toy.model", "missing"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_found_expected_and_advice(damage, repo, tmp_path, capsys):
    out = tmp_path / "data"
    name, apply, words = DAMAGE[damage]
    assert run(out, "--source", str(repo)) == 0
    apply(home(out) / name)
    # "missing shard" removes the middle one: the last proves that there should be three.
    assert run(out, "--verify-only") == 1
    message = capsys.readouterr().err
    shown = name.rsplit("/", 1)[-1]
    assert any(part in message for part in (shown, "fineweb_val_*.bin", "fineweb_val_bytes_*.bin"))
    assert all(word in message for word in words), message
    assert "again" in message and "Traceback" not in message


def test_first_target_is_not_the_first_token(repo, tmp_path, capsys):
    """The byte count of the very first token is not part of the sum; that of every later shard's first token is."""
    out = tmp_path / "data"
    run(out, "--source", str(repo))
    write_shard(home(out) / "fineweb_val_bytes_000000.bin", [50, *VAL_BYTES[1:5]])
    assert run(out, "--verify-only") == 0
    write_shard(home(out) / "fineweb_val_bytes_000001.bin", [50, *VAL_BYTES[6:]])
    assert run(out, "--verify-only") == 1


def test_usage_and_unknown_sources(tmp_path, capsys):
    for bad in (["nonsense"], ["toy", "--train-shards", "-1"], []):
        with pytest.raises(SystemExit) as stop:
            download.main(bad, exports={"toy": TOY})
        assert stop.value.code == 2
    assert run(tmp_path, "--source", "no such folder") == 1
    assert "neither an existing folder nor a repository name" in capsys.readouterr().err
    assert run(tmp_path / "empty", "--verify-only") == 1
    assert "holds no fineweb_val_*.bin" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# The real client against a hub of our own
# --------------------------------------------------------------------------------------------------

class Hub(ThreadingHTTPServer):
    """As much of the hub as snapshot_download asks for: revision -> commit, tree of a commit, files with ranges."""
    daemon_threads = True
    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.root = root
        self.breaking, self.down = set(), set()  # files whose next transfer stops half-way; files that cannot be had
        self.served = []                         # (file, first byte) of each transfer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def tree(self) -> list[dict]:
        entries = []
        for path in sorted(p for p in self.root.rglob("*") if p.is_file()):
            body = path.read_bytes()
            digest = hashlib.sha256(body).hexdigest()
            entries.append({"type": "file", "path": path.relative_to(self.root).as_posix(), "size": len(body),
                            "oid": digest[:40], "lfs": {"oid": digest, "size": len(body), "pointerSize": 100}})
        return entries


class HubHandler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        api, files = "/api/datasets/someone/toy", f"/datasets/someone/toy/resolve/{hub.commit}/"
        if path.startswith(f"{api}/revision/"):
            body = {"_id": "0", "id": "someone/toy", "sha": hub.commit, "private": False, "tags": [],
                    "downloads": 0, "likes": 0, "siblings": [{"rfilename": entry["path"]} for entry in hub.tree()]}
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"{api}/tree/{hub.commit}"):
            self.answer(200, json.dumps(hub.tree()).encode(), {"Content-Type": "application/json"})
        elif path.startswith(files) and (hub.root / path.removeprefix(files)).is_file():
            self.send_file(path.removeprefix(files))
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send_file(self, name: str) -> None:
        body = (self.server.root / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": self.server.commit,
                   "Accept-Ranges": "bytes"}
        start, total, cut = 0, len(body), None
        if self.command == "GET" and name in self.server.down:
            return self.answer(500, b"", {})
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if self.command == "GET":
            self.server.served.append((name, start))
            if name in self.server.breaking:
                self.server.breaking.discard(name)
                cut, self.close_connection = total // 2, True
        self.answer(206 if start else 200, body[start:], headers, cut)


@pytest.fixture
def hub(repo, tmp_path, monkeypatch):
    server = Hub(repo)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    original = download.from_hub
    monkeypatch.setattr(download, "from_hub", lambda repo: original(repo, endpoint=server.url))
    yield server
    server.shutdown()
    server.server_close()


def test_hub_source(hub, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(out, "--train-shards", "1") == 0
    assert "1 train shards with 9 tokens" in capsys.readouterr().out
    assert "docs_selected.jsonl" not in {name.rsplit("/", 1)[-1] for name in names(out)}
    assert run(out) == 0
    assert {p.name for p in home(out).glob("*train*")} == {f"fineweb_train_{i:06d}.bin" for i in range(3)}
    for path in home(out).glob("*.bin"):
        assert path.read_bytes() == (hub.root / FOLDER / path.name).read_bytes()


def test_broken_hub_transfer_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    name, out = f"{FOLDER}/fineweb_train_000000.bin", tmp_path / "data"
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)  # what arrived is kept in whole chunks
    hub.breaking.add(name)
    assert run(out) == 0
    assert [start for served, start in hub.served if served == name] == [0, (hub.root / name).stat().st_size // 2 // 64 * 64]
    assert (out / TOY.place / name).read_bytes() == (hub.root / name).read_bytes()


def test_next_run_fetches_only_what_a_failed_run_lacks(hub, tmp_path, capsys):
    name, out = f"{FOLDER}/fineweb_val_000001.bin", tmp_path / "data"
    hub.down.add(name)
    assert run(out) == 1
    assert "could not fetch someone/toy" in capsys.readouterr().err
    here = names(out)
    assert f"{TOY.place}/{name}" not in here
    hub.down.clear()
    hub.served.clear()
    assert run(out) == 0
    assert {f"{TOY.place}/{served}" for served, _ in hub.served} == names(out) - here


def test_advice_to_delete_a_damaged_file_and_run_again_works(hub, tmp_path):
    out = tmp_path / "data"
    assert run(out) == 0
    shard = home(out) / "fineweb_train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:1030])
    assert run(out, "--verify-only") == 1
    shard.unlink()
    assert run(out) == 0


def test_hub_without_the_repo(hub, tmp_path, capsys):
    assert run(tmp_path / "data", "--source", "someone/else") == 1
    message = capsys.readouterr().err
    assert "could not fetch someone/else" in message and "--source" in message


def test_no_network(hub, tmp_path, capsys):
    hub.shutdown()
    hub.server_close()
    assert run(tmp_path / "data") == 1
    message = capsys.readouterr().err
    assert "could not fetch someone/toy" in message and "--source" in message and "Traceback" not in message
