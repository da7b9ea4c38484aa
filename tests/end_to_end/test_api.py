"""The contract: load, erase, sample, export from Python, on tiny checkpoints that torch diffusers wrote and opens."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import factories
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from calm import assert_same_images, make_calm, noise, torch_images, uint8
from command_line import without_progress
from messages import one_line
from PIL import Image
from torch_oracle import to_nhwc

import esd_jax
from esd_jax import api, recipe, runs
from esd_jax.io.diffusers import read_exact
from esd_jax.selection import select

FIELDS = {"steps": 2, "sampling_steps": 4, "timestep_mode": "grid", "learning_rate": 1e-3, "seed": 7}
SUBSET = "esd-x-strict"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """A folder, and the torch pipeline that wrote it."""
    folder = tmp_path_factory.mktemp("bases") / "sd1"
    return folder, make_calm("sd1", folder)


@pytest.fixture(scope="module")
def base(sd1):
    return esd_jax.load(sd1[0])


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run's folder, and the erased pipeline in memory."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, esd_jax.erase(base, "cat", subset=SUBSET, output_dir=folder, **FIELDS)


def tensors(folder):
    """Every tensor in a folder's weights, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        (str(file.relative_to(folder)), name): value
        for file in files
        for name, value in safetensors.torch.load_file(file).items()
    }


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        assert actual[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), name


# load -> erase -> sample -> export


def test_load_erase_sample_export(sd1, base, run, tmp_path):
    erased = run[1]
    trained = {f"unet/{name}" for name in select(SUBSET, base.network("unet").layouts)}
    assert erased.edits.keys() == trained and base.edits == {}
    for name, value in erased.edits.items():
        assert value.dtype == jnp.float32 and jnp.isfinite(value).all()
        assert 0 < jnp.abs(value - base.params["unet"][name.removeprefix("unet/")]).max() < 0.01
    (erasure,) = erased.provenance.erased
    everywhere = {"from_": None, "replace_with": [], "preserve": [], "strength": 1.0}
    assert erasure.to_dict()["concepts"] == [{"text": "cat", **everywhere}]
    assert (erasure.recipe["subset"], erasure.recipe["seed"], erasure.step) == (SUBSET, 7, 2)

    folder = esd_jax.export(erased, tmp_path / "out")
    changed = {
        f"unet/{name}"
        for (file, name), value in tensors(folder).items()
        if not value.equal(tensors(sd1[0])[file, name])
    }
    assert changed == trained

    latents, prompts = noise(2), ["a photo of the cat", "dogs"]
    images = esd_jax.sample(erased, prompts, latents=latents, steps=20, sampler="ddim")
    theirs = uint8(torch_images(diffusers.StableDiffusionPipeline.from_pretrained(folder), latents, prompts))
    assert_same_images(images, theirs)
    before = esd_jax.sample(base, prompts, latents=latents, steps=20, sampler="ddim")
    assert np.abs(before.astype(int) - images).max() > 1
    reopened = esd_jax.load(folder)
    np.testing.assert_array_equal(
        esd_jax.sample(reopened, ["dogs"], steps=2), esd_jax.sample(erased, ["dogs"], steps=2)
    )
    assert reopened.provenance.erased == (erasure,)


