"""Files of a checkpoint that are damaged, nested, or of another kind than their names say: one line with the fix."""

import json
import shutil

import factories
import numpy as np
import pytest
import safetensors.numpy
from messages import one_line

import esd_jax
from esd_jax import api
from esd_jax.io import safetensors as files
from esd_jax.io.corrections import Corrected
from esd_jax.models.architectures import clip_bpe
from esd_jax.text import Tokenizer

DEEP = "[" * 9000 + "]" * 9000


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    factories.make_sd1(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "base")


def edited(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


# What is done to a tokenizer's folder -> what the message says.
TOKENIZERS = {
    "a mark before vocab.json": (
        lambda f: (f / "vocab.json").write_bytes(b"\xef\xbb\xbf" + (f / "vocab.json").read_bytes()),
        ["vocab.json", "byte order mark"],
    ),
    "vocab.json nested": (lambda f: (f / "vocab.json").write_text(DEEP), ["vocab.json", "again"]),
    "tokenizer.json nested": (lambda f: (f / "tokenizer.json").write_text(DEEP), ["tokenizer.json", "again"]),
    "its config nested": (lambda f: (f / "tokenizer_config.json").write_text(DEEP), ["tokenizer_config.json", "again"]),
    "vocab.json cut short": (
        lambda f: (f / "vocab.json").write_bytes((f / "vocab.json").read_bytes()[:999]),
        ["vocab.json", "again"],
    ),
    "vocab.json a list": (lambda f: (f / "vocab.json").write_text("[]"), ["vocab.json", "again"]),
    "vocab.json empty": (lambda f: (f / "vocab.json").write_text("{}"), ["tokenizer", "vocab.json", "again"]),
    "one number twice": (lambda f: edited(f / "vocab.json", lambda v: {**v, "a": v["b"]}), ["vocab.json", "number"]),
    "no merges.txt": (lambda f: (f / "merges.txt").unlink(), ["vocab.json and merges.txt", "tokenizer.json"]),
    "merges.txt empty": (lambda f: (f / "merges.txt").write_text(""), ["merges.txt", "'the</w>'", "again"]),
    "merges.txt cut short": (
        lambda f: (f / "merges.txt").write_text("\n".join((f / "merges.txt").read_text().splitlines()[:10])),
        ["merges.txt", "again"],
    ),
    "merges.txt of bytes": (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"), ["merges.txt", "UTF-8"]),
    "tokenizer.json of nothing": (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer", "again"]),
    "no length": (
        lambda f: edited(f / "tokenizer_config.json", lambda c: {**c, "model_max_length": 1}),
        ["tokenizer", "model_max_length is 1"],
    ),
    "a length of letters": (
        lambda f: edited(f / "tokenizer_config.json", lambda c: {**c, "model_max_length": "x"}),
        ["tokenizer", "again"],
    ),
    "a token of another type": (
        lambda f: edited(f / "special_tokens_map.json", lambda c: {**c, "pad_token": [1]}),
        ["tokenizer", "pad_token", "again"],
    ),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_tokenizer_that_is_damaged(folder, damage):
    change, words = TOKENIZERS[damage]
    change(folder / "tokenizer")
    with pytest.raises((ValueError, FileNotFoundError), match=one_line(*words)):
        esd_jax.load(folder)


def test_a_tokenizer_of_another_checkpoint(folder):
    """JAX would clamp the number, or read NaN."""
    edited(folder / "tokenizer" / "vocab.json", lambda vocab: {word: i + 10_000 for word, i in vocab.items()})
    with pytest.raises(ValueError, match=one_line("'a cat'", "text_encoder knows", "again")):
        esd_jax.load(folder).encode_prompts(["a cat"])


def test_clips_own_tokenizer_is_whole(tmp_path):
    clip_bpe.write_files(tmp_path, "!")
    assert Tokenizer.from_folder(tmp_path, 77).words("a cat") == [320, 2368]


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("depth", [9000, 300])
def test_configs_that_are_nested(folder, name, depth):
    """Of the lesser depth, it is what reads the parsed value that would fail."""
    edited(folder / name, lambda config: {**config, "trained_betas": None})
    text = (folder / name).read_text()
    (folder / name).write_text(text[:-1] + ', "block_out_channels": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ValueError, match=one_line(name, "again")):
        esd_jax.load(folder)


@pytest.mark.parametrize("depth", [9000, 150])
def test_headers_that_are_nested(tmp_path, depth):
    """The library that checks a file passes over what it does not know."""
    extra = '"extra": ' + "[" * depth + "]" * depth
    header = ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], ' + extra + "}}").encode()
    (file := tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match=one_line("x.safetensors", "again")):
        files.read_header(file)


def test_records_that_are_nested(sound, tmp_path):
    base = esd_jax.load(sound)
    tensors = {"conv_in.bias": np.asarray(base.params["unet"]["conv_in.bias"])}
    safetensors.numpy.save_file(tensors, tmp_path / "d.safetensors", {"esd_jax": DEEP})
    with pytest.raises(ValueError, match=one_line("d.safetensors", "'esd_jax'", "again")):
        api.opened(base, tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"PK\x03\x04" + b"\0" * 50, ["a pickle", "never opened", "convert"]),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", ["pickle", "convert"]),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", ["pickle", "convert"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", ["Git LFS", "git lfs pull"]),
        (b"<!DOCTYPE html><html>not found</html>", ["web page", "download"]),
        (b"GGUF\x03\0\0\0" + b"\0" * 50, ["GGUF"]),
        ((640).to_bytes(8, "little") + b'{"a"' + b" " * 100, ["damaged or incomplete"]),  # begins as a pickle does
    ],
)
def test_files_of_another_kind_than_their_name_says(tmp_path, start, words):
    (file := tmp_path / "x.safetensors").write_bytes(start)
    for read in (lambda: files.read_header(file), lambda: esd_jax.load(file)):
        with pytest.raises(ValueError, match=one_line("x.safetensors", *words)):
            read()


def test_a_scheduler_field_of_another_type(folder):
    for value, words in (
        (0, "final_sigmas_type=0 must be a text such as 'zero'"),
        ("one", "unknown final_sigmas_type 'one'"),
    ):
        edited(
            folder / "scheduler" / "scheduler_config.json",
            lambda c, value=value: {**c, "_class_name": "EulerDiscreteScheduler", "final_sigmas_type": value},
        )
        with pytest.warns(Corrected, match="PNDMScheduler is taken"):
            pipeline = esd_jax.load(folder)
        with pytest.raises(ValueError, match=one_line(words, "write", "'zero'")):
            esd_jax.sample(pipeline, ["a cat"], sampler="euler", steps=2)
