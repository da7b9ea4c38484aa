"""Runs that are asked to stop, or whose weights become NaN."""

import os
import signal
import subprocess
import sys

import factories
import fault_child
import jax.numpy as jnp
import pytest
from disturbed import LOCALES, assert_same, erase, log_of, make_state, outcome, plain_step, steps_in
from messages import one_line

from esd_jax import cli
from esd_jax.runs import setup
from esd_jax.training import loop, run_folder
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.loop import Training, train
from esd_jax.training.run_folder import opened


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    factories.make_sd1(folder)
    return folder


# Being asked to stop.


def test_all_processes_stop_at_the_step_that_they_agree_on(tmp_path):
    """One process of three is asked to stop; what they agree on is known when the step's metrics are fetched."""
    votes = {}

    def train_one(asked_at):
        step = plain_step()

        def voted(state, theta_0, frozen, inputs, asked):
            number = int(state.step) + 1
            votes[number] = votes.get(number, False) or asked
            if number == asked_at:  # this step's vote is cast already
                os.kill(os.getpid(), signal.SIGTERM)
            return *step(state, theta_0, frozen, inputs), Late(lambda: votes[number])

        with Checkpoints(tmp_path / str(asked_at), {}) as checkpoints:
            with pytest.raises(loop.Stopped, match=one_line("stopped at step 7 of 10")):
                train(voted, make_state(), {}, {}, None, Training(steps=10), checkpoints=checkpoints, consensus=True)
        return steps_in(tmp_path / str(asked_at))

    assert [train_one(asked_at) for asked_at in (4, 99)] == [["7"]] * 2


class Late:
    """A value that is looked at later, like one that a device computes."""

    def __init__(self, value):
        self.value = value

    def __bool__(self):
        return self.value()


def test_previews_are_drawn_again_where_a_kill_may_have_lost_them(tmp_path):
    """A preview stands before the checkpoint of its step; a run that was stopped at such a step draws it first."""
    drawn, saved = [], []

    def preview(number, theta):
        drawn.append(number)
        saved.append(steps_in(tmp_path) if tmp_path.exists() else [])

    settings, state = Training(steps=10, checkpoint_every=5, preview_every=5, keep_checkpoints=9), make_state()
    with Checkpoints(tmp_path, {}, keep=9) as checkpoints:
        train(plain_step(), state, {}, {}, None, settings, checkpoints=checkpoints, preview=preview)
        assert drawn == [0, 5, 10] and saved[1] == [] and "10" not in saved[2]
        train(plain_step(), checkpoints.restore(make_state(), step=5), {}, {}, None, settings, preview=preview)
    assert drawn[3:] == [5, 10]


def test_a_signal_in_the_last_step_is_not_lost():
    def last(state, *rest):
        if int(state.step) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_step()(state, *rest)

    with pytest.raises(loop.Stopped, match="stopped at step 10 of 10"):
        train(last, make_state(), {}, {}, None, Training(steps=10))


# The command line around a step that is plain arithmetic.


@pytest.fixture
def toy(monkeypatch):
    """Runs compile no step; one may be given."""

    def use(step=fault_child.toy_step):
        monkeypatch.setattr(setup, "make_step", lambda *_, **__: step)

    use()
    return use


def test_a_run_whose_weights_become_nan(base, tmp_path, capsys, toy):
    fields = {"steps": 8}
    assert cli.main(erase(base, tmp_path / "whole", **fields)) == 0

    def poisoned(state, *rest):
        state, metrics = fault_child.toy_step(state, *rest)
        if int(state.step) == 5:
            state = state._replace(theta={name: value * jnp.nan for name, value in state.theta.items()})
        return state, metrics._replace(loss=metrics.loss + 0 * sum(value.sum() for value in state.theta.values()))

    toy(poisoned)
    capsys.readouterr()
    run = tmp_path / "run"
    assert cli.main(erase(base, run, **fields)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("esd-jax: error: loss is nan") and "at step 5" in last and "step 3 in " in last
    assert {path.name for path in run.iterdir()} == {
        "run.json",
        "log.jsonl",
        "sessions.jsonl",
        "checkpoints",
        "previews",
    }
    toy()
    assert cli.main(erase(base, run, "--resume", **fields)) == 0
    assert_same(outcome(run), outcome(tmp_path / "whole"))


def test_a_run_that_is_asked_to_stop(base, tmp_path, capsys, toy):
    """By SIGTERM, and by a user on a terminal."""
    fields = {"steps": 8}
    for number in (signal.SIGTERM, signal.SIGINT):

        def stopped(state, *rest, number=number):
            if int(state.step) == 4:
                os.kill(os.getpid(), number)
            return fault_child.toy_step(state, *rest)

        toy(stopped)
        run = tmp_path / number.name
        assert cli.main(erase(base, run, **fields)) == 128 + number
        line = capsys.readouterr().err.splitlines()[-1]
        begins = "esd-jax: stopped at step 5 of 8; this continues it: esd-jax erase --resume --config=esd_x "
        assert line.startswith(begins) and line.count("--resume") == 1 and str(run) in line
        assert steps_in(run / "checkpoints") == ["3", "5"] and not (run / ".lock").exists()
        toy()
        assert cli.main(erase(base, run, "--resume", **fields)) == 0
        assert len(log_of(run)) == 8


def test_the_command_refuses_a_folder_in_use(base, tmp_path, capsys, toy):
    with opened(str(tmp_path / "run"), None, False, False) as folder:
        run_folder.write_record(folder, {})
        for flag in ("--resume", "--overwrite"):
            assert cli.main(erase(base, folder, flag)) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.startswith(f"esd-jax: error: another run is using {folder}: wait until ")
            assert err.count("\n") == 1


def test_text_that_a_locale_cannot_read_is_refused(base, tmp_path):
    """It would be another concept."""
    environment = {**os.environ, **LOCALES["none"]}
    command = [sys.executable, "-m", "esd_jax.cli", *map(str, erase(base, tmp_path / "run", concept="Öl"))]
    completed = subprocess.run(command, env=environment, capture_output=True, timeout=100)
    assert (completed.returncode, completed.stdout) == (2, b"") and completed.stderr.count(b"\n") == 1
    assert b"no text in this locale's encoding, ascii: set PYTHONUTF8=1" in completed.stderr
    assert not (tmp_path / "run").exists()