def test_a_run_holds_its_model_and_exports_name_no_local_path(sd1, run):
    folder, erased = run
    assert_same_bits(tensors(folder / "model"), tensors(esd_jax.export(erased, folder.with_name("again"))))
    (delta,) = folder.glob("esd-cat-from-cat-*.safetensors")
    for file in (delta, folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"):
        assert str(Path(sd1[0]).parent).encode() not in file.read_bytes()
    (erasure,) = erased.provenance.erased
    assert erasure.base == erasure.recipe["base"] == Path(sd1[0]).name


@pytest.mark.slow
def test_a_run_is_exported_alike_by_another_process(run, tmp_path):
    esd_jax.export(run[1], tmp_path / "here")
    script = Path(sys.executable).with_name("esd-jax")
    command = [script] if script.exists() else [sys.executable, "-m", "esd_jax.cli"]
    command = [*command, "export", f"--run={run[0]}", f"--output={tmp_path / 'there'}"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (child.returncode, without_progress(child.stderr)) == (0, "")
    assert child.stdout.startswith(f"{tmp_path / 'there'}  diffusers folder, ") and "verified: " in child.stdout
    (tmp_path / "there" / "README.md").unlink()  # the command adds a card
    here, there = (sorted((p.name, p.stat().st_mode) for p in (tmp_path / n).rglob("*")) for n in ("here", "there"))
    assert here == there
    assert_same_bits(tensors(tmp_path / "there"), tensors(tmp_path / "here"))
    first = api.restore(run[0], step=2)
    assert first.provenance.erased == run[1].provenance.erased


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("file", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_run_of_no_steps_exports_the_base_bit_for_bit(compute, file, tmp_path):
    factories.make_sd1(tmp_path / "base", dtype=file)
    erased = esd_jax.erase(
        esd_jax.load(tmp_path / "base", dtype=compute), "cat", subset="full", **{**FIELDS, "steps": 0}
    )
    assert len(erased.edits) == len(erased.params["unet"])
    esd_jax.export(erased, tmp_path / "out")
    assert_same_bits(tensors(tmp_path / "out"), tensors(tmp_path / "base"))


def test_bfloat16_trains_in_full_precision_and_exports_the_files_dtype(tmp_path):
    factories.make_sd1(tmp_path / "base", dtype=torch.float16)
    base = esd_jax.load(tmp_path / "base", dtype="bfloat16")
    erased = esd_jax.erase(base, "cat", subset=SUBSET, **FIELDS)
    assert {value.dtype for value in erased.params["unet"].values()} == {jnp.dtype("bfloat16")}
    start = read_exact(base, erased.edits)
    for name, value in erased.edits.items():
        change = np.abs(value - start[name])
        assert value.dtype == jnp.float32 and 0 < change.max() < 0.01
        # Two updates of about 1e-3 each move nearly everything; in bfloat16, most would round away.
        assert (change > 1e-4).mean() > 0.9
    before, after = tensors(tmp_path / "base"), tensors(esd_jax.export(erased, tmp_path / "out"))
    assert {value.dtype for value in after.values()} == {torch.float16}
    assert {
        f"unet/{name}" for (_, name), value in after.items() if not value.equal(before[_, name])
    } == erased.edits.keys()
    with pytest.raises(ValueError, match=one_line("computes in bfloat16", "load it with dtype='float32'")):
        esd_jax.erase(base, "cat", dtype="float32")


def test_resuming_a_finished_run_returns_its_weights(base, run):
    folder, erased = run
    log = (folder / "log.jsonl").read_bytes()
    again = esd_jax.erase(base, "cat", subset=SUBSET, output_dir=folder, resume=True, **FIELDS)
    for name, value in erased.edits.items():
        np.testing.assert_array_equal(again.edits[name], value)
    assert (folder / "log.jsonl").read_bytes() == log
    with pytest.raises(ValueError, match=one_line("steps=1", "has made 2", "steps=2 or more")):
        esd_jax.erase(base, "cat", subset=SUBSET, output_dir=folder, resume=True, **{**FIELDS, "steps": 1})


def test_erasing_twice(base, run, tmp_path):
    """In memory one erasure builds on another; a run, which must be restorable, needs its base in files."""
    with pytest.raises(ValueError, match=one_line("edits that its files lack", "export")):
        esd_jax.erase(run[1], "dog", output_dir=tmp_path / "run", **FIELDS)
    assert not (tmp_path / "run").exists()
    twice = esd_jax.erase(run[1], "dog", subset=SUBSET, **{**FIELDS, "steps": 0})
    assert [erasure.texts for erasure in twice.provenance.erased] == [("cat",), ("dog",)]
    for name, value in run[1].edits.items():
        np.testing.assert_array_equal(twice.edits[name], value)


# What is erased, and how it is said.


def test_several_concepts_and_places(base):
    """Every way of saying it makes the same run."""
    recipes = [
        {"concept": ["cat", "dog"], "from_": ["", "a photo of the cat"]},
        {"concept": "cat; dog", "from_": "; a photo of the cat"},
        {"concept": ("cat", " dog "), "from_": (" ", "a photo of the cat")},
    ]
    plans = [recipe.make(**fields) for fields in recipes]
    assert {plan.concepts for plan in plans} == {plans[0].concepts}
    assert [(c.text, c.from_) for c in plans[0].concepts] == [("cat", None), ("dog", "a photo of the cat")]
    assert [c.from_ for c in recipe.make(concept="a; b", from_="c").concepts] == ["c", "c"]
    assert [c.from_ for c in recipe.make(concept="a; b").concepts] == [None, None]
    for wrong in ("a; b", "a; b; c; d"):
        with pytest.raises(ValueError, match=one_line("from_", "for 3 concepts")):
            _ = recipe.make(concept="a; b; c", from_=wrong).concepts
    erased = esd_jax.erase(base, **recipes[0], subset=SUBSET, **{**FIELDS, "batch_size": 2})
    assert erased.provenance.erased[0].concepts == plans[0].concepts
    assert all(jnp.isfinite(value).all() for value in erased.edits.values())


@pytest.mark.slow
@torch.no_grad()
def test_a_memorised_picture(sd1, base, tmp_path):
    """Scaled to cover 16 x 16 and cropped to its middle; what the run learns from is the mean of its latents."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(picture[:, 12:28]).convert("RGBA").save(tmp_path / "middle.png")
    paths = [tmp_path / "picture.png", tmp_path / "middle.png"]
    plan = recipe.make(**{**recipe.read("sd14_memorised").to_dict(), **FIELDS, "concept": "cat", "images": paths})
    setup = runs.assemble(base, plan)
    pixels = torch.from_numpy(picture[None, :, 12:28] / 127.5 - 1).float().permute(0, 3, 1, 2)
    theirs = sd1[1].vae.encode(pixels).latent_dist.mean * sd1[1].vae.config.scaling_factor
    assert setup.shape == (8, 8, 4)
    np.testing.assert_allclose(setup.inputs.images, np.repeat(to_nhwc(theirs), 2, axis=0), atol=1e-5)
    erased = esd_jax.erase(base, "cat", images=paths, subset=SUBSET, **FIELDS)
    assert all(0 < jnp.abs(v - base.params["unet"][k[5:]]).max() < 0.01 for k, v in erased.edits.items())


WRONG_ARGUMENTS = [
    ({"step": 2}, ["'step'", "did you mean 'steps'"]),
    ({"lr": 1e-5}, ["'lr'", "learning_rate"]),
    ({"steps": "2"}, ["steps='2'", "str", "int"]),
    ({"steps": 2.0}, ["steps=2.0", "float", "int"]),
    ({"steps": True}, ["steps=True", "bool", "int"]),
    ({"steps": None}, ["steps=None", "int"]),
    ({"remat": 1}, ["remat=1", "bool"]),
    ({"eta": "1"}, ["eta='1'", "float"]),
    ({"eta": float("nan")}, ["eta=nan", "finite"]),
    ({"subset": ["esd-x"]}, ["subset=['esd-x']", "list", "str"]),
    ({"subset": "esd-y"}, ["'esd-y'", "'esd-x'"]),
    ({"concept": ""}, ["concept is empty"]),
    ({"concept": []}, ["concept is empty"]),
    ({"concept": 3}, ["concept=3", "str"]),
    ({"concept": "cats and dogs " * 30}, ["too long", "fewer words"]),
    ({"images": []}, ["images", "no file"]),
    ({"height": 7}, ["7x16", "multiple of 2"]),
    ({"config": "emojy"}, ["'emojy'", "emoji"]),
    ({"resume": True}, ["resume needs output_dir"]),
    ({"overwrite": True}, ["overwrite needs output_dir"]),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG_ARGUMENTS, ids=lambda a: str(a)[:40])
def test_wrong_arguments(base, arguments, words):
    with pytest.raises((ValueError, FileNotFoundError), match=one_line(*words)):
        esd_jax.erase(base, **{"concept": "cat", **FIELDS, **arguments})


def test_wrong_sources(tmp_path):
    for source in ("nowhere", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=one_line("nowhere", "org/name")):
            esd_jax.load(source)
        with pytest.raises(FileNotFoundError, match=one_line("nowhere")):
            esd_jax.erase(source, "cat")
    for dtype in ("float8", "int32", "fp16"):
        with pytest.raises(ValueError, match=one_line("dtype", dtype, "float32")):
            esd_jax.load("emoji", dtype=dtype)


def test_values_may_be_numpys_and_paths(tmp_path):
    plan = recipe.make(steps=np.int64(3), eta=np.float32(2), learning_rate=1, output_dir=tmp_path, height=np.int32(8))
    assert (plan.training.steps, plan.settings.eta, plan.optimizer.learning_rate) == (3, 2.0, 1.0)
    assert plan.output_dir == str(tmp_path)
    json.dumps(plan.flat())
