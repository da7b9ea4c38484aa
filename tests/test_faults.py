"""Runs to which something happens: what they lose, and that they end where an undisturbed run does."""

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import factories
import fault_child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import one_line
from safetensors.numpy import load_file

from esd_jax import cli
from esd_jax.io import leftovers
from esd_jax.runs import setup
from esd_jax.training import loop, run_folder
from esd_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from esd_jax.training.loop import NotFinite, Training, train
from esd_jax.training.run_folder import NotLocked, opened
from esd_jax.training.step import Metrics, Optimizer, init_state

STEPS = 20
FIELDS = {
    "concept": "cat style", "steps": STEPS, "checkpoint_every": 3, "sampling_steps": 4, "timestep_mode": "grid",
    "learning_rate": 1e-3, "seed": 3,
}  # fmt: skip
UNET = "model/unet/diffusion_pytorch_model.safetensors"
CHILD = Path(fault_child.__file__)
ROOT = CHILD.parent.parent  # the code that is tested, also in processes that start elsewhere


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    factories.make_sd1(folder)
    return folder


def erase(base, run, *flags, config="esd_x", **fields):
    settings = {**FIELDS, "base": base, "output_dir": run, **fields}
    return ["erase", f"--config={config}", *(f"--config.{name}={value}" for name, value in settings.items()), *flags]


