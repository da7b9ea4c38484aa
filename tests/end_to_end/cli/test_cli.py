"""The command line under careless use: every mistake ends in one line and exit code 2, and harms nothing."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import jax
import pytest
from command_line import assert_refused, erase, tree
from paths import ROOT

from esd_jax import cli
from esd_jax.cli.common import fitted
from esd_jax.models import architectures

# The command line itself.

WRONG_COMMANDS = {
    "erese": ["'erese'", "did you mean 'erase'"],
    "erase": ['esd-jax erase [BASE] "CONCEPT"'],
    "erase --config": ["--config needs a value"],
    "erase --config.steps=3": ['esd-jax erase [BASE] "CONCEPT"'],
    "erase emoji": ['esd-jax erase emoji "CONCEPT"'],
    "erase neon style": ["no model 'neon'", 'esd-jax erase "neon style"'],
    "erase emoji neon style": ["'style'", "quotes", 'esd-jax erase emoji "neon style"'],
    "erase emoji neon --concept=ink": ["twice", "'neon'", "--concept=ink"],
    "erase CompVis/stable-diffusion-v1-4": ["CompVis/stable-diffusion-v1-4", "--concept="],
    "erase neon -o=": ["folder is empty", "-o DIR"],
    "erase neon --arch=sd15 --dry_run": ["--arch=sd15", "sd14"],
    "erase neon --config=emoji --kind=style": ["kind='style'", "leave kind out"],
    "demo cat dog": ["'dog'", "quotes"],
    "demo --seed": ["--seed needs a value"],
    "erase neon --stpes=3": ["'--stpes'", "did you mean --steps"],
    "erase neon --steps": ["--steps needs a value"],
    "erase neon --steps=abc": ["--steps=abc", "whole number"],
    "erase neon --eta=big": ["--eta=big", "number"],
    "erase neon --kind=stile": ["kind='stile'", "did you mean 'style'"],
    "erase neon --kind=attribute": ["kind='attribute'", "from_"],
    "erase neon --method=uec": ["method='uec'", "did you mean 'uce'"],
    "erase neon --ema=0.5": ["'ema'", "sdd"],
    "erase --config=emojy": ["'emojy'", "did you mean 'emoji'"],
    "erase --config=nowhere/mine.py": ["nowhere/mine.py"],
    "erase --config=emoji --ovewrite": ["ovewrite", "overwrite"],
    "erase --config=emoji --prompts=cat": ["'--prompts'", "--stop_prompts"],
    "erase --config=emoji --arch=sd14": ["--arch", "--dry_run"],
    "erase --config=emoji --compile": ["--compile", "--dry_run"],
    "erase --config=emoji --dry_run --arch=sd15": ["sd15", "sd14", "sdxl"],
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
    "sample --output=x.png --prompts=cat --num_steps=-1": ["--steps=-1", "positive"],
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
    "purify a.png --output=x.png --num_steps=0": ["--steps=0", "positive"],
    "purify a.png --output=x.png --inverter=base": ["inverter", "base", "unmodified"],
    "purify a.png --output=x.png --base=emoji --guidance_scale=nan": ["a.png"],
    "export --output=x": ["a RUN", "--base"],
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
        assert f"  {flag}   " in out or verb in ("report", "configs", "completion")
        assert max(map(len, out.splitlines())) <= 120
        assert esd("help", verb)[1] == out
    assert "--learning_rate" in esd("erase", "--help")[1] and "esd-x-strict" in esd("erase", "--help")[1]
    out = re.sub(r"\s+", " ", esd("sample", "--help")[1])
    assert "--delta What to apply to it: a delta, a difference, a LoRA, or the transformer of FLUX or SD3 alone." in out
    assert "--steps Sampler steps; by default the model's own: 50 of Stable Diffusion" in out
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
    assert_refused(launch(verb, *config, "--qqqqqq=3"), "--qqqqqq", "--help")


def test_launch_lists_the_verbs(launch, esd):
    assert launch() == (2, "", fitted(cli.USAGE) + "\n") == esd()
    assert launch("--help") == (0, fitted(cli.USAGE) + "\n", "") == esd("--help")


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
    "steps=two": ["steps=two", "whole number"],
    "steps=2.5": ["steps=2.5", "whole number"],
    "stepz=2": ["'stepz'", "did you mean 'steps'"],
    "zzz=2": ["'zzz'", "erase --help"],
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
    "concept=" + "the cat on a dog " * 20: ["is too long", "75 tokens", "dog", "fewer words"],
    "from_=a dog; a cat": ["from_", "2 parts for 1 concepts"],
    "subset=esdx": ["'esdx'", "did you mean 'esd-x'"],
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
