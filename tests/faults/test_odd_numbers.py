"""Numbers that are none: they end in one line that names them, and no black picture passes for an erasure."""

import dataclasses
import json

import factories
import numpy as np
import pytest
import safetensors.numpy
from messages import one_line
from paths import DATA

import esd_jax
from esd_jax import api, results, search
from esd_jax.demo import groups, protocol
from esd_jax.demo.gallery import Gallery
from esd_jax.evaluation import attacks, protocols, seen, store
from esd_jax.evaluation.attacks import Goal
from esd_jax.evaluation.drawing import Drawing, draw
from esd_jax.evaluation.prompts import Case
from esd_jax.io import difference, merge
from esd_jax.io.exact import with_strength
from esd_jax.io.lora_merge import merge_lora
from esd_jax.pictures import check_not_blank
from esd_jax.sampling import invert, reconstruct, sample

NAMES = {"nan": "strength=nan", "inf": "strength=inf"}
WHERE = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    factories.make_sd1(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return esd_jax.load(folder)


@pytest.fixture(scope="module")
def erased(base):
    return esd_jax.erase(base, "cat", method="uce", config="uce", dtype="float32")


def broken(base, value):
    """The base with one number of its UNet replaced."""
    tensor = np.asarray(base.params["unet"][WHERE.removeprefix("unet/")]).copy()
    tensor[0, 0] = value
    return base.with_edits({WHERE: tensor})


def blank(base):
    """A model of finite numbers that draws grey alone."""
    vae = {
        name: value * 0 if name.startswith("decoder.conv_out") else value for name, value in base.params["vae"].items()
    }
    return dataclasses.replace(base, params={**base.params, "vae": vae})


# Drawing.


@pytest.mark.parametrize("scale", [1e38, 3.4e38])
def test_a_guidance_beyond_all_bounds(base, scale):
    with pytest.raises(ValueError, match=one_line("image 0", "'a dog'", f"guidance_scale={scale:g}")):
        sample(base, ["a dog", "a cat"], steps=2, guidance_scale=scale)


def test_the_image_that_is_none_is_named(base):
    with pytest.raises(ValueError, match=one_line("image 0", "'a dog'", "NaN")):
        sample(broken(base, np.nan), ["a dog", "a cat"], steps=2)
    latents = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    latents[2] = np.inf
    with pytest.raises(ValueError, match=one_line("image 2", "'c'", "NaN")):
        sample(base, ["a", "b", "c"], steps=2, latents=latents, batch_size=2)


def test_a_vae_that_divides_by_nothing(base):
    config = dataclasses.replace(base.configs["vae"], shift_factor=float("nan"))
    lost = dataclasses.replace(base, configs={**base.configs, "vae": config})
    images = np.full((2, 16, 16, 3), 100, np.uint8)
    for draws in (lambda: reconstruct(lost, images), lambda: invert(lost, images, steps=2)):
        with pytest.raises(ValueError, match=one_line("image 0", "NaN")):
            draws()


@pytest.mark.parametrize("seed", [1.5, float("inf"), "x", -1, 2**32, None])
def test_seeds_that_are_none(base, seed):
    for seeds in (seed, [0, seed]):
        with pytest.raises(ValueError, match=one_line(f"seed={seed!r}", "whole number")):
            sample(base, ["a", "b"], seed=seeds, steps=1)


def test_sizes_beyond_all_memory(base):
    with pytest.raises(ValueError, match=one_line("height", "65536")):
        sample(base, ["a"], steps=1, height=10**20)


@pytest.mark.parametrize("prompt", ["caf\udce9", None, 3])
def test_prompts_that_are_no_text(base, prompt, unchecked):
    for fields in ({"prompts": [prompt]}, {"prompts": ["a"], "negative_prompt": [prompt]} if prompt else {}):
        if fields:
            with pytest.raises(ValueError, match=one_line("prompt", repr(prompt))):
                sample(base, steps=1, **fields)


# Changes.


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_strengths_that_are_none(base, erased, strength, tmp_path):
    lora = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (2, factories.WIDTH),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": (32, 2),
    }
    safetensors.numpy.save_file({k: np.ones(s, np.float32) for k, s in lora.items()}, tmp_path / "lora.safetensors")
    esd_jax.export(erased, tmp_path / "difference.safetensors", format="difference", dtype="float32")
    for change in (
        lambda: with_strength(erased, strength),
        lambda: merge_lora(base, tmp_path / "lora.safetensors", strength),
        lambda: difference.apply_difference(base, tmp_path / "difference.safetensors", strength),
        lambda: merge.merge(base, [(erased, 1.0), (erased, strength)]),
    ):
        words = ["strength", "give"] if strength == 1e39 else [f"strength={strength}", "must be finite"]
        with pytest.raises(ValueError, match=one_line(*words)):
            change()
    with pytest.raises(ValueError, match=one_line("strength", "finite")):
        search.search(base, "cat", None, grid={"eta": [1]}, steps=[1], strengths=[float("nan")], folder=tmp_path)