def child(*commands, environment=None, **spec):
    """A process that runs commands; see `fault_child`."""
    spec = {**spec, "commands": [[str(word) for word in command] for command in commands]}
    return subprocess.Popen(
        [sys.executable, CHILD, json.dumps(spec, default=str)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip


def ended(process, code=0):
    """(stdout, stderr) of a process that ends with a code."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def log_of(run):
    """The log's lines without what the clock says."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def outcome(run):
    """All that a finished run has made, and that no fault may change."""
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    metas = [json.loads((run / "checkpoints" / str(step) / "meta" / "metadata").read_text()) for step in steps]
    files = {path.relative_to(run) for path in run.rglob("*") if path.relative_to(run).parts[0] != "checkpoints"}
    weights = {name: value.tobytes() for name, value in load_file(run / UNET).items()}
    delta = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    return {
        "checkpoints": dict(zip(steps, (meta["checksum"]["state"] for meta in metas), strict=True)),
        "files": sorted(map(str, files)), "weights": weights, "delta": delta, "log": log_of(run),
    }  # fmt: skip


def assert_same(found, expected):
    for part, value in expected.items():
        assert found[part] == value, part


# kill -9.


def timeline(file):
    """[(phase, which of its kind, when it began)]."""
    count, found = Counter(), []
    for line in file.read_text().splitlines() if file.exists() else ():
        phase, _, seconds = line.partition(" ")
        found.append((phase, count[phase], float(seconds or 0)))
        count[phase] += 1
    return found


def killed(process, file, target, delay):
    """Kills a process some time after a phase has begun: the phase that it was in; None if it has ended before."""
    deadline = time.monotonic() + 300
    while process.poll() is None and not any(event[:2] == target for event in timeline(file)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return timeline(file)[-1][0] if process.returncode == -signal.SIGKILL else None


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """(the outcome, how long each phase takes, a finished run with another seed, the environment)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # in the cache that all tests share
    ended(child(erase(base, folder / "other", "--export=delta", seed=4, steps=2), environment=environment))
    ended(child(erase(base, folder / "run", "--export=delta"), environment=environment, phases=folder / "phases"))
    events = timeline(folder / "phases")
    lasts = {first[:2]: second[2] - first[2] for first, second in zip(events, events[1:], strict=False)}
    return outcome(folder / "run"), lasts, folder / "other", environment


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_kills_at_random_moments_lose_nothing(base, undisturbed, tmp_path, part):
    """Ten kills in each part: of new runs, of runs that replace another, and of runs that are resumed after a kill."""
    expected, lasts, other, environment = undisturbed
    draw, kills, where, tries = random.Random(part), 0, Counter(), 0
    phases = [phase for phase in fault_child.PHASES if any(event[0] == phase for event in lasts)]
    targets = phases[part:] + phases[:part]
    while kills < 10:
        tries += 1
        folder = tmp_path / str(tries)
        run, flags, done = folder / "run", ["--export=delta"], False
        folder.mkdir()
        if tries % 3 == 0:
            shutil.copytree(other, run)
            flags.append("--overwrite")
        in_chain = draw.randint(2, 5)
        while not done:
            file = tmp_path / f"phases{tries}.{in_chain}"
            process = child(erase(base, run, *flags), environment=environment, phases=file)
            if in_chain == 0 or kills == 10:
                ended(process)
                break
            in_chain -= 1
            phase = targets[kills % len(targets)]
            target = draw.choice([event for event in lasts if event[0] == phase])
            if "--resume" in flags:
                target = (phase, 0)
            phase = killed(process, file, target, draw.uniform(0, lasts[target]))
            done = phase is None
            if not done:
                kills, where = kills + 1, where + Counter([phase])
            complete = [int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()]
            before = (run / "log.jsonl").read_bytes() if (run / "log.jsonl").exists() else b""
            ours = (run / "run.json").exists() and json.loads((run / "run.json").read_text())["recipe"]["seed"] == 3
            if ours:
                flags = ["--export=delta", "--resume"]
                kept = before.splitlines()[: max(complete, default=0)]
                assert len(kept) == max(complete, default=0)
            else:
                kept = []
        assert (run / "log.jsonl").read_bytes().splitlines()[: len(kept)] == kept
        assert_same(outcome(run), expected)
        assert [path.name for path in folder.iterdir()] == ["run"]
    print(f"\n{kills} kills in {tries} runs: {dict(where)}")
    assert kills == 10


@pytest.mark.slow
def test_a_second_start_compiles_nothing(base, tmp_path):
    """All programs of a run, its previews and its exports come from the persistent cache."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    counts = []
    for i, fields in enumerate([{}, {}, {"concept": "the dog", "seed": 5, "eta": 2.0}]):
        command = erase(
            base, tmp_path / str(i), "--export=delta", **{"steps": 3, "preview_every": 3, "preview_steps": 2, **fields}
        )
        out, _ = ended(child(command, environment=environment, count=True))
        counts.append(json.loads(out.splitlines()[-1]))
    assert counts[0]["cache_misses"] > 5
    for warm in counts[1:]:  # not even for another concept, seed and strength
        assert "cache_misses" not in warm and warm["cache_hits"] == counts[0]["cache_misses"]


# A full disk, a place that cannot be written to.


FULL = {  # what is being written when the disk is full -> (where the limit begins, its bytes, words of the message)
    "a checkpoint": (("save", 4), 2000, ["cannot write a checkpoint", "checkpoints", "too large"]),
    "the log": (("step", 11), 500, ["cannot write to", "too large"]),
    "the model": (("model", 1), 200_000, ["cannot write", "model", "too large", "unchanged"]),
    "an export": (("exports", 1), 20_000, ["cannot write", "exports", "too large", "unchanged"]),
}


@pytest.mark.slow
def test_a_disk_that_becomes_full(base, tmp_path):
    """The limit on a file's size stands in for the end of the disk. With room again, the run goes on."""
    whole = tmp_path / "whole"
    fields = {"steps": 12}
    ended(child(erase(base, whole, "--export=delta", **fields), toy=True))
    expected = outcome(whole)
    for what, (where, limit, words) in FULL.items():
        run = tmp_path / what.replace(" ", "_") / "run"
        command = erase(base, run, "--export=delta", **fields)
        _, err = ended(child(command, toy=True, limit=[*where, limit]), code=2)
        last = err.splitlines()[-1]
        assert last.startswith("esd-jax: error: ") and all(word in last for word in words), (what, err)
        complete = {int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()}
        assert complete, what
        ended(child([*command, "--resume"], toy=True))
        assert_same(outcome(run), expected)
        assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_places_that_cannot_be_written_to(base, tmp_path, capsys):
    (tmp_path / "file").write_text("a file in the way")
    for place in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300)):
        assert cli.main(erase(base, place)) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"esd-jax: error: cannot write to {place}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_somebody_else():
    """Neither a new run nor a resumed one; and what is there stays."""
    script = (
        "import os, sys; from esd_jax.training import run_folder\n"
        "os.setuid(65534)\n"
        "for resume, name in ((True, 'theirs'), (False, 'new')):\n"
        "    try:\n"
        "        with run_folder.opened(f'{sys.argv[1]}/{name}', None, resume, False): print('opened')\n"
        "    except OSError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        (theirs := Path(folder) / "theirs").mkdir(mode=0o755)
        Path(folder).chmod(0o755)
        run_folder.write_record(theirs, {})
        found = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=100)
        expected = [f"cannot write to {folder}/{name}: Permission denied" for name in ("theirs", "new")]
        assert found.stdout.splitlines() == expected, found.stderr
        assert [path.name for path in theirs.iterdir()] == ["run.json"]


# Two runs on one folder.

HOLD = """
import sys, time
from esd_jax.training import run_folder
with run_folder.opened(sys.argv[1], None, sys.argv[2] == "resume", sys.argv[2] == "overwrite") as folder:
    if sys.argv[2] == "overwrite":
        run_folder.write_record(folder, {"new": 1})
    print("open", flush=True)
    time.sleep(100)
"""


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("first", ["new", "resume", "overwrite"])
def test_a_second_run_on_a_folder_is_refused_until_the_first_is_dead(tmp_path, first):
    run = tmp_path / "run"
    if first != "new":
        run.mkdir()
        run_folder.write_record(run, {"old": 1})
    holder = subprocess.Popen([sys.executable, "-c", HOLD, run, first], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        before = contents(tmp_path)
        for resume, overwrite in [(False, False)] if first == "new" else [(True, False), (False, True)]:
            with pytest.raises(BlockingIOError, match=one_line(run, "another run is using", "another output_dir")):
                with opened(str(run), None, resume, overwrite):
                    pytest.fail("two runs have one folder")
            assert contents(tmp_path) == before
    finally:
        holder.kill()
        holder.wait()
    with opened(str(run), None, first != "new", False) as folder:  # what is killed keeps nobody out
        (folder / "checkpoints" / "1").mkdir(parents=True)
    names = {path.name for path in run.iterdir()}
    assert names == ({"checkpoints"} if first == "new" else {"checkpoints", "run.json"})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_two_runs_in_one_process_are_two(tmp_path):
    with opened(str(tmp_path / "run"), None, False, False):
        with pytest.raises(BlockingIOError, match=one_line("another run is using")):
            with opened(str(tmp_path / "run"), None, False, False):
                pass


@pytest.mark.parametrize("replaces", [False, True])
def test_threads_of_a_failed_run_that_still_write_are_waited_for(tmp_path, replaces):
    run, stop = tmp_path / "run", threading.Event()
    if replaces:
        run.mkdir()
        run_folder.write_record(run, {"old": 1})

    def late():
        while not stop.is_set():
            with contextlib.suppress(OSError):  # the folder is gone again
                (run / "checkpoints" / "3.tmp").mkdir(parents=True)

    writer, timer = threading.Thread(target=late), threading.Timer(0.3, stop.set)
    with pytest.raises(OSError, match="no space"), opened(str(run), None, False, replaces):
        writer.start()
        timer.start()
        raise OSError("no space")
    writer.join()
    if replaces:
        assert json.loads((run / "run.json").read_text()) == {"old": 1}
    else:
        assert not run.exists()


def test_file_systems_without_locks_are_told(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(NotLocked, match=one_line(tmp_path / "run", "cannot be locked", "no second run")):
        with opened(str(tmp_path / "run"), None, False, False) as folder:
            (folder / "checkpoints" / "1").mkdir(parents=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


# What a killed run leaves.


def record(folder, what):
    folder.mkdir(parents=True)
    run_folder.write_record(folder, {"run": what})


def said(folder):
    return json.loads((folder / "run.json").read_text())["run"]


LEFT = {  # what a kill has left -> how to make it, and what resume and overwrite then find as the older run
    "nothing but a lock": (lambda run, old: (run.mkdir(), (run / ".lock").touch()), None, None),
    "half a record": (lambda run, old: (run.mkdir(), (run / ".run.json.partial").write_text("{")), None, None),
    "the older run put aside": (lambda run, old: record(old, "old"), "old", "old"),
    "and a new folder": (lambda run, old: (record(old, "old"), run.mkdir(), (run / ".lock").touch()), "old", "old"),
    "and a new record": (lambda run, old: (record(old, "old"), record(run, "new")), "new", "old"),
    "half a removal": (
        lambda run, old: (record(run, "new"), record(run.with_name(".run.failed"), "old")), "new", "new",
    ),
}  # fmt: skip


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("left", LEFT)
def test_what_a_kill_leaves_is_found_and_removed(tmp_path, left, resume):
    run, old = tmp_path / "run", tmp_path / ".run.replaced"
    make, resumed, overwritten = LEFT[left]
    make(run, old)
    if resume and resumed is None:
        with pytest.raises(FileNotFoundError, match=one_line("no run to resume", run)):
            with opened(str(run), None, True, False):
                pass
        return
    with pytest.raises(ZeroDivisionError):  # the next run fails before it has a checkpoint
        with opened(str(run), None, resume, not resume) as folder:
            if resume:
                assert said(folder) == resumed
            else:
                assert {path.name for path in folder.iterdir()} == {".lock"}
                assert (said(old) if overwritten else None) == overwritten
            1 / 0  # noqa: B018
    if not resume:
        assert (said(run) if overwritten else None) == overwritten
    with opened(str(run), None, resume, not resume) as folder:  # and the one after it ends well
        assert not resume or said(folder) == resumed
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name for path in run.iterdir()} <= {"run.json"}


def test_leftovers_of_exports(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = process.pid, os.getppid()
    for name in (f".model.{dead}.partial", f".model.{dead}.old", f".model.{alive}.partial", f".other.{dead}.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a file").touch()
    (tmp_path / f".model.{os.getpid()}.partial").touch()
    leftovers.sweep(tmp_path / "model")  # the place is empty: what was to be replaced comes back
    assert {p.name for p in tmp_path.iterdir()} == {"model", f".model.{alive}.partial", f".other.{dead}.partial"}
    (tmp_path / f".model.{dead}.old").mkdir()
    leftovers.sweep_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "a file").exists()


def test_the_log_is_never_lost(tmp_path, monkeypatch):
    """It is cut in place: it is whole, or shorter, at any moment."""
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 9)]
    (tmp_path / "log.jsonl").write_bytes("".join(lines).encode() + b'\xff{"step": 9')
    log = loop.MetricLog(tmp_path, start=6)
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:6])


