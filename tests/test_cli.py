"""The command line under careless use: every mistake ends in one line and exit code 2, and harms nothing."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import factories
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from messages import one_line
from PIL import Image

import esd_jax
from esd_jax import api, cli, recipe, sampling
from esd_jax.diffusion.rules import SEGA, SLD, Edit
from esd_jax.evaluation import prompts
from esd_jax.metrics.likeness import ssim
from esd_jax.models import architectures
from esd_jax.pipeline import network
from esd_jax.selection import select

UNET = "unet/diffusion_pytorch_model.safetensors"
FIELDS = {"concept": "cat", "steps": 2, "sampling_steps": 4, "timestep_mode": "grid", "learning_rate": 1e-3}
DIVERGES = {"learning_rate": 1e30, "steps": 5}  # the weights are finite after step 1, and the loss of step 2 is NaN
LATER = {**DIVERGES, "warmup_steps": 4, "checkpoint_every": 1}  # nothing is learned in step 1: NaN in step 3
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    factories.make_sd1(folder)
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A finished run that no test changes."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.main(erase(base, folder, checkpoint_every=1)) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def esd(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*argv):
        code = cli.main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return call


def erase(base, folder, /, *flags, **fields):
    settings = {**FIELDS, "base": base, "output_dir": folder, **fields}
    return ["erase", "--config=esd_x", *(f"--config.{name}={value}" for name, value in settings.items()), *flags]


def assert_refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("esd-jax: error: ") and err.endswith("\n")
    assert re.match(one_line(*words), err[:-1]), err


def last_line(err: str) -> str:
    """What follows the lines that tell how far a run has come."""
    *progress, last = err.splitlines(keepends=True)
    assert all(re.fullmatch(r"step \d+/\d+  loss \S+  \d+ s, \d+ s left\n", line) for line in progress), err
    return last


def tree(folder: Path) -> dict:
    """Everything in a folder, hidden names too: path -> bytes, or None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# The command line itself.

