"""Runs from the command line that fail, are resumed, are replaced or are damaged."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import factories
import pytest
import safetensors.torch
import torch
from command_line import UNET, assert_refused, erase, last_line, tree

DIVERGES = {"learning_rate": 1e30, "steps": 5}  # the weights are finite after step 1, and the loss of step 2 is NaN
LATER = {**DIVERGES, "warmup_steps": 4, "checkpoint_every": 1}  # nothing is learned in step 1: NaN in step 3


def test_a_failing_new_run_gives_the_old_one_back(esd, base, run, tmp_path):
    before = tree(tmp_path)
    result = esd(*erase(base, run, "--overwrite", **DIVERGES))
    assert_refused(result, "step 2", "no checkpoint yet", "Lower learning_rate")
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_run_is_kept_aside_until_the_new_one_has_ended_well(esd, base, run, finished, tmp_path):
    code, out, err = esd(*erase(base, run, "--overwrite", **LATER))
    assert_refused((code, out, last_line(err)), "step 3", tmp_path / ".run.replaced")
    assert tree(tmp_path / ".run.replaced") == tree(finished)
    assert (run / "checkpoints" / "1").is_dir()
    # Another try takes the place of the failed one, and the first run is still there if that fails, too.
    assert_refused(esd(*erase(base, run, "--overwrite", **DIVERGES)), "step 2")
    assert tree(run) == tree(finished) and not (tmp_path / ".run.replaced").exists()
    assert esd(*erase(base, run, "--overwrite", seed=5))[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert json.loads((run / "run.json").read_text())["recipe"]["seed"] == 5


def test_the_checkpoint_that_is_called_good_is_good(esd, base, tmp_path):
    """The loss of step n is computed with the weights after step n - 1: a NaN condemns that checkpoint, too."""
    _, _, err = esd(*erase(base, tmp_path / "run", **LATER))
    good, failed = int(re.search(r"checkpoint of step (\d+)", err)[1]), int(re.search(r"at step (\d+)", err)[1])
    assert good < failed - 1
    assert esd("export", f"--run={tmp_path / 'run'}", f"--step={good}", f"--output={tmp_path / 'x'}")[0] == 0
    weights = safetensors.torch.load_file(tmp_path / "x" / UNET)
    assert all(value.abs().max() < 10 for value in weights.values())


def test_a_base_with_a_nan(esd, base, tmp_path):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    tensors = safetensors.torch.load_file(copy / UNET)
    tensors["conv_in.weight"][0, 0, 0, 0] = torch.nan
    safetensors.torch.save_file(tensors, copy / UNET)
    before = tree(tmp_path)
    assert_refused(esd(*erase(copy, tmp_path / "run")), copy / UNET, "'conv_in.weight'", "NaN")
    assert tree(tmp_path) == before


def test_resuming_a_finished_run_changes_nothing(esd, base, run):
    before = tree(run)
    code, out, err = esd(*erase(base, run, "--resume", checkpoint_every=1))
    assert (code, err) == (0, "") and out.startswith("erased 'cat' from ")
    after = tree(run)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name] and not name.startswith("checkpoints/")] == []


WRONG_RESUMPTIONS = {
    "learning_rate=1e-4": ["learning_rate=0.001, not 0.0001", "same settings"],
    "subset=esd-u": ["subset='esd-x', not 'esd-u'"],
    "concept=dog": ["concept='cat', not 'dog'"],
    "seed=1": ["seed=0, not 1"],
    "steps=1": ["steps=1", "has made 2"],
}


def test_resuming_with_other_settings(esd, base, run, tmp_path):
    before = tree(tmp_path)
    for setting, words in WRONG_RESUMPTIONS.items():
        name, _, value = setting.partition("=")
        assert_refused(esd(*erase(base, run, "--resume", **{name: value})), *words)
        assert tree(tmp_path) == before
    other = tmp_path / "other"
    factories.make_sd1(other, seed=1)
    assert_refused(esd(*erase(other, run, "--resume")), "base_sha256")
    shutil.rmtree(other)
    assert_refused(esd(*erase(base, run, "--resume", "--overwrite")), "resume", "overwrite")
    assert_refused(esd(*erase(base, run)), "run", "erased 'cat'", "--resume continues it, --overwrite replaces it")
    assert_refused(esd(*erase(base, tmp_path / "nowhere", "--resume")), "no run to resume", "nowhere")
    assert tree(tmp_path) == before


def test_exporting_runs_that_are_damaged_or_have_moved(esd, base, run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    shutil.move(base, tmp_path / "moved")
    try:
        assert_refused(esd("export", f"--run={run}", f"--output={tmp_path / 'x'}"), base, "has moved")
        assert esd("export", f"--run={run}", f"--base={tmp_path / 'moved'}", f"--output={tmp_path / 'x'}")[0] == 0
    finally:
        shutil.move(tmp_path / "moved", base)
    written = [(folder / UNET).read_bytes() for folder in (tmp_path / "x", run / "model")]
    sizes = [8 + int.from_bytes(content[:8], "little") for content in written]
    headers = [json.loads(content[8:size]) for content, size in zip(written, sizes, strict=True)]
    assert written[0][sizes[0] :] == written[1][sizes[1] :]
    metadata, before = (header.pop("__metadata__") for header in headers)
    assert headers[0] == headers[1] and metadata == {**metadata, **before} and metadata["esd_jax.measured"] == "no"
    factories.make_sd1(tmp_path / "other", seed=1)
    result = esd("export", f"--run={run}", f"--base={tmp_path / 'other'}", f"--output={tmp_path / 'y'}")
    assert_refused(result, "is not the base", "sha256")
    for text, words in [
        ("{", ["run.json", "JSON"]),
        ("{}", ["run.json", "'recipe'"]),
        (json.dumps({**record, "recipe": {**record["recipe"], "a_new_field": 1}}), ["run.json", "'a_new_field'"]),
    ]:
        (run / "run.json").write_text(text)
        assert_refused(esd("export", f"--run={run}", f"--output={tmp_path / 'y'}"), *words)
    (run / "run.json").write_text(json.dumps(record))
    shutil.rmtree(run / "checkpoints")
    assert_refused(esd("export", f"--run={run}", f"--output={tmp_path / 'y'}"), "no checkpoint in", run)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("damage", ["a file cut short", "a missing part"])
def test_a_damaged_checkpoint(esd, base, run, finished, tmp_path, damage):
    """Nothing is exported in its place unless that is asked for; a run goes on from the one before, and says so."""
    state = run / "checkpoints" / "2" / "state"
    if damage == "a missing part":
        shutil.rmtree(run / "checkpoints" / "2" / "meta")
    for file in state.rglob("*") if damage == "a file cut short" else ():
        if file.is_file():
            file.write_bytes(file.read_bytes()[:100])
    before, export = tree(tmp_path), ["export", f"--run={run}", f"--output={tmp_path / 'x'}"]
    assert_refused(esd(*export), "step 2", run / "checkpoints", "damaged", "step 1 may be good")
    assert tree(tmp_path) == before
    assert esd(*export, "--step=1")[0] == 0
    code, _, err = esd(*erase(base, run, "--resume", checkpoint_every=1))
    warned = r"esd-jax: warning: the checkpoint of step 2 in .* going on from step 1\n"
    assert code == 0 and re.fullmatch(warned, err)
    assert (run / "model" / UNET).read_bytes() == (finished / "model" / UNET).read_bytes()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]


def test_many_concepts_have_a_file_name_that_fits(esd, base, tmp_path):
    concepts = "; ".join(f"the artist number {i}" for i in range(60))
    assert esd(*erase(base, tmp_path / "run", concept=concepts, steps=0))[0] == 0
    (delta,) = (tmp_path / "run").glob("*.safetensors")
    assert delta.name.startswith("esd-the_artist_number_0+the_artist_number_1")


FULL_DISK = """
import contextlib, io, json, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from esd_jax import cli
results = []
for limit, argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@pytest.mark.slow
def test_a_full_disk(base, run, tmp_path):
    """The limit on a file's size stands in for the end of the disk."""
    before, new = tree(tmp_path), tmp_path / "new"
    commands = [
        (500, erase(base, new), ["cannot write", new]),  # run.json
        (3000, erase(base, new, steps=60), ["cannot write", new]),  # the log
        (
            20_000,
            erase(base, run, "--overwrite", seed=7),
            [run / "checkpoints", "too large"],
        ),  # its shapes, at the least
        (100, ["sample", f"--base={base}", "--prompts=cat", "--num_steps=2"], ["cannot write", tmp_path / "x.png"]),
        (1 << 20, ["export", f"--run={run}", f"--output={tmp_path / 'x'}"], ["cannot write", tmp_path / "x"]),
    ]
    commands[3][1].append(f"--output={tmp_path / 'x.png'}")
    argument = json.dumps([(limit, list(map(str, argv))) for limit, argv, _ in commands])
    child = subprocess.run([sys.executable, "-c", FULL_DISK, argument], capture_output=True, text=True, timeout=300)
    assert child.stderr == ""
    for (code, out, err), (_, _, words) in zip(json.loads(child.stdout), commands, strict=True):
        assert_refused((code, out, last_line(err)), *words)
    assert tree(tmp_path) == before