# Damage to checkpoints.


def make_state():
    theta = {f"unet/w{i}": jax.random.normal(jax.random.key(i), (40, 50)) for i in range(3)}
    return init_state(theta, Optimizer().transformation(), seed=0)


def plain_step(losses=None, poison=None):
    """Adds 1 to theta; its losses may be given, and a step whose weights hold a NaN."""

    def step(state, theta_0, frozen, inputs):
        number = int(state.step) + 1
        theta = {name: value + 1 for name, value in state.theta.items()}
        if number == poison:
            theta["unet/w1"] = theta["unet/w1"].at[3, 4].set(jnp.nan)
        loss = jnp.float32(losses[number - 1] if losses else 1 / number) + 0 * state.theta["unet/w1"].sum()
        return state._replace(theta=theta, step=state.step + 1), Metrics(loss, jnp.float32(1), jnp.float32(500))

    return step


def trained(folder, **options):
    """A run of ten steps in a folder, from wherever it stands."""
    settings = Training(steps=10, checkpoint_every=3, keep_checkpoints=options.pop("keep", 3))
    with Checkpoints(folder, {"eta": 1.0}, keep=settings.keep_checkpoints) as checkpoints:
        state = make_state() if checkpoints.latest is None else checkpoints.resume(make_state())
        return train(plain_step(**options), state, {}, {}, None, settings, checkpoints=checkpoints)


