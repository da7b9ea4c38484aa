"""Checkpoints of a run that are damaged: the one before takes their place, and nothing is thrown away."""

import json
import os
import shutil
import time

import jax
import numpy as np
import pytest
from checkpoint_files import contents
from disturbed import make_state, plain_step, steps_in
from messages import one_line

from esd_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from esd_jax.training.loop import NotFinite, Training, train

# Damage to checkpoints.


def trained(folder, **options):
    """A run of ten steps in a folder, from wherever it stands."""
    settings = Training(steps=10, checkpoint_every=3, keep_checkpoints=options.pop("keep", 3))
    with Checkpoints(folder, {"eta": 1.0}, keep=settings.keep_checkpoints) as checkpoints:
        state = make_state() if checkpoints.latest is None else checkpoints.resume(make_state())
        return train(plain_step(**options), state, {}, {}, None, settings, checkpoints=checkpoints)


def leaves(state):
    return [np.asarray(a) for a in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))]


def assert_equal(state, expected):
    for ours, theirs in zip(leaves(state), leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other_settings(folder):
    file = folder / "meta" / "metadata"
    file.write_text(file.read_text().replace('"eta": 1.0', '"eta": 2.0'))


DAMAGE = {
    "a bit of a tensor": lambda folder: flipped(largest(folder)),
    "a tensor's file cut short": lambda folder: cut(largest(folder)),
    "a tensor's file missing": lambda folder: largest(folder).unlink(),
    "the index": lambda folder: flipped(folder / "state" / "manifest.ocdbt"),
    "the list of arrays": lambda folder: cut(folder / "state" / "_METADATA"),
    "the settings": other_settings,
    "no settings": lambda folder: (folder / "meta" / "metadata").unlink(),
    "a part": lambda folder: shutil.rmtree(folder / "state"),
    "all": lambda folder: [file.write_bytes(b"") for file in folder.rglob("*") if file.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    expected = trained(tmp_path / "whole")
    trained(tmp_path / "run")
    assert steps_in(tmp_path / "run") == ["10", "6", "9"]
    DAMAGE[damage](tmp_path / "run" / "10")
    words = ["step 10", tmp_path / "run", "damaged or incomplete", "going on from step 9"]
    with Checkpoints(tmp_path / "run", {"eta": 1.0}, read_only=True) as checkpoints:  # to read is not to go on
        with pytest.raises(ValueError, match=one_line("step 10", tmp_path / "run", "damaged", "step 9 may be good")):
            checkpoints.restore(make_state())
        assert int(checkpoints.restore(make_state(), step=9).step) == 9
    with pytest.warns(DamagedCheckpoint, match=one_line(*words)):
        assert_equal(trained(tmp_path / "run"), expected)
    assert steps_in(tmp_path / "run") == ["10", "6", "9"]
    with Checkpoints(tmp_path / "run", {"eta": 1.0}, read_only=True) as checkpoints:
        assert_equal(checkpoints.restore(make_state()), expected)


def test_damaged_checkpoints_are_kept_aside_until_the_run_has_ended_well(tmp_path):
    expected = trained(tmp_path)
    for step in ("9", "10"):
        flipped(largest(tmp_path / step))
    with pytest.warns(DamagedCheckpoint) as warned, pytest.raises(NotFinite, match="at step 8"):
        trained(tmp_path, losses=[1.0] * 7 + [np.nan] * 3)
    assert [str(one.message).split(" of ")[1][:7] for one in warned] == ["step 10", "step 9 "]
    assert steps_in(tmp_path) == [".10.damaged", ".9.damaged", "6"]
    assert_equal(trained(tmp_path), expected)
    assert steps_in(tmp_path) == ["10", "6", "9"]


def test_if_all_checkpoints_are_damaged_nothing_is_touched(tmp_path):
    trained(tmp_path, keep=1)
    flipped(largest(tmp_path / "10"))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=one_line("step 10", "damaged", "there is no other")):
        trained(tmp_path, keep=1)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
    trained(tmp_path)
    before = contents(tmp_path)
    for error, kind in ((MemoryError(), MemoryError), (ValueError("PERMISSION_DENIED: Error opening"), OSError)):
        with Checkpoints(tmp_path, {"eta": 1.0}) as checkpoints:
            monkeypatch.setattr(
                checkpoints._manager, "restore", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
            )
            with pytest.raises(kind):
                checkpoints.resume(make_state())
    assert contents(tmp_path) == before


def test_checkpoints_of_older_versions_have_no_checksum(tmp_path):
    expected = trained(tmp_path)
    file = tmp_path / "10" / "meta" / "metadata"
    file.write_text(json.dumps({"eta": 1.0}))
    assert_equal(trained(tmp_path), expected)


def test_reading_a_run_leaves_the_checkpoint_alone_that_is_being_written(tmp_path):
    trained(tmp_path)
    (half := tmp_path / "12.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, {}, read_only=True) as checkpoints:
        checkpoints.restore(make_state(), check=False)
    assert half.exists()
    with Checkpoints(tmp_path, {"eta": 1.0}):
        pass
    assert steps_in(tmp_path) == ["10", "6", "9"]


def test_checkpoints_are_ordered_by_their_steps_whatever_the_clock_says(tmp_path, monkeypatch):
    expected = trained(tmp_path / "whole")
    folder = tmp_path / "run"
    with pytest.raises(NotFinite):
        trained(folder, losses=[1.0] * 7 + [np.nan] * 3)
    for age, step in enumerate(("3", "6")):  # the newer, the older
        for path in ((folder / step), *(folder / step).rglob("*")):
            os.utime(path, (2e9 - 1e9 * age,) * 2)
    now = time.time
    for shift in (-10 * 365 * 86400, 10 * 365 * 86400):
        shutil.copytree(folder, copy := tmp_path / str(shift))
        monkeypatch.setattr(time, "time", lambda shift=shift: now() + shift)
        assert_equal(trained(copy), expected)
        assert steps_in(copy) == ["10", "6", "9"]


# Weights that are not finite.


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("poison", [5, 6, 10])
def test_weights_with_a_nan_are_never_saved(tmp_path, poison, keep):
    """Of a step between two checkpoints, of one that has a checkpoint, and of the last."""
    expected = trained(tmp_path / "whole")
    with pytest.raises(NotFinite) as error:
        trained(tmp_path / "run", poison=poison, keep=keep)
    good = 9 if poison == 10 else 3
    where = f"at step {poison + 1}" if poison == 5 else f"after step {poison}"
    assert all(word in str(error.value) for word in (where, f"step {good} in ", "is good", "Lower learning_rate"))
    with Checkpoints(tmp_path / "run", {"eta": 1.0}, read_only=True) as checkpoints:
        kept = checkpoints.restore(make_state())
    assert int(kept.step) == good and all(np.isfinite(a).all() for a in leaves(kept))
    assert_equal(trained(tmp_path / "run", keep=keep), expected)
