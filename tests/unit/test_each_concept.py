"""launch.experiments.each_concept: which devices each run gets, what is resumed or left alone, and what is merged."""

import subprocess
import threading

import pytest

from launch.experiments import each_concept

CONFIG = ("--config=esd_x", "--config.base=tiny", "--config.steps=2")


@pytest.fixture
def started(monkeypatch):
    """Every command that would have been started: (verb, flags, visible devices). A run ends well unless it is told
    to fail; both groups' first runs wait for each other, so that neither group takes both."""
    commands, both, failing = [], threading.Barrier(2, timeout=20), set()

    def run(command, env=None, stderr=None, check=False):
        verb, flags = command[3], command[4:]
        devices = env["CUDA_VISIBLE_DEVICES"] if env else None
        commands.append((verb, flags, devices))
        if verb == "erase" and len([c for c in commands if c[0] == "erase"]) <= 2:
            both.wait()
        failed = any(f"--config.concept={concept}" in flags for concept in failing)
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(each_concept.subprocess, "run", run)
    return commands, failing


def launch(monkeypatch, output, *arguments):
    monkeypatch.setattr("sys.argv", ["each_concept", f"--output={output}", *arguments])
    each_concept.FLAGS.unparse_flags()
    for name in ("groups", "concepts", "config"):
        each_concept.FLAGS[name].value = each_concept.FLAGS[name].default
    each_concept.main()


def test_each_group_takes_the_next_concept(started, monkeypatch, tmp_path):
    commands, _ = started
    (tmp_path / "a_dog").mkdir()
    (tmp_path / "a_dog" / "run.json").write_text("{}")
    launch(monkeypatch, tmp_path, "--groups=0,1; 2,3", "--concepts=a cat; a dog; a fox", *CONFIG)
    *runs, (verb, flags, _) = commands
    assert {devices for _, _, devices in runs[:2]} == {"0,1", "2,3"} and len(runs) == 3
    by_concept = {flags[1]: flags for _, flags, _ in runs}
    assert set(by_concept) == {f"--config.concept={text}" for text in ("a cat", "a dog", "a fox")}
    for flags_of in by_concept.values():
        assert "--config.steps=2" in flags_of and "--config.base=tiny" in flags_of
    assert [("--resume" in flags_of) for flags_of in by_concept.values()].count(True) == 1
    assert "--resume" in by_concept["--config.concept=a dog"]
    assert verb == "export" and "--base=tiny" in flags
    assert [flag for flag in flags if "merge=" in flag] == [
        f"--merge={tmp_path / n}" for n in ("a_cat", "a_dog", "a_fox")
    ]


def test_what_is_erased_is_left_alone_and_a_failure_is_named(started, monkeypatch, tmp_path):
    commands, failing = started
    (tmp_path / "a_cat" / "model").mkdir(parents=True)
    (tmp_path / "a_cat" / "model" / "model_index.json").write_text("{}")
    failing.add("a fox")
    with pytest.raises(ValueError, match="'a fox' was not erased: see .*a_fox.log"):
        launch(monkeypatch, tmp_path, "--groups=0; 1", "--concepts=a cat; a dog; a fox", *CONFIG)
    assert {flags[1] for _, flags, _ in commands} == {"--config.concept=a dog", "--config.concept=a fox"}
    assert not [verb for verb, _, _ in commands if verb == "export"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (CONFIG, "are required"),
        (("--concepts=a; a", *CONFIG), "named twice"),
        (("--concepts=a", "--config.concept=b", *CONFIG), "is given by --concepts"),
    ],
)
def test_wrong_commands(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        launch(monkeypatch, tmp_path, *arguments)