def steps_in(folder):
    return sorted(path.name for path in folder.iterdir())


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
    with pytest.warns(DamagedCheckpoint) as told, pytest.raises(NotFinite, match="at step 8"):
        trained(tmp_path, losses=[1.0] * 7 + [np.nan] * 3)
    assert [str(one.message).split(" of ")[1][:7] for one in told] == ["step 10", "step 9 "]
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


# Being asked to stop.


def test_all_processes_stop_at_the_step_that_they_agree_on(tmp_path):
    """One process of three is asked to stop; what they agree on is known when the step's metrics are fetched."""
    votes = {}

    def train_one(asked_at):
        step = plain_step()

        def voting(state, theta_0, frozen, inputs, asked):
            number = int(state.step) + 1
            votes[number] = votes.get(number, False) or asked
            if number == asked_at:  # this step's vote is cast already
                os.kill(os.getpid(), signal.SIGTERM)
            return *step(state, theta_0, frozen, inputs), Late(lambda: votes[number])

        with Checkpoints(tmp_path / str(asked_at), {}) as checkpoints:
            with pytest.raises(loop.Stopped, match=one_line("stopped at step 7 of 10")):
                train(voting, make_state(), {}, {}, None, Training(steps=10), checkpoints=checkpoints, votes=True)
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
    assert {path.name for path in run.iterdir()} == {"run.json", "log.jsonl", "checkpoints", "previews"}
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
        assert cli.main(erase(base, run, **fields)) == 128 + signal.SIGTERM
        assert capsys.readouterr().err.splitlines()[-1] == "esd-jax: stopped at step 5 of 8; --resume continues it"
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


