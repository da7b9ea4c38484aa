"""Bases, outputs and prompts from the command line: what is wrong is refused, and nothing is replaced unasked."""

import json
import re
import shutil
from pathlib import Path

import factories
import numpy as np
import pytest
import safetensors.torch
import torch
from command_line import UNET, assert_refused, erase, tree
from PIL import Image

import esd_jax
from esd_jax import cli, sampling
from esd_jax.diffusion.rules import SEGA, SLD, Edit
from esd_jax.evaluation import prompts
from esd_jax.metrics.likeness import ssim

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
        (erase(base, tmp_path / "folder"), "x", ["folder", "exists", "no run of ours", "-o names another"]),
        (erase(base, tmp_path / "folder", "--overwrite"), "x", ["not a run of ours"]),
        (erase(base, tmp_path / "file" / "run"), "x", ["cannot write", "file/run"]),
        (erase(base, base / "run"), "x", ["overlap"]),
        (erase(base, base.parent, "--overwrite"), "x", ["overlap"]),
    ]:
        output = [] if command[0] == "erase" else [f"--output={tmp_path / name}"]
        assert_refused(esd(*command, *output), *words)
        assert tree(tmp_path) == before
    assert not (base / "run").exists()


def test_messages_name_flags(esd, base, run, tmp_path):
    """And not the arguments of the Python functions that raise them."""
    assert_refused(esd("export", f"--run={run}", "--format="), "--format= names no format", "lora")
    for output in ([], [f"--output={tmp_path / 'all'}"]):
        command = ["export", f"--run={run}", "--format=delta,difference", *output]
        assert esd(*command)[0] == 0
        assert_refused(esd(*command), "exists: give --overwrite to replace it, or choose another name")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = safetensors.torch.load_file(other / UNET)
    safetensors.torch.save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1}, other / UNET)
    for kind in ("merge", "delta"):
        (part,) = (tmp_path / "all").glob("*delta.safetensors" if kind == "merge" else "*difference.safetensors")
        code, _, err = esd("export", f"--base={other}", f"--{kind}={part}", f"--output={tmp_path / 'x'}")
        assert code == 2 and "another base" in err and "force" not in err and err.endswith("...\n")


def test_sampled_images(esd, base, finished, tmp_path):
    (delta,) = finished.glob("*.safetensors")
    sample = ["sample", f"--base={base}", "--num_steps=2", "--seed=3"]
    (tmp_path / "prompts.txt").write_text("cat\n\na photo of the dog \n")
    expected = esd_jax.sample(esd_jax.load(base), ["cat", "a photo of the dog"], steps=2, seed=3)

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
    erased = esd_jax.sample(esd_jax.load(finished / "model"), ["cat"], steps=2, seed=3)[0]
    actual = np.asarray(Image.open(tmp_path / "c" / "00000.png"))
    assert np.abs(actual.astype(int) - erased).mean() < 0.1 * np.abs(expected[0].astype(int) - erased).mean()


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
        expected = esd_jax.sample(pipeline, ["cat; dog", "the cat"], steps=2, seed=seed)
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
    prompts, options = ["cat", "a photo of the dog"], {"steps": 3, "seed": 3}
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
    options = {"steps": 3, "guidance_scale": 1.0}
    expected = esd_jax.purify(pipeline, inputs, "cat", **options)
    alone = sampling.reconstruct(pipeline, inputs)
    report = ["similarity to the inputs (SSIM), mean and lowest", likeness("these images", expected, inputs)]
    last = likeness("by the autoencoder alone", alone, inputs)
    out = "\n".join([f"2 images in {tmp_path / 'x'}", *report, last, ""])
    assert esd(*command, "--prompt=cat") == (0, out, "")
    actual = np.stack([np.asarray(Image.open(tmp_path / "x" / f"{i:05d}.png")) for i in range(2)])
    np.testing.assert_array_equal(actual, expected)
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
    likeness = ssim(images, inputs)
    return f"  {name:26}{likeness.mean():.3f}  {likeness.min():.3f}"


def test_a_run_is_exported_by_its_folder_alone(esd, run):
    """Into the run, under the name of what was erased; and one folder is all that may stand alone."""
    code, out, err = esd("export", run, "--format=delta")
    assert code == 0, err
    (file,) = (run / "exports").glob("*.safetensors")
    assert out.startswith(f"{file}  ") and "without-cat" in file.name and "verified: 20 trained tensors" in out
    assert_refused(esd("export", run, run, "--format=delta"), f"{run}", "--name=value")
    assert_refused(esd("export", run, f"--run={run}"), f"{run}", "--name=value")
    assert_refused(esd("export", "--format=delta"), "a RUN", "--base")


# Prompts, and our own warnings.


def test_a_prompt_that_is_too_long_is_cut_with_one_warning(esd, base, tmp_path, capsys):
    prompt = "the cat " * 37 + "at last dog and style"  # 75 tokens are read: the 37 pairs, and "at"
    code, out, err = esd(
        "sample", f"--base={base}", f"--prompts={prompt}", "--num_steps=2", f"--output={tmp_path / 'x.png'}"
    )
    assert (code, out) == (0, f"1 images in {tmp_path / 'x.png'}\n")
    (warning,) = (line for line in err.splitlines() if line.startswith("esd-jax: "))
    assert warning.startswith("esd-jax: warning: ") and warning.endswith("words are lost: 'last dog and style'")

    factories.make_sdxl(tmp_path / "sdxl")
    assert cli.guarded(lambda: esd_jax.load(tmp_path / "sdxl").encode_prompts([prompt])) == 0
    assert capsys.readouterr().err == f"{warning}\n"


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
