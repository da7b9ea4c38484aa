"""Hub ids: a cache laid out as the hub lays it out, no network, and a server that answers as the hub does."""

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import factories
import pytest

from esd_jax.io import diffusers as io
from esd_jax.io.corrections import Corrected
from esd_jax.io.hub import weight_patterns

# huggingface_hub reads its settings when it is imported, so each case is a process of its own.
RESOLVE = """
import sys
from esd_jax.io.hub import resolve
try:
    print(resolve(sys.argv[1], variant=sys.argv[2] or None, revision=sys.argv[3] or None))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def resolve(source: str, cache: Path, *, variant="", revision="", **environment) -> str:
    """What a fresh process prints: the folder, or the error."""
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-c", RESOLVE, source, variant, revision],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def put_in_cache(folder: Path, cache: Path, repo: str, *, commit="0" * 40) -> Path:
    """Lays a folder out as the hub's cache does: blobs named by hash, snapshots of links to them, refs to snapshots."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for path in folder.rglob("*"):
        if path.is_file():
            blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            link = root / "snapshots" / commit / path.relative_to(folder)
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return root / "snapshots" / commit


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder, cache = tmp_path_factory.mktemp("sd1"), tmp_path_factory.mktemp("cache")
    factories.make_sd1(folder)
    return folder, cache, put_in_cache(folder, cache, "org/tiny")


def test_a_cached_id_loads_offline_and_exports_real_files(cached, tmp_path, monkeypatch):
    folder, cache, snapshot = cached
    assert resolve("org/tiny", cache, HF_HUB_OFFLINE="1") == str(snapshot)
    assert resolve("org/tiny", cache, HF_HUB_OFFLINE="1", revision="0" * 40) == str(snapshot)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipeline = io.load("org/tiny")
    assert (pipeline.provenance.source, pipeline.provenance.folder) == ("org/tiny", snapshot)
    edits = io.read_exact(pipeline, ["unet/conv_in.bias"])
    exported = io.export(pipeline.with_edits(edits), tmp_path / "out")
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert {p.relative_to(exported) for p in files} == {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert not any(path.is_symlink() for path in files)


def test_not_cached_and_offline(cached):
    message = resolve("org/other", cached[1], HF_HUB_OFFLINE="1")
    assert message.startswith("FileNotFoundError: 'org/other'") and message.count("\n") == 0
    assert "unset HF_HUB_OFFLINE" in message and "give a local diffusers folder" in message
    message = resolve("org/tiny", cached[1], HF_HUB_OFFLINE="1", revision="v2")
    assert message.startswith("FileNotFoundError: 'org/tiny' (revision 'v2')") and message.count("\n") == 0


def test_a_snapshot_without_a_file_that_is_not_needed(cached, tmp_path):
    """Recent hub libraries know what a snapshot should hold, and refuse one that another tool left incomplete."""
    snapshot = put_in_cache(cached[0], tmp_path, "org/tiny")
    files = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_symlink()]
    (snapshot.parents[1] / "trees").mkdir()
    tree = {name: {"size": 1, "blob_id": "0" * 40} for name in [*files, "LICENSE.md"]}
    (snapshot.parents[1] / "trees" / f"{'0' * 40}.json").write_text(json.dumps({"format_version": 1, "files": tree}))
    assert resolve("org/tiny", tmp_path, HF_HUB_OFFLINE="1") == str(snapshot)


def test_a_local_folder_comes_before_the_hub(cached, tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny", cached[1], HF_HUB_OFFLINE="1") == str(Path("org/tiny"))


class Hub(BaseHTTPRequestHandler):
    """Refuses every repository, each as the hub would."""

    asked: list[str] = []
    answers = {
        "org/absent": (404, "RepoNotFound"),
        "org/gated": (403, "GatedRepo"),
        "org/revision": (404, "RevisionNotFound"),
        "org/broken": (500, ""),
    }

    def do_GET(self):
        self.asked.append(self.path)
        status, code = next(answer for repo, answer in self.answers.items() if f"/{repo}" in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("repo", "revision", "kind", "words"),
    [
        ("org/absent", "", "FileNotFoundError", ["'org/absent'", "nor a model on the hub", "spelling"]),
        (
            "org/gated",
            "",
            "ValueError",
            ["licence", "https://huggingface.co/org/gated", "hf auth login"],
        ),
        ("org/revision", "v9", "FileNotFoundError", ["'org/revision' (revision 'v9')", "check the revision"]),
        ("org/broken", "", "FileNotFoundError", ["'org/broken'", "hub"]),
    ],
)
def test_what_the_hub_refuses(repo, revision, kind, words, endpoint, tmp_path):
    message = resolve(repo, tmp_path, revision=revision, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    assert any(repo in path for path in Hub.asked), "the server was not asked"
    assert message.startswith(kind + ":") and message.count("\n") == 0, message
    assert all(word in message for word in words), message


def test_no_network(tmp_path):
    message = resolve("org/name", tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert message.startswith("FileNotFoundError: 'org/name'") and message.count("\n") == 0, message
    assert "cannot be reached" in message


def test_patterns_name_no_pickle_and_one_variant():
    from fnmatch import fnmatch

    def wanted(name, variant=None):
        return any(fnmatch(f"unet/{name}", pattern) for pattern in weight_patterns(variant))

    stem = "diffusion_pytorch_model"
    plain = [f"{stem}.safetensors", f"{stem}-00001-of-00002.safetensors", f"{stem}.safetensors.index.json"]
    fp16 = [
        *(f"{stem}.fp16.safetensors", f"{stem}.fp16-00001-of-00002.safetensors"),
        *(f"{stem}-00001-of-00002.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", "model.fp16.safetensors"),
    ]
    assert all(wanted(name) and not wanted(name, "fp16") for name in plain)
    assert all(wanted(name, "fp16") and not wanted(name) for name in fp16)
    assert not any(wanted(name) for name in (f"{stem}.bin", "pytorch_model.bin", "model.ckpt", "flax_model.msgpack"))


def test_a_variant_that_one_component_lacks_is_downloaded_without(tmp_path, monkeypatch):
    """As diffusers does: the plain weights of that component alone."""
    import huggingface_hub

    repo, local = tmp_path / "repo", tmp_path / "local"
    factories.make_sd1(repo)
    file = repo / "unet/diffusion_pytorch_model.safetensors"
    shutil.copyfile(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    asked = []

    def download(name, revision, allow_patterns):
        asked.append(allow_patterns)
        for path in repo.rglob("*"):
            if any(fnmatch.fnmatch(str(path.relative_to(repo)), pattern) for pattern in allow_patterns):
                (local / path.relative_to(repo)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, local / path.relative_to(repo))
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.warns(Corrected, match="no weights of variant 'fp16' of vae, text_encoder: the plain ones are read"):
        pipeline = io.load("org/tiny", variant="fp16")
    names = {str(source.path.relative_to(local)) for source in pipeline.provenance.tensors.values()}
    assert names == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert len(asked) == 2 and not any(pattern.startswith(("unet", "*")) for pattern in asked[1])
    asked.clear()
    shutil.rmtree(local)
    with pytest.raises(FileNotFoundError, match="holds no safetensors weights"):
        io.load("org/tiny", variant="bf16")
    assert len(asked) == 1  # gigabytes that nobody asked for