WRONG_COMMANDS = {
    "erese": ["'erese'", "choose one of erase"],
    "erase": ["--config", "emoji", "esd_x"],
    "erase --config": ["needs --config=NAME"],
    "erase --config.steps=3": ["needs --config=NAME"],
    "erase --config=emojy": ["'emojy'", "emoji"],
    "erase --config=nowhere/mine.py": ["nowhere/mine.py"],
    "erase --config=emoji --ovewrite": ["ovewrite", "overwrite"],
    "erase --config=emoji --prompts=cat": ["prompts", "erase --help"],
    "erase --config=emoji neon": ["'neon'", "--name=value"],
    "erase --config=emoji --arch=sd14": ["--arch", "--dry_run"],
    "erase --config=emoji --compile": ["--compile", "--dry_run"],
    "erase --config=emoji --dry_run --arch=sd15": ["sd15", "sd14", "sdxl"],
    "erase --config=emoji": ["--config.output_dir"],
    "erase --config=emoji --dry_run --config.height=7": ["7x64", "multiple of 4"],
    "erase --config=emoji --dry_run --config.sampling_steps=0": ["0"],
    "erase --config=emoji --dry_run --config.base=nowhere": ["nowhere", "diffusers folder"],
    "sample": ["--output is required"],
    "sample --output=x.png": ["--prompts is required"],
    "sample --output= --prompts=cat": ["--output is required"],
    "sample --output=x.png --prompts=;": ["--prompts holds no prompt"],
    "sample --output=x.png --prompts=nowhere.txt": ["cannot read nowhere.txt", "No such file", "';'"],
    "sample --output=x.png --prompts=nowhere.csv": ["cannot read nowhere.csv", "No such file", "';'"],
    "sample --output=x.png --prompts=a&amp;b": ["'a&amp;b'", "'&'"],
    "sample --output=x.jpg --prompts=cat": ["x.jpg", ".png"],
    "sample --output=x.png --prompts=cat cat": ["'cat'", "--name=value"],
    "sample --output=x.png --prompts=cat --config=emoji": ["config", "sample --help"],
    "sample --output=x.png --prompts=cat --base=nowhere": ["nowhere", "org/name"],
    "sample --output=x.png --prompts=cat --sampler=dddim": ["'dddim'", "ddim"],
    "sample --output=x.png --prompts=cat --dtype=float8": ["float8", "bfloat16"],
    "sample --output=x.png --prompts=cat --num_steps=-1": ["num_steps", "-1", "positive"],
    "sample --output=x.png --prompts=cat --num_steps=1001": ["1001", "1000"],
    "sample --output=x.png --prompts=cat --batch_size=0": ["batch_size", "positive"],
    "sample --output=x.png --prompts=cat --seed=one": ["seed", "one"],
    "sample --output=x.png --prompts=cat --seed=4294967296": ["seed", "4294967295"],
    "sample --output=x.png --prompts=cat --guidance_scale=nan": ["guidance_scale", "finite"],
    "sample --output=x.png --prompts=cat --eta=2": ["eta"],
    "sample --output=x.png --prompts=cat --height=30": ["30x64", "multiple of 4"],
    "sample --output=x.png --prompts=cat --height=0": ["height", "positive"],
    "sample --output=x.png --prompts=cat --variant=fp16": ["'fp16'", "no variant"],
    "sample --output=x.png --prompts=cat --delta=x.safetensors": ["x.safetensors"],
    "sample --output=x.png --prompts=cat --sld=huge": ["sld", "huge", "strong"],
    "sample --output=x.png --prompts=cat --safety_prompt=cat": ["--safety_prompt", "--sld"],
    "sample --output=x.png --prompts=cat --sld=max --edit=dog": ["--sld", "--edit"],
    "sample --output=x.png --prompts=cat --sld=max --guidance_scale=1": ["guidance_scale=1.0", "SLD"],
    "sample --output=x.png --prompts=cat --sld=max --safety_prompt=": ["SLD", "concept is empty"],
    "sample --output=x.png --prompts=cat --edit=;scale=3": ["Edit", "concept is empty"],
    "sample --output=x.png --prompts=cat --edit=dog;strength=3": ["strength", "scale, warmup, cooldown"],
    "sample --output=x.png --prompts=cat --edit=dog;scale=big": ["--edit: scale=big"],
    "sample --output=x.png --prompts=cat --edit=dog;threshold=2": ["Edit: threshold=2", "0..1"],
    "sample --output=x.png --prompts=cat --reweight=cat": ["--reweight=cat", "WORD=FACTOR"],
    "sample --output=x.png --prompts=cat --reweight=cat=big": ["--reweight", "cat=big"],
    "sample --output=x.png --prompts=cat --reweight=dog=2": ["no prompt holds 'dog'"],
    "purify": ["--output is required"],
    "purify --output=x.png": ["at least one image"],
    "purify a.png --output=x.jpg": ["x.jpg", ".png"],
    "purify a.png --output=x.png": ["--run", "--base"],
    "purify a.png --output=x.png --base=nowhere": ["nowhere", "org/name"],
    "purify a.png --output=x.png --run=nowhere": ["nowhere", "run.json"],
    "purify a.png --output=x.png --base=emoji": ["a.png", "No such file"],
    "purify a.png --output=x.png --timestep=next": ["timestep", "next", "target"],
    "purify a.png --output=x.png --num_steps=0": ["num_steps", "positive"],
    "purify a.png --output=x.png --inverter=base": ["inverter", "base", "unmodified"],
    "purify a.png --output=x.png --base=emoji --guidance_scale=nan": ["a.png"],
    "export --output=x": ["--run", "--base"],
    "export --base=emoji --output=x": ["--delta"],
    "export --base=emoji --delta=x.safetensors --step=3 --output=y": ["--step", "--run"],
    "export --run=nowhere --output=x": ["nowhere", "run.json"],
    "export --run=nowhere --output=x --format=ckpt": ["ckpt", "delta"],
    "export --run=nowhere --output=x.safetensors": ["x.safetensors", "--format=single"],
}


