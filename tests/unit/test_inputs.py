"""What a user names or hands over: paths, texts, numbers and JSON, each as it is meant, or refused in one line."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest
from messages import one_line
from paths import ROOT

from esd_jax import cli, inputs, several
from esd_jax.cli import streams
from esd_jax.evaluation.judges import weights


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home folder, as in many containers."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])


# Paths.


def test_home_folders(tmp_path, monkeypatch, homeless):
    monkeypatch.chdir(tmp_path)
    for path in ("~/x.png", "~nouser/x.png", "~$pic.png"):
        with pytest.raises(ValueError, match=one_line(path, "no home folder", f"./{path}")):
            inputs.expanded(path)
    (tmp_path / "~$pic.png").write_text("")
    assert inputs.expanded("~$pic.png") == Path("~$pic.png")
    monkeypatch.setenv("HOME", "/home/someone")
    assert inputs.expanded("~/x.png") == Path("/home/someone/x.png") and inputs.expanded("x~") == Path("x~")
    with pytest.raises(ValueError, match=one_line(r"'a\x00b'", "null")):
        inputs.expanded("a\0b")


def test_caches(tmp_path, monkeypatch, homeless):
    monkeypatch.chdir(tmp_path)
    for unset in ("", "relative", "~/.cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        with pytest.raises(ValueError, match=one_line("no home folder", "XDG_CACHE_HOME")):
            weights.cache()
        monkeypatch.setenv("HOME", "/home/someone")
        assert inputs.cache("xla") == Path("/home/someone/.cache/esd_jax/xla")
        monkeypatch.delenv("HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/a/cache")
    assert inputs.cache("xla") == Path("/a/cache/esd_jax/xla")


def test_without_a_home_there_is_no_compilation_cache(monkeypatch, homeless):
    before, folders = jax.config.jax_compilation_cache_dir, []
    record = lambda: folders.append(jax.config.jax_compilation_cache_dir)  # noqa: E731
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert cli.guarded(record) == 0
        monkeypatch.setenv("HOME", "/home/someone")
        assert cli.guarded(record) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert folders == [None, "/home/someone/.cache/esd_jax/xla"]


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--base=emoji", "--prompts=a cat", "--output=~nouser/x.png"],
        ["sample", "--base=~nouser/model", "--prompts=a cat", "--output=x.png"],
        ["sample", "--base=emoji", "--prompts=~nouser/p.txt", "--output=x.png"],
        ["export", "--base=emoji", "--merge=~nouser/l.safetensors", "--output=x"],
        ["report", "~nouser/run"],
        ["compare", "~nouser/a", "~nouser/b"],
        ["erase", "--config=~nouser/mine.py"],
        ["erase", "--config=emoji_uce", "--config.output_dir=~nouser/run"],
    ],
)
def test_a_home_that_nobody_has_ends_in_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("esd-jax: error: ") and err.count("\n") == 1 and "no home folder" in err
    assert list(tmp_path.iterdir()) == []


# Texts and numbers.


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800"])
def test_bytes_that_are_no_text(text):
    with pytest.raises(ValueError, match=one_line("a prompt", repr(text), "UTF-8")):
        inputs.check_text(text, "a prompt")
    with pytest.raises(ValueError, match=one_line("a prompt is None", "NoneType")):
        inputs.check_text(None, "a prompt")


def test_numbers():
    assert inputs.finite(" -1e3", "x") == -1000
    for text, words in (
        ("nan", "finite"),
        ("-inf", "finite"),
        ("1e999", "finite"),
        ("1_0", "no number"),
        ("", "no number"),
    ):
        with pytest.raises(ValueError, match=one_line(f"x={text}", words)):
            inputs.finite(text, "x")


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--prompts=a", "--output=x.png", "--guidance_scale=inf"],
        ["sample", "--prompts=a", "--output=x.png", "--eta=nan"],
        ["sample", "--prompts=a", "--output=x.png", "--reweight=a=nan"],
        ["sample", "--prompts=a", "--output=x.png", "--edit=a; scale=inf"],
        ["export", "--base=emoji", "--delta=x", "--output=y", "--strength=nan"],
        ["export", "--base=emoji", "--merge=x.safetensors*nan", "--output=y"],
        ["export", "--base=emoji", "--delta=x", "--output=y.safetensors", "--format=lora", "--energy=nan"],
        ["evaluate", "run", "--strengths=0.5,nan"],
        ["tune", "--config=emoji", "--grid=eta=1", "--output=x", "--target=nan"],
        ["tune", "--config=emoji", "--grid=eta=1", "--output=x", "--strengths=inf"],
        ["tune", "--config=emoji", "--grid=eta=1", "--output=x", "--steps=inf"],
        ["erase", "--config=emoji", "--config.eta=nan"],
        ["erase", "--config=emoji_uce", "--config.strength=nan", "--config.output_dir=x"],
    ],
    ids=" ".join,
)
def test_flags_that_are_no_finite_number(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "must be finite" in err, err
    assert list(tmp_path.iterdir()) == []


# JSON.


def test_json():
    assert inputs.parse_json(b'{"a": [1, NaN]}', "x")["a"][0] == 1
    deep = ["[" * 9000 + "]" * 9000, "[" * 900 + "]" * 900, '{"a":' * 101 + "1" + "}" * 101]
    for text in (*deep, "{", "", "\ufeff{}", "1" * 5000, b"\xff"):
        with pytest.raises(ValueError, match=one_line("x.json", "again")):
            inputs.parse_json(text, "x.json")
    assert inputs.parse_json("[" * 90 + "]" * 90, "x")


# Texts that were given apart.


def test_separators_within_texts_that_were_given_apart():
    assert several.joined("concept", ["cat", " dog "]) == "cat; dog"
    assert several.joined("concept", ["Tom; Jerry"]) == ("Tom; Jerry",)
    assert several.joined("concept", ["Rock &amp; Roll", "cat"]) == ("Rock &amp; Roll", "cat")
    assert several.joined("images", [" lead.png", Path("a.png")]) == (" lead.png", "a.png")
    assert several.joined("images", ["a.png", Path("b.png")]) == "a.png; b.png"
    assert several.joined("preserve", [["a", "b"], "c", []]) == "a | b; c; "
    assert several.joined("preserve", [["a | b"], ["c; d", "e"]]) == (("a | b",), ("c; d", "e"))
    assert several.joined("from_", [None, "a person"]) == "; a person"
    assert several.joined("strength", [1, 0.5]) == "1; 0.5"
    for name, items, words in (
        ("replace_with", ["a | b", "c"], ["'a | b'", "['a', 'b']"]),
        ("replace_with", [["a", None]], ["None"]),
        ("concept", [None], ["concept", "None"]),
        ("images", [3], ["images", "3"]),
    ):
        with pytest.raises(ValueError, match=one_line(*words)):
            several.joined(name, items)


def test_what_a_recipe_holds_is_parted_into_the_same():
    for name, items in (
        ("concept", ["Tom; Jerry", "cat"]), ("concept", ["cat", "dog"]), ("preserve", [["a|b", "c"], []]),
        ("preserve", [["a", "b"], ["c"]]), ("images", [" a.png", "b;c.png"]),
    ):  # fmt: skip
        held = several.joined(name, items)
        assert several.parts(name, held) == several.parts(name, json.loads(json.dumps(held))) or name == "preserve"
        assert [list(part) if isinstance(part, tuple) else part for part in several.parts(name, held)] == items


# Standard output.


def test_a_reader_who_leaves_ends_nothing(monkeypatch):
    reader, writer = os.pipe()
    stream = io.TextIOWrapper(io.FileIO(writer, "w"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    with streams.lasting():
        print("one", flush=True)
        assert os.read(reader, 9) == b"one\n"
        os.close(reader)
        print("two" * 100_000, flush=True)
        print("three")
    assert sys.stdout is stream


@pytest.mark.parametrize("module", ["esd_jax.cli", "launch.experiments.levers"])
def test_help_into_a_pipe_that_is_closed(module):
    reader, writer = os.pipe()
    os.close(reader)
    words = ["sample", "--help"] if module == "esd_jax.cli" else ["--help"]
    with os.fdopen(writer, "w") as out:
        done = subprocess.run([sys.executable, "-m", module, *words], stdout=out, stderr=subprocess.PIPE, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("value", [10**400, None, "1", float("nan"), float("inf")])
def test_numbers_that_are_none_or_too_large(value):
    with pytest.raises(ValueError, match="^strength=.* must be finite"):
        inputs.check_finite(strength=value)


def test_an_unbuffered_line_is_there_at_once():
    """A killed process, as in a container, has said what it printed."""
    code = (
        "import time\nfrom esd_jax.cli import streams\nwith streams.lasting():\n    print('said')\n    time.sleep(60)"
    )
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, cwd=ROOT) as process:
        assert process.stdout.readline() == b"said\n"
        assert process.poll() is None
        process.kill()


def test_warnings_of_ours_reach_the_terminal(capsys):
    texts = ("x.safetensors brings the word 'x' along", "vae: written under names that begin with 'text_model.'")
    with cli._quiet():
        for text in texts:
            warnings.warn(text, stacklevel=1)
        warnings.warn("another library's", stacklevel=1)
    message = capsys.readouterr().err
    assert all(text in message for text in texts) and "another" not in message
