"""Results in files: found again, compared by their settings, whole after a kill, and refused where they are damaged."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from messages import one_line

from esd_jax import results

SETTINGS = {"seed": 1, "size": (2, 3)}
VALUES = {
    "r.json": {"rate": 0.5, "rows": [["a", None]]},
    "r.npz": {"hits": np.array([True, False]), "images": np.arange(12, dtype=np.uint8).reshape(2, 2, 3), "name": "x"},
}
files = pytest.mark.parametrize("name", VALUES)


def check(fields, name):
    """The fields are `SETTINGS` and `VALUES`, whichever way they came."""
    assert json.loads(json.dumps(fields["settings"])) == {"seed": 1, "size": [2, 3]}
    assert list(fields) == ["settings", *VALUES[name]]
    for field, value in VALUES[name].items():
        np.testing.assert_array_equal(fields[field], value)
        assert np.asarray(fields[field]).dtype == np.asarray(value).dtype


@files
def test_a_result_is_computed_once(tmp_path, name):
    file, calls = tmp_path / "folder" / name, []

    def compute():
        calls.append(1)
        return VALUES[name]

    assert results.read(file, settings=SETTINGS) is None
    for _ in range(3):
        check(results.kept(file, compute, settings=SETTINGS), name)
    assert len(calls) == 1 and [path.name for path in file.parent.iterdir()] == [name]
    check(results.read(file, settings=SETTINGS), name)
    file.unlink()
    check(results.kept(file, compute, settings=SETTINGS), name)
    assert len(calls) == 2


@files
def test_other_settings_are_refused_and_the_file_stays(tmp_path, name):
    file = tmp_path / name
    results.write(file, VALUES[name], settings=SETTINGS, model="m")
    before = file.read_bytes()
    for changed in ({"settings": {**SETTINGS, "seed": 2}}, {"settings": {"seed": 1}}, {"model": "n"}):
        differing, *_ = changed
        with pytest.raises(ValueError, match=one_line(file, "other settings", f"'{differing}'", "remove it")):
            results.kept(file, pytest.fail, **{"settings": SETTINGS, "model": "m", **changed})
    with pytest.raises(ValueError, match=one_line(f"{tmp_path} was made", "'model'", name)):
        results.read(file, tmp_path, model="n")
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["r.json", "r.npz"])
def test_settings_that_came_later_may_be_missing_and_must_be_equal(tmp_path, name):
    file, later = tmp_path / name, sorted(results.LATER)[0]
    results.write(file, {"x": [1]}, model={"sha": "a"}, seed=1)
    for model in ({"sha": "a"}, {"sha": "a", later: {"vae": "b"}}):
        assert results.read(file, model=model, seed=1)["x"] == [1]
        assert results.read(file, model={"sha": "a"}, seed=1, **{later: "c"})["x"] == [1]
    results.write(file, {"x": [1]}, model={"sha": "a", later: {"vae": "b"}}, seed=1)
    assert results.read(file, model={"sha": "a", later: {"vae": "b"}}, seed=1)["x"] == [1]
    for model in ({"sha": "a"}, {"sha": "a", later: {"vae": "c"}}, {"sha": "b", later: {"vae": "b"}}):
        with pytest.raises(ValueError, match="'model' differs"):
            results.read(file, model=model, seed=1)


def test_two_results_do_not_collide(tmp_path):
    """Of other names, or of one name and two kinds, even while both are written."""
    for seed in (1, 2):
        results.write(tmp_path / f"{seed}.json", {"rate": seed}, seed=seed)
    assert [results.read(tmp_path / f"{seed}.json", seed=seed)["rate"] for seed in (1, 2)] == [1, 2]
    with results.replacing(tmp_path / "a.json") as text, results.replacing(tmp_path / "a.png") as image:
        text.write_text("text")
        image.write_bytes(b"image")
    assert (tmp_path / "a.json").read_text() == "text" and (tmp_path / "a.png").read_bytes() == b"image"


@files
@pytest.mark.parametrize("old", [True, False], ids=["old", "nothing"])
def test_an_error_within_a_write_leaves_what_was_there(tmp_path, name, old, monkeypatch):
    file = tmp_path / name
    if old:
        results.write(file, VALUES[name], settings=SETTINGS)
    before = file.read_bytes() if old else None

    def failing(self, target):
        raise OSError(28, "No space left on device")

    with pytest.raises(TypeError):
        results.write(file, VALUES[name], settings={"seed": object()})
    with monkeypatch.context() as patch, pytest.raises(OSError, match=one_line("cannot write", file, "No space left")):
        patch.setattr(type(file), "replace", failing)
        results.write(file, VALUES[name], settings={})
    with pytest.raises(RuntimeError), results.replacing(file) as partial:
        partial.write_bytes(b"half of it")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == [name] * old
    assert not old or file.read_bytes() == before


@files
@pytest.mark.parametrize("old", [True, False], ids=["old", "nothing"])
def test_a_kill_within_a_write_leaves_what_was_there(tmp_path, name, old):
    file = tmp_path / name
    if old:
        results.write(file, VALUES[name], settings=SETTINGS)
    kill = (
        "import os, pathlib, signal, sys\n"
        "from esd_jax import results\n"
        "with results.replacing(pathlib.Path(sys.argv[1])) as partial:\n"
        "    partial.write_bytes(b'half of it')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", kill, str(file)]).returncode == -signal.SIGKILL
    assert file.exists() == old and len(list(tmp_path.iterdir())) == 1 + old  # and the temporary file
    check(results.kept(file, pytest.fail if old else lambda: VALUES[name], settings=SETTINGS), name)
    results.write(file, VALUES[name], settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # the next write has taken its place


@files
def test_a_damaged_file_is_refused(tmp_path, name):
    file = tmp_path / name
    results.write(file, VALUES[name], settings=SETTINGS)
    whole = file.read_bytes()
    rotten = [whole[:i] + bytes([byte ^ 0xFF]) + whole[i + 1 :] for i, byte in enumerate(whole)]
    for content in (*(whole[:n] for n in range(len(whole) - 2)), b"[]", b"3", b"{}", b"PK\x03\x04 no archive"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=one_line(file, "damaged", "remove it")):
            results.kept(file, pytest.fail, settings=SETTINGS)
    with pytest.raises(ValueError, match=one_line(f"{tmp_path} is damaged")):
        results.read(file, tmp_path, settings=SETTINGS)
    for content in rotten if name.endswith(".npz") else ():
        file.write_bytes(content)
        try:  # in a field that zip does not need to read an archive, a byte may be anything
            fields = results.read(file, settings=SETTINGS)
        except ValueError as error:
            assert str(error).startswith(f"{file} is damaged")
        else:
            assert all(np.array_equal(fields[field], VALUES[name][field]) for field in fields.keys() & VALUES[name])


def test_where_one_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=one_line("cannot write", tmp_path / "file" / "r.json", "unchanged")):
        results.write(tmp_path / "file" / "r.json", {})


def test_the_formats_stay(tmp_path):
    """Files that were written before are found, so neither the names of fields nor how they are stored may change."""
    (tmp_path / "r.json").write_text('{\n "settings": {\n  "seed": 1\n },\n "rate": 0.5\n}\n')
    assert results.read(tmp_path / "r.json", settings={"seed": 1})["rate"] == 0.5
    results.write(tmp_path / "new.json", {"rate": 0.5}, settings={"seed": 1})
    assert (tmp_path / "new.json").read_text() == (tmp_path / "r.json").read_text()
    np.savez_compressed(tmp_path / "r.npz", settings='{"seed": [1]}', name="found", cases=np.arange(2))
    results.write(tmp_path / "new.npz", {"name": "found", "cases": (0, 1)}, settings={"seed": (1,)})
    for file in ("r.npz", "new.npz"):
        fields = results.read(tmp_path / file, settings={"seed": [1]})
        assert (str(fields["name"]), fields["cases"].tolist()) == ("found", [0, 1])
    assert (tmp_path / "new.npz").read_bytes() == (tmp_path / "r.npz").read_bytes()