@pytest.mark.parametrize("command", WRONG_COMMANDS)
def test_wrong_commands(esd, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(esd(*command.split()), *WRONG_COMMANDS[command])
    assert tree(tmp_path) == {}


def test_help(esd):
    code, out, err = esd("--help")
    assert (code, err) == (0, "") and all(verb in out for verb in cli.VERBS)
    for verb in cli.VERBS:
        code, out, err = esd(verb, "--help")
        assert (code, err) == (0, "") and f"esd-jax {verb} " in out
        flag = "--[no]overwrite" if verb in ("erase", "sample", "purify", "export") else "--output"
        assert f"  {flag}   " in out or verb == "report"
        assert max(map(len, out.splitlines())) <= 120
    out = re.sub(r"\s+", " ", esd("sample", "--help")[1])
    assert "--delta An ESD delta file to apply. May be repeated." in out and "Sampler steps. [default: 50]" in out
    code, out, err = esd()
    assert (code, out) == (2, "") and "esd-jax VERB --help" in err


@pytest.fixture
def launch(monkeypatch, capsys):
    """Runs `python -m launch` in this process: (exit code, stdout, stderr)."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["launch/__main__.py", *argv])
        monkeypatch.syspath_prepend(ROOT)
        with pytest.raises(SystemExit) as end:
            runpy.run_module("launch", run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("verb", cli.VERBS)
def test_launch_runs_the_verbs(verb, launch):
    config = ["--config=emoji"] if verb in ("erase", "tune") else []
    assert_refused(launch(verb, *config, "--nonsense=3"), "nonsense", f"{verb} --help")


def test_launch_lists_the_verbs(launch, esd):
    assert launch() == (2, "", cli.USAGE + "\n") == esd()
    assert launch("--help") == (0, cli.USAGE + "\n", "") == esd("--help")


def test_launch_passes_the_flags_of_several_hosts_on(launch, monkeypatch):
    plans = []
    verb = dataclasses.replace(cli.VERBS["erase"], run=plans.append)
    monkeypatch.setitem(cli.VERBS, "erase", verb)
    assert launch("erase", "--multihost", "--config=emoji", "--config.fsdp=2")[0] == 0
    assert (plans[0].multihost, plans[0].config.fsdp, plans[0].config.concept) == (True, 2, "neon style")


def test_what_is_not_the_users_mistake_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 / 0)
    monkeypatch.setenv("ESD_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no architecture"):
        cli.guarded(lambda: architectures.read("sd3"))


def test_out_of_memory(capsys):
    def action():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.\nmany lines")

    assert_refused((cli.guarded(action), *capsys.readouterr()), "memory", "batch_size", "remat")


# Settings of a run.

WRONG_SETTINGS = {
    "steps=-1": ["steps=-1", "at least 0"],
    "steps=two": ["steps", "two", "int"],
    "steps=2.5": ["steps", "2.5", "int"],
    "stepz=2": ["'stepz'", "did you mean 'steps'"],
    "zzz=2": ["'zzz'", "concept", "output_dir"],
    "batch_size=0": ["batch_size=0", "at least 1"],
    "checkpoint_every=0": ["checkpoint_every=0"],
    "learning_rate=0": ["learning_rate", "positive"],
    "learning_rate=nan": ["learning_rate=nan", "finite"],
    "eta=inf": ["eta=inf", "finite"],
    "seed=-1": ["seed=-1", "4294967295"],
    "seed=4294967296": ["seed=4294967296", "4294967295"],
    "remat=maybe": ["remat", "maybe"],
    "concept=": ["concept is empty"],
    "concept= ; ": ["concept is empty"],
    "concept=" + "the cat on a dog " * 20: ["is too long", "75 tokens", "dog", "shorter concept"],
    "from_=a dog; a cat": ["from_", "2 parts for 1 concepts"],
    "subset=esdx": ["'esdx'", "did you mean 'esd-x'", "regex:"],
    "subset=regex:[": ["regex:["],
    "subset=regex:zzz": ["regex:zzz", "no tensor"],
    "method=uce2": ["'uce2'", "esd"],
    "sampler=dddim": ["'dddim'", "ddim"],
    "timestep_mode=random": ["'random'", "compvis"],
    "anchor=to": ["'to'", "auto"],
    "optimizer=lion": ["'lion'", "adamw"],
    "dtype=float16": ["'float16'", "bfloat16"],
    "weight_decay=1": ["weight_decay", "adamw"],
    "sampling_steps=1001": ["1001", "1000"],
    "height=7": ["7x16", "multiple of 2"],
    "height=0": ["height=0"],
    "width=-8": ["width=-8"],
    "images=nowhere.png": ["images", "nowhere.png", "No such file"],
    "images=;": ["images", "no file"],
    f"images={__file__}": ["images", __file__, "cannot identify"],
    f"images={Path(__file__).parent}": ["images", "directory"],
    "variant=fp16": ["'fp16'", "no variant"],
    "base=nowhere": ["nowhere", "org/name"],
}


@pytest.mark.parametrize("setting", WRONG_SETTINGS)
def test_wrong_settings(esd, base, tmp_path, setting):
    name, _, value = setting.partition("=")
    assert_refused(esd(*erase(base, tmp_path / "run", **{name: value})), *WRONG_SETTINGS[setting])
    assert tree(tmp_path) == {}


WRONG_CONFIGS = {
    "": ["AttributeError", "get_config"],
    "def get_config(:": ["SyntaxError", "line 1"],
    "import a_package_that_is_not_there": ["ModuleNotFoundError", "a_package_that_is_not_there"],
    "def get_config(): return {}": ["dict", "ConfigDict"],
    "from esd_jax import recipe\ndef get_config(): return recipe.preset('esd', 'papr')": ["'papr'", "paper"],
    "from esd_jax import recipe\ndef get_config(): return recipe.preset('esd', steps='many')": ["steps", "many"],
}


@pytest.mark.parametrize("text", WRONG_CONFIGS)
def test_configs_that_are_wrong(esd, tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    assert_refused(esd("erase", f"--config={tmp_path / 'mine.py'}", "--dry_run"), "mine.py", *WRONG_CONFIGS[text])


def test_a_config_with_an_unknown_field(esd, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from esd_jax import recipe\ndef get_config(): return recipe.preset('esd', 'paper', stepz=3)"
    )
    assert_refused(esd("erase", "--config", tmp_path / "mine.py", "--dry_run"), "'stepz'", "'steps'")


# Bases.


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-8])


def reshape(file):
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**tensors, "conv_in.weight": torch.ones(32, 9, 3, 3)}, file)


WRONG_BASES = {
    "a missing file": (Path.unlink, ["unet", "safetensors"]),
    "a pickle": (lambda file: file.rename(file.with_suffix(".bin")), ["pickle", "safe_serialization=True"]),
    "a file cut short": (cut_short, [UNET, "damaged or incomplete"]),
    "another shape": (reshape, ["'conv_in.weight'", "(32, 9, 3, 3)", "(32, 4, 3, 3)"]),
}


@pytest.mark.parametrize("wrong", WRONG_BASES)
def test_wrong_bases(esd, base, tmp_path, wrong):
    change, words = WRONG_BASES[wrong]
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    change(copy / UNET)
    before = tree(tmp_path)
    assert_refused(esd(*erase(copy, tmp_path / "run")), *words)
    assert_refused(esd("sample", f"--base={copy}", "--prompts=cat", f"--output={tmp_path / 'x.png'}"), *words)
    assert tree(tmp_path) == before


def test_a_delta_of_another_architecture(esd, base, tmp_path):
    (tmp_path / "delta.safetensors").write_bytes(b"")
    delta = tmp_path / "delta.safetensors"
    safetensors.torch.save_file({"mid_block.attentions.7.to_k.weight": torch.ones(3)}, delta)
    before = tree(tmp_path)
    for verb in (["sample", "--prompts=cat"], ["export"]):
        result = esd(*verb, f"--base={base}", f"--delta={delta}", f"--output={tmp_path / 'x'}")
        assert_refused(result, delta, "mid_block.attentions.7")
    assert tree(tmp_path) == before


# Outputs that exist, or cannot.


def test_outputs_are_replaced_only_when_asked(esd, base, finished, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("mine")
    (tmp_path / "x.png").mkdir()
    before, sample = tree(tmp_path), ["sample", f"--base={base}", "--prompts=cat; dog", "--num_steps=2"]
    export = ["export", f"--run={finished}"]
    for command, name, words in [
        (sample, "file", ["exists", "--overwrite"]),
        (sample, "folder", ["exists", "--overwrite"]),
        ([*sample, "--overwrite"], "file", ["file", "a folder should be"]),
        ([*sample, "--overwrite"], "folder", ["folder", "thesis"]),
        ([*sample, "--overwrite"], "x.png", ["x.png", "is a folder"]),
        (sample, "file/x.png", ["cannot write", "file/x.png"]),
        (export, "file", ["exists", "--overwrite"]),
        (export, "folder", ["exists", "--overwrite"]),
        ([*export, "--overwrite"], "file", ["a file", "a folder should be"]),
        ([*export, "--overwrite"], "folder", ["no diffusers folder"]),
        ([*export, "--step=7"], "x", ["no checkpoint of step 7"]),
        ([*export, "--overwrite", "--format=single"], "x", ["x", ".safetensors file"]),
        (export, "file/x", ["cannot write", "file/x"]),
        (erase(base, tmp_path / "file"), "x", ["file", "must be a folder"]),
        (erase(base, tmp_path / "folder"), "x", ["folder", "exists", "another output_dir"]),
        (erase(base, tmp_path / "folder", "--overwrite"), "x", ["not a run of ours"]),
        (erase(base, tmp_path / "file" / "run"), "x", ["cannot write", "file/run"]),
        (erase(base, base / "run"), "x", ["overlap"]),
        (erase(base, base.parent, "--overwrite"), "x", ["overlap"]),
    ]:
        output = [] if command[0] == "erase" else [f"--output={tmp_path / name}"]
        assert_refused(esd(*command, *output), *words)
        assert tree(tmp_path) == before
    assert not (base / "run").exists()


def test_sampled_images(esd, base, finished, tmp_path):
    (delta,) = finished.glob("*.safetensors")
    sample = ["sample", f"--base={base}", "--num_steps=2", "--seed=3"]
    (tmp_path / "prompts.txt").write_text("cat\n\na photo of the dog \n")
    expected = esd_jax.sample(esd_jax.load(base), ["cat", "a photo of the dog"], num_steps=2, seed=3)

    assert esd(*sample, "--prompts=cat; a photo of the dog", f"--output={tmp_path / 'a.PNG'}")[0] == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.PNG")), np.concatenate(list(expected), axis=1))
    for _ in range(2):
        code, out, err = esd(*sample, f"--prompts={tmp_path}/prompts.txt", f"--output={tmp_path}/b", "--overwrite")
        assert (code, out, err) == (0, f"2 images in {tmp_path}/b\n", "")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["00000.png", "00001.png"]
    for i, image in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b" / f"{i:05d}.png")), image)
    # The delta is in bfloat16, so it is nearly, not exactly, the model that was trained.
    assert esd(*sample, "--prompts=cat", f"--delta={delta}", f"--output={tmp_path}/c", "--overwrite")[0] == 0
    erased = esd_jax.sample(esd_jax.load(finished / "model"), ["cat"], num_steps=2, seed=3)[0]
    found = np.asarray(Image.open(tmp_path / "c" / "00000.png"))
    assert np.abs(found.astype(int) - erased).mean() < 0.1 * np.abs(expected[0].astype(int) - erased).mean()


def test_a_csv_is_sampled_as_it_is_evaluated(esd, base, tmp_path):
    """With its own seeds, unless one is given; a mark before a text's first prompt is no part of it."""
    (tmp_path / "p.csv").write_text('\ufeffprompt,evaluation_seed\n"cat; dog",7\nthe cat,\n', encoding="utf-8")
    (tmp_path / "p.txt").write_text("\ufeffcat; dog\nthe cat\n", encoding="utf-8")
    pipeline, cases = esd_jax.load(base), prompts.load(tmp_path / "p.csv").cases
    assert [case.prompt for case in cases] == ["cat; dog", "the cat"] and cases[0].seed == 7
    command = ["sample", f"--base={base}", "--num_steps=2", f"--output={tmp_path / 'x.png'}", "--overwrite"]
    for flags, seed in (
        ([f"--prompts={tmp_path}/p.csv"], [case.seed for case in cases]),
        ([f"--prompts={tmp_path}/p.csv", "--seed=3"], 3),
        ([f"--prompts={tmp_path}/p.txt", "--seed=3"], 3),
    ):
        assert esd(*command, *flags)[0] == 0
        expected = esd_jax.sample(pipeline, ["cat; dog", "the cat"], num_steps=2, seed=seed)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), np.concatenate(expected, axis=1))