LOCALES = {
    "none": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "one that is not there": {"LC_ALL": "tr_TR.UTF-8", "LANG": "de_DE.ISO-8859-1"},
    "an encoding of its own": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1", "LC_NUMERIC": "de_DE"},
}


@pytest.mark.slow
def test_a_run_goes_on_under_another_locale(base, tmp_path):
    """A concept with letters that ASCII lacks, from a config file; stopped in one locale and resumed in another."""
    config = tmp_path / "mine.py"
    config.write_text(
        "from esd_jax import recipe\n"
        "def get_config(): return recipe.preset('esd', 'paper', concept='Käthe Kollwitz, Öl')\n",
        encoding="utf-8",
    )
    utf8 = {"PYTHONUTF8": "1"}

    def command(run, *flags, **fields):
        words = erase(base, run, *flags, config=config, **{"steps": 5, **fields})
        return [word for word in words if "concept=" not in word]

    ended(child(command(tmp_path / "whole"), environment=utf8, toy=True))
    expected = outcome(tmp_path / "whole")
    (delta,) = expected["delta"].values()
    for name, environment in LOCALES.items():
        run = tmp_path / name
        ended(child(command(run, steps=3), environment=utf8, toy=True))
        ended(child(command(run, "--resume"), environment=environment, toy=True, hours=-24 * 365))
        found = outcome(run)
        assert delta in found["delta"].values()
        for part in ("checkpoints", "weights", "log"):
            assert found[part] == expected[part], name
        # And one that began in this locale.
        out, err = ended(child(command(run, "--overwrite"), environment=environment, toy=True))
        assert outcome(run)["weights"] == expected["weights"], name
        assert out.startswith("erased 'K") and "Traceback" not in err


def test_text_that_a_locale_cannot_read_is_refused(base, tmp_path):
    """It would be another concept."""
    environment = {**os.environ, **LOCALES["none"]}
    command = [sys.executable, "-m", "esd_jax.cli", *map(str, erase(base, tmp_path / "run", concept="Öl"))]
    found = subprocess.run(command, env=environment, capture_output=True, timeout=100)
    assert (found.returncode, found.stdout) == (2, b"") and found.stderr.count(b"\n") == 1
    assert b"no text in this locale's encoding, ascii: set PYTHONUTF8=1" in found.stderr
    assert not (tmp_path / "run").exists()