def test_a_lora_whose_alpha_is_none(base, tmp_path):
    with pytest.raises(ValueError, match=one_line("lora_alpha_nan", "alpha", "NaN")):
        merge_lora(api.load("emoji"), DATA / "lora_alpha_nan.safetensors")
    names = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_{}.weight"
    tensors = {names.format("down"): np.ones((2, factories.WIDTH), np.float32)}
    tensors[names.format("up")] = np.ones((32, 2), np.float32)
    for metadata in ('{"unet.lora_alpha": NaN}', '{"unet.lora_alpha": 1e999}'):
        file = tmp_path / "x.safetensors"
        safetensors.numpy.save_file(tensors, file, {"lora_adapter_metadata": metadata})
        with pytest.raises(ValueError, match=one_line("x.safetensors", "alpha")):
            merge_lora(base, file)
    for metadata in ("[" * 9000 + "]" * 9000, "[]"):
        safetensors.numpy.save_file(tensors, file, {"lora_adapter_metadata": metadata})
        with pytest.raises(ValueError, match=one_line("x.safetensors", "lora_adapter_metadata", "no JSON object")):
            merge_lora(base, file)


# Evaluation: a model that draws nothing is not one from which the concept is gone.


def test_blank_images():
    grey, drawn = np.full((2, 4, 4, 3), 128, np.uint8), np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    check_not_blank([], "it")
    check_not_blank([*grey, *drawn], "it")
    check_not_blank([*grey, *grey // 2], "it")
    with pytest.raises(ValueError, match=one_line("every image of it is blank", "[128, 128, 128]", "no erasure")):
        check_not_blank(grey, "it")


@pytest.mark.parametrize("make", [lambda base: broken(base, np.nan), blank], ids=["NaN", "blank"])
def test_no_evaluation_takes_a_broken_model_for_an_erased_one(base, make, tmp_path):
    lost = make(base)
    refused = one_line("NaN") if lost.edits else one_line("blank", "no erasure")
    nothing = lambda images: np.zeros(len(images), bool)  # noqa: E731
    question = seen.Question(("a cat",), nothing, "nobody", num_images=2, num_steps=1)
    assert question.rate(base).value == 0
    with pytest.raises(ValueError, match=refused):
        question.rate(lost)
    with pytest.raises(ValueError, match=refused):
        seen.below(question, 0.5)(lost)
    options = {"prompt_list": "everyday", "limit": 2, "num_steps": 1}
    with pytest.raises(ValueError, match=refused):
        protocols.evaluate(base, lost, "cat", "custom", tmp_path / "e", **options)
    images = sample(base, ["a cat"] * 2, steps=1)
    goal = Goal("cat", ("a cat",), images, nothing, ("a",))
    control = attacks.preset("random_prompts", "emoji", count=1)
    drawing = {"seeds": 1, "random": False, "num_steps": 1}
    with pytest.raises(ValueError, match=refused):
        attacks.campaign(base, lost, goal, [], tmp_path / "a", control=control, identity={}, **drawing)


@pytest.mark.slow
def test_the_embedded_models_own_protocol():
    base = api.load("emoji")
    with pytest.raises(ValueError, match=one_line("blank", "'erased'")):
        protocol.evaluate({"base": base, "erased": blank(base)}, groups.parse_target("a cat"), num_images=1)


def test_a_guidance_of_its_own_may_be_zero(base, tmp_path):
    """Else it would be drawn with another."""
    drawing = Drawing(num_steps=2, own_guidance=True)
    (image,) = draw(base, {}, [Case("1", "a cat", 3, guidance=0.0)], drawing, tmp_path / "a").batches()
    np.testing.assert_array_equal(image, sample(base, ["a cat"], seed=[3], steps=2, guidance_scale=0.0))


def test_evidence_that_is_damaged(tmp_path):
    for content in ("[" * 9000 + "]" * 9000, "{", json.dumps({"title": "x"})):
        (file := tmp_path / "x.json").write_text(content)
        file.with_suffix(".npz").write_bytes(b"PK\x03\x04 no archive")
        with pytest.raises(ValueError, match=one_line("x.json", "damaged", "measure it again")):
            store.load(file)
    with pytest.raises(ValueError, match=one_line("x.npz", "damaged", "remove")):
        Gallery(tmp_path)
    with pytest.raises(ValueError, match=one_line("x.npz", "damaged", "remove")):
        results.read(tmp_path / "x.npz")