def test_bytes_that_are_no_text_in_any_locale(esd, base, tmp_path):
    for flags in (
        ["--prompts=caf\udce9"],
        ["--prompts=cat", "--negative_prompt=\udce9"],
        ["--prompts=a", "--edit=\udce9"],
    ):
        command = ["sample", f"--base={base}", "--num_steps=2", *flags]
        assert_refused(esd(*command, f"--output={tmp_path / 'x.png'}"), r"\udce9", "UTF-8")
    assert tree(tmp_path) == {}


def test_images_sampled_by_rules(esd, base, tmp_path):
    prompts, options = ["cat", "a photo of the dog"], {"num_steps": 3, "seed": 3}
    pipeline = esd_jax.load(base)
    edits = (Edit("dog", scale=-4, warmup=1, threshold=0.5), Edit("a photo"))
    for flags, arguments in [
        (["--sld=max", "--safety_prompt=dog", "--reweight=cat=0.5", "--reweight=the dog=2"],
         {"rule": SLD.preset("max", "dog"), "reweight": {"cat": 0.5, "the dog": 2.0}}),
        (["--edit=dog; scale=-4; warmup=1 ;threshold=.5", "--edit=a photo"], {"rule": SEGA(edits)}),
    ]:  # fmt: skip
        command = ["sample", f"--base={base}", "--num_steps=3", "--seed=3", f"--prompts={';'.join(prompts)}"]
        code, out, err = esd(*command, f"--output={tmp_path / 'x.png'}", "--overwrite", *flags)
        assert (code, out, err) == (0, f"2 images in {tmp_path / 'x.png'}\n", "")
        expected = esd_jax.sample(pipeline, prompts, **options, **arguments)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), np.concatenate(expected, axis=1))


