"""A run that is killed, stopped or extended ends where an undisturbed one would; its log, previews and checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX
from PIL import Image
from safetensors.numpy import load_file

import esd_jax
from esd_jax.training import loop
from esd_jax.training.checkpoint import Checkpoints
from esd_jax.training.log import MetricLog
from esd_jax.training.loop import NotFinite, Training, train
from esd_jax.training.step import Metrics, Optimizer, State, init_state

STEPS = 60
FIELDS = {
    "concept": "cat style", "steps": STEPS, "checkpoint_every": 5, "sampling_steps": 4, "timestep_mode": "grid",
    "learning_rate": 1e-3, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    factories.make_sd1(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """The weights of a run that nothing disturbs, from a process of its own."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    process = start(base, run)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    return weights(run)


def command(base, run, *flags, **fields):
    settings = {**FIELDS, "base": base, "output_dir": run, **fields}
    config = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "esd_jax.cli", "erase", "--config=esd_x", "--nopictures", *config, *flags]


def start(base, run, *flags, **fields):
    return subprocess.Popen(command(base, run, *flags, **fields), stderr=subprocess.PIPE, text=True)


def weights(run):
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name].view(np.uint8), value.view(np.uint8), err_msg=name)


def wait_for_step(process, run, step):
    """Waits until the log of a running process shows a step. It must not have ended by then."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        log = run / "log.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= step:
            assert process.poll() is None, "the run ended before it could be interrupted"
            return
        time.sleep(0.002)
    raise AssertionError("the run made no progress")


def steps_of(run):
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_resume_after_kill_is_bit_identical(base, uninterrupted, tmp_path):
    run = tmp_path / "killed"
    process = start(base, run)
    wait_for_step(process, run, 22)
    process.kill()
    process.wait()
    assert not (run / "model").exists()
    again = subprocess.run(command(base, run, "--resume"), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert_same_bits(weights(run), uninterrupted)
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert not list((run / "checkpoints").glob("*tmp*"))


def test_sigterm_saves_and_resume_is_bit_identical(base, uninterrupted, tmp_path):
    run = tmp_path / "stopped"
    process = start(base, run)
    wait_for_step(process, run, 12)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    last = errors.strip().splitlines()[-1]
    assert last.startswith("esd-jax: stopped at step ") and "--resume" in last
    stopped_at = int(last.split()[4])
    with Checkpoints(run / "checkpoints", {}) as checkpoints:
        assert checkpoints.latest == stopped_at < STEPS
    assert subprocess.run(command(base, run, "--resume"), capture_output=True, timeout=300).returncode == 0
    assert_same_bits(weights(run), uninterrupted)


@pytest.mark.slow
def test_extending_a_finished_run_equals_one_long_run(base, tmp_path):
    fields = {**FIELDS, "steps": 3}
    esd_jax.erase(base, output_dir=str(tmp_path / "run"), **fields)
    longer = esd_jax.erase(base, output_dir=str(tmp_path / "run"), resume=True, **{**fields, "steps": 6})
    whole = esd_jax.erase(base, **{**fields, "steps": 6})
    assert_same_bits(*({k: np.asarray(v) for k, v in p.edits.items()} for p in (longer, whole)))


def test_resume_refuses_other_settings(base, tmp_path):
    run, fields = str(tmp_path / "run"), {**FIELDS, "steps": 1}
    esd_jax.erase(base, output_dir=run, **fields)
    with pytest.raises(ValueError, match="was made with eta=1.0, not 2.0"):
        esd_jax.erase(base, output_dir=run, resume=True, **fields, eta=2.0)


def test_previews_show_the_same_seed_as_the_run_goes_on(base, tmp_path):
    options = {"preview_every": 2, "preview_prompts": "cat style; a photo of the dog", "preview_steps": 2}
    options["dtype"] = "float32"  # the recipes for Stable Diffusion compute in bfloat16
    esd_jax.erase(base, output_dir=str(tmp_path / "run"), **{**FIELDS, "steps": 4, **options})
    strips = sorted((tmp_path / "run" / "previews").glob("*.png"))
    assert [path.stem for path in strips] == ["step_000000", "step_000002", "step_000004"]
    first, last = (np.asarray(Image.open(path)) for path in (strips[0], strips[-1]))
    assert first.shape == (16, 2 * 16, 3)
    assert not np.array_equal(first, last)
    expected = esd_jax.sample(
        esd_jax.load(base), ["cat style", "a photo of the dog"], seed=FIELDS["seed"], steps=2, guidance_scale=7.5
    )
    np.testing.assert_array_equal(first, np.concatenate(list(expected), axis=1))


# The loop itself, driven by a step that is plain arithmetic.


def make_state():
    return init_state({"unet/w": jnp.ones(2)}, Optimizer().transformation(), seed=0)


def toy_step(losses):
    """A step whose losses are given, and which counts in theta."""

    def step(state, theta_0, frozen, inputs):
        loss = losses[int(state.step)]
        theta = {name: value + 1 for name, value in state.theta.items()}
        metrics = Metrics(jnp.float32(loss), jnp.float32(1.0), jnp.float32(500))
        return State(theta, state.opt, state.step + 1, state.key), metrics

    return step


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, bad):
    losses = [1.0] * 7 + [bad] + [1.0] * 12
    settings = Training(steps=20, checkpoint_every=4)
    with Checkpoints(tmp_path / "checkpoints", {}) as checkpoints:
        with pytest.raises(NotFinite, match=r"at step 8; the checkpoint of step 4 in .* is good"):
            train(toy_step(losses), make_state(), {}, {}, None, settings, checkpoints=checkpoints)
        checkpoints.wait()
        kept = checkpoints.restore(make_state())
    assert int(kept.step) == 4
    np.testing.assert_array_equal(kept.theta["unet/w"], [5.0, 5.0])


def test_the_weights_that_gave_a_nan_are_not_kept_unless_nothing_else_is(tmp_path):
    losses = [1.0] * 8 + [float("nan")] + [1.0] * 12
    for keep, expected in ((2, r"the checkpoint of step 4 in .* is good"), (1, r"the only checkpoint, of step 8 in ")):
        settings = Training(steps=20, checkpoint_every=4, keep_checkpoints=keep)
        with Checkpoints(tmp_path / str(keep), {}, keep=keep) as checkpoints:
            with pytest.raises(NotFinite, match=f"at step 9; {expected}"):
                train(toy_step(losses), make_state(), {}, {}, None, settings, checkpoints=checkpoints)
        assert [p.name for p in (tmp_path / str(keep)).iterdir()] == ["4" if keep == 2 else "8"]


def test_checkpoints_keep_the_newest_and_restore_a_given_one(tmp_path):
    settings = Training(steps=10, checkpoint_every=2, keep_checkpoints=3)
    with Checkpoints(tmp_path, {"eta": 1.0}, keep=settings.keep_checkpoints) as checkpoints:
        state = train(toy_step([1.0] * 10), make_state(), {}, {}, None, settings, checkpoints=checkpoints)
        assert sorted(int(p.name) for p in tmp_path.iterdir()) == [6, 8, 10]
        restored = checkpoints.restore(make_state())
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert int(checkpoints.restore(make_state(), step=6).step) == 6
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
            checkpoints.restore(make_state(), step=7)
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))


def test_training_stops_where_it_is_told_and_resumes_to_the_same_step(tmp_path):
    """toy_step adds 1 to theta in each step, from 1."""
    asked, shown = [], []

    def stop_at_six(theta):
        asked.append(int(theta["unet/w"][0]) - 1)
        return asked[-1] >= 6

    options = {"stop_when": stop_at_six, "stop_every": 3, "preview": lambda step, _: shown.append(step)}
    settings = Training(steps=20, checkpoint_every=6, preview_every=4)
    with Checkpoints(tmp_path, {}) as checkpoints:
        state = train(toy_step([1.0] * 20), make_state(), {}, {}, None, settings, checkpoints=checkpoints, **options)
        assert int(state.step) == 6 and asked == [3, 6] and shown == [0, 4, 6]
        # Killed after its checkpoint, before it ended: nothing more is trained.
        again = train(toy_step([1.0] * 20), checkpoints.restore(make_state()), {}, {}, None, settings, **options)
    assert int(again.step) == 6 and asked == [3, 6, 6] and shown == [0, 4, 6]
    with pytest.raises(ValueError, match="stop_every=0"):
        train(toy_step([1.0]), make_state(), {}, {}, None, settings, stop_when=stop_at_six, stop_every=0)


def test_log_drops_what_a_resumed_run_writes_again(tmp_path):
    log = MetricLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"loss": step / 2})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill can cut the last line
    log = MetricLog(tmp_path, start=3)
    log.write(4, {"loss": 9.0})
    log.close()
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] == 9.0


def test_tensorboard_files_are_written_on_request(tmp_path):
    log = MetricLog(tmp_path, tensorboard=True)
    log.write(1, {"loss": 0.5})
    log.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_tensorboard_purges_what_a_resumed_run_writes_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tensorboardX, "SummaryWriter", lambda folder, purge_step: asked.append(purge_step))
    for start in (0, 3):
        MetricLog(tmp_path, start=start, tensorboard=True)
    assert asked == [None, 4]


def test_log_every_thins_the_log_but_keeps_the_last_step(tmp_path):
    log = MetricLog(tmp_path)
    train(toy_step([1.0] * 10), make_state(), {}, {}, None, Training(steps=10, log_every=4), log=log)
    log.close()
    assert steps_of(tmp_path) == [4, 8, 10]


def test_first_interrupt_stops_after_the_step_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT)
    step = toy_step([1.0] * 10)

    def interrupted(state, *rest):
        if int(state.step) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(state, *rest)

    with pytest.raises(loop.Stopped, match="stopped at step 5 of 10"):
        train(interrupted, make_state(), {}, {}, None, Training(steps=10))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("answer, last", [(True, 4), (False, 10), (None, 10), (1, 10)])
def test_on_step_stops_training_by_true_alone(answer, last, tmp_path):
    """After the two further updates that the host has asked for by then; from another thread, too."""
    steps = []

    def on_step(number, metrics):
        steps.append(number)
        return answer if number == 2 else None

    with Checkpoints(tmp_path, {}) as checkpoints:
        options = {"checkpoints": checkpoints, "on_step": on_step}
        training = lambda: train(toy_step([1.0] * 10), make_state(), {}, {}, None, Training(steps=10), **options)  # noqa: E731
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(training).exception()
        assert checkpoints.latest == last and steps == list(range(1, last + 1))
    assert isinstance(error, loop.Stopped) and error.kept if answer is True else error is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adagrad"}, "optimizer='adagrad' is unknown"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"weight_decay": 0.1}, "needs optimizer='adamw'"),
    ],
)
def test_optimizer_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**settings)


def test_optimizer_warms_up_and_clips():
    tx = Optimizer(optimizer="sgd", learning_rate=1.0, warmup_steps=4, max_grad_norm=0.5).transformation()
    theta, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}
    state, norms = tx.init(theta), []
    for _ in range(6):
        updates, state = tx.update(grads, state, theta)
        norms.append(float(jnp.linalg.norm(updates["w"])))
    np.testing.assert_allclose(norms, [0, 0.125, 0.25, 0.375, 0.5, 0.5], atol=1e-6)
