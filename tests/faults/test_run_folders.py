"""Folders of runs: that cannot be written to, that two runs want, and what a kill leaves in them."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import factories
import pytest
from checkpoint_files import contents
from disturbed import erase
from messages import one_line

from esd_jax import cli
from esd_jax.io import leftovers
from esd_jax.training import run_folder
from esd_jax.training.log import MetricLog
from esd_jax.training.run_folder import NotLocked, opened


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    factories.make_sd1(folder)
    return folder


# Places that cannot be written to.


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
        completed = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=100)
        expected = [f"cannot write to {folder}/{name}: Permission denied" for name in ("theirs", "new")]
        assert completed.stdout.splitlines() == expected, completed.stderr
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
    log = MetricLog(tmp_path, start=6)
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:6])