@pytest.mark.slow
def test_purified_images(esd, base, finished, tmp_path):
    """Files of any size are scaled and cropped; flags may stand before or behind them."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    command = ["purify", files[0], f"--base={base}", "--num_steps=3", f"--output={tmp_path / 'x'}", files[1]]
    pipeline, inputs = esd_jax.load(base), pictures[:, :, 4:20]
    options = {"num_steps": 3, "guidance_scale": 1.0}
    expected = esd_jax.purify(pipeline, inputs, "cat", **options)
    alone = sampling.reconstruct(pipeline, inputs)
    report = ["likeness to the inputs (SSIM), mean and lowest", likeness("these images", expected, inputs)]
    last = likeness("by the autoencoder alone", alone, inputs)
    out = "\n".join([f"2 images in {tmp_path / 'x'}", *report, last, ""])
    assert esd(*command, "--prompt=cat") == (0, out, "")
    found = np.stack([np.asarray(Image.open(tmp_path / "x" / f"{i:05d}.png")) for i in range(2)])
    np.testing.assert_array_equal(found, expected)
    code, out, err = esd(*command, "--prompt=cat", "--nocompare", "--overwrite")
    assert (code, out.splitlines()[1:], err) == (0, report, "")

    # An erased model is compared with what its base does.
    plain = likeness("by the unmodified weights", esd_jax.purify(pipeline, inputs, **options), inputs)
    model = esd_jax.load(finished / "model")
    erased = {
        "unmodified": esd_jax.purify(model, inputs, inverter=pipeline, **options),
        "itself": esd_jax.purify(model, inputs, **options),
    }
    assert (erased["unmodified"] != erased["itself"]).any()
    (delta,) = finished.glob("*.safetensors")
    for named, inverter in [
        ([f"--run={finished}"], "unmodified"),
        ([f"--run={finished}"], "itself"),
        ([f"--base={base}", f"--delta={delta}"], "unmodified"),
    ]:
        flags = [f"--inverter={inverter}", "--num_steps=3", f"--output={tmp_path / 'y'}", "--overwrite"]
        code, out, err = esd("purify", *files, *named, *flags)
        assert (code, out.splitlines()[3:], err) == (0, [plain, last], "")
        if len(named) == 1:  # a delta is in bfloat16
            assert out.splitlines()[2] == likeness("these images", erased[inverter], inputs)
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "y" / "00001.png")), erased[inverter][1])


def likeness(name, images, inputs):
    """A line of what purify tells."""
    found = ssim(images, inputs)
    return f"  {name:26}{found.mean():.3f}  {found.min():.3f}"


# Prompts, and our own warnings.


def test_a_prompt_that_is_too_long_is_cut_with_one_warning(esd, base, tmp_path, capsys):
    prompt = "the cat " * 37 + "at last dog and style"  # 75 tokens are read: the 37 pairs, and "at"
    code, out, err = esd(
        "sample", f"--base={base}", f"--prompts={prompt}", "--num_steps=2", f"--output={tmp_path / 'x.png'}"
    )
    assert (code, out) == (0, f"1 images in {tmp_path / 'x.png'}\n")
    assert err.startswith("esd-jax: warning: ") and err.count("\n") == 1
    assert err.rstrip().endswith("so these words are lost: 'last dog and style'")

    factories.make_sdxl(tmp_path / "sdxl")
    assert cli.guarded(lambda: esd_jax.load(tmp_path / "sdxl").encode_prompts([prompt])) == 0
    assert capsys.readouterr().err == err


def test_a_component_that_the_export_leaves_out_is_told(esd, base, run, tmp_path):
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
    code, _, err = esd("export", f"--run={run}", f"--base={copy}", f"--output={tmp_path / 'x'}")
    assert code == 0
    assert re.fullmatch(r"esd-jax: warning: .*safety_checker\n", err)


# Runs that fail, are resumed, are replaced.


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
    assert_refused(esd(*erase(base, run)), "run", "resume it, overwrite it")
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
    told, before = (header.pop("__metadata__") for header in headers)
    assert headers[0] == headers[1] and told == {**told, **before} and told["esd_jax.measured"] == "no"
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
    assert code == 0 and re.fullmatch(r"esd-jax: warning: the checkpoint of step 2 in .* going on from step 1\n", err)
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


# Child processes: what reaches the terminal, what is imported, how much memory is used.

VERBS_CHILD = """
import json, sys
if sys.argv[2] == "no torch":
    sys.modules |= {"torch": None, "diffusers": None}  # as if they were not installed
