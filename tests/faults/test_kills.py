"""Runs that are killed, or whose disk is full: they lose nothing, and end where an undisturbed run does."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import factories
import fault_child
import pytest
from disturbed import LOCALES, assert_same, erase, outcome
from paths import ROOT

CHILD = Path(fault_child.__file__)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    factories.make_sd1(folder)
    return folder


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


# kill -9.


def timeline(file):
    """[(phase, which of its kind, when it began)]."""
    count, outcomes = Counter(), []
    for line in file.read_text().splitlines() if file.exists() else ():
        phase, _, seconds = line.partition(" ")
        outcomes.append((phase, count[phase], float(seconds or 0)))
        count[phase] += 1
    return outcomes


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


# A full disk.

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


# Another locale.


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
        after = outcome(run)
        assert delta in after["delta"].values()
        for part in ("checkpoints", "weights", "log"):
            assert after[part] == expected[part], name
        # And one that began in this locale.
        out, err = ended(child(command(run, "--overwrite"), environment=environment, toy=True))
        assert outcome(run)["weights"] == expected["weights"], name
        assert out.startswith("erased 'K") and "Traceback" not in err