from esd_jax import cli
for argv in json.loads(sys.argv[1]):
    assert cli.main(argv) == 0
    print("---")
assert not sys.modules.get("torch") and not sys.modules.get("diffusers"), "torch was imported"
"""


@pytest.mark.slow
def test_nothing_but_our_own_words_reaches_the_terminal(base, tmp_path):
    """Without a compilation cache and without torch installed; then with both."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for i, installed in enumerate(["no torch", "torch"]):
        run = tmp_path / f"run{i}"
        commands = [
            erase(base, run),
            ["sample", f"--base={base}", "--prompts=cat", "--num_steps=2", f"--output={tmp_path}/{i}.png"],
            ["export", f"--run={run}", f"--output={tmp_path}/model{i}"],
            ["erase", "--config=esd_x", f"--config.base={base}", "--dry_run"],
        ]
        commands = json.dumps([list(map(str, argv)) for argv in commands])
        child = subprocess.run(
            [sys.executable, "-c", VERBS_CHILD, commands, installed],
            env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr
        assert re.fullmatch(r"step 2/2  loss \S+  \d+ s, \d+ s left\n", child.stderr)
        erased, sampled, exported, planned, _ = child.stdout.split("---\n")
        delta = f"{run}/esd-cat-from-cat-esdx.safetensors"
        assert erased == f"erased 'cat' from {base}\n  model  {run}/model\n  delta  {delta}\n  run    {run}\n"
        assert sampled == f"1 images in {tmp_path}/{i}.png\n"
        what = r"  diffusers folder, \S+ MB\n  verified: 20 trained tensors in float32, \d+ others as they were; "
        assert re.fullmatch(f"{tmp_path}/model{i}{what}the same image within 0 of 255\n", exported), exported
        assert planned.startswith(f"base      {base}\nsubset    esd-x\ntrained   ")
        headings = [line.split()[0] for line in planned.splitlines() if line[0] != " "]
        assert headings == ["base", "subset", "trained", "memory", "compute"]
    assert any((tmp_path / "cache" / "esd_jax" / "xla").iterdir())
    (first, second) = ((tmp_path / f"model{i}" / UNET).read_bytes() for i in range(2))
    assert first == second


def test_importing_the_package_is_quick_and_silent():
    code = (
        "import sys, time; began = time.monotonic(); import esd_jax; seconds = time.monotonic() - began\n"
        "heavy = {'jax', 'flax', 'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'{seconds} s, {heavy}' if heavy or seconds > 2 else 0)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


# A process of its own, since a child of this one would start with this one's memory.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arch", "trained", "total"),
    [
        ("sd14", "80 tensors, 43,962,560 scalars", "859,520,964"),
        pytest.param("sd21", "80 tensors, 50,352,320 scalars", "865,910,724", marks=pytest.mark.slow),
        pytest.param("sd21-base", "80 tensors, 50,352,320 scalars", "865,910,724", marks=pytest.mark.slow),
        pytest.param("sdxl", "350 tensors, 545,670,400 scalars", "2,567,463,684", marks=pytest.mark.slow),
    ],
)
def test_dry_runs_need_no_weights_and_little_memory(arch, trained, total):
    command = [sys.executable, "-m", "esd_jax.cli", "erase", "--config=esd_x", "--dry_run", f"--arch={arch}"]
    child = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    assert f"trained   {trained}" in child.stdout and f"the denoiser's {total})" in child.stdout
    bias = r"\n +down_blocks\.\d\.attentions\.0\.transformer_blocks\.0\.attn2\.to_out\.0\.bias\n"
    assert re.search(bias, child.stdout)
    assert int(child.stderr) < 2**20  # KiB


# The configs that the package carries.

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_make_a_recipe_and_say_how_to_run_it(name, monkeypatch):
    plans = []
    verb = dataclasses.replace(cli.VERBS["erase"], run=lambda v: plans.append(v.config.to_dict()))
    monkeypatch.setitem(cli.VERBS, "erase", verb)
    doc = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["__doc__"].replace("\\\n", " ")
    commands = [shlex.split(line) for line in doc.splitlines() if line.strip().startswith("esd-jax ")]
    assert commands and all(f"--config={name}" in command for command in commands)
    for command in commands:
        assert cli.main(command[1:]) == 0
    for fields in plans:
        plan = recipe.make(**fields)
        assert plan.concepts and plan.output_dir
        arch = "sdxl" if "xl" in plan.base else "sd21" if "2-1" in plan.base else "sd14"
        configs, _ = api.architecture(arch)
        assert select(plan.subset, network(configs["unet"], plan.dtype).layouts)


def test_fields_that_configs_leave_unsaid_have_flags(monkeypatch, capsys):
    plans = []
    verb = dataclasses.replace(cli.VERBS["erase"], run=lambda v: plans.append(v.config.to_dict()))
    monkeypatch.setitem(cli.VERBS, "erase", verb)
    assert cli.main(["erase", "--config=esd2025_sdxl", "--config.null=zeros", "--config.as_released"]) == 0
    assert cli.main(["erase", "--config=esd2025_sdxl"]) == 0
    assert (plans[0].pop("null"), plans[0].pop("as_released")) == ("zeros", True) and plans[0] == plans[1]
    assert cli.main(["erase", "--config=esd_x", "--config.contexts=a dog by {}: a dog", "--config.window=0.5"]) == 0
    assert (plans[2]["contexts"], plans[2]["window"]) == ("a dog by {}: a dog", 0.5)
    assert cli.main(["erase", "--config=sdd", "--config.as_released"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "as_released" in error and "'esd'" in error


def test_the_package_knows_its_configs():
    assert tuple(recipe.config_names()) == tuple(CONFIGS)
    for name in CONFIGS:
        plan = recipe.make(**recipe.read(name).to_dict())
        assert recipe.make(**plan.flat()) == plan
