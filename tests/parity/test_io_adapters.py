"""Kinds of adapters, and names of modules, that other trainers write: the weight that each means, or its refusal.

The files in tests/data/loras are of the embedded model; most change one matrix, [112, 128], by factors of rank 4 with
alpha 2.
"""

import copy

import diffusers
import factories
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from adapter_files import CONV, CONVOLUTIONS, MATRIX, arrays, loha, of_torch, save
from messages import one_line
from paths import DATA

import esd_jax
from esd_jax import api
from esd_jax.io import ldm
from esd_jax.io.lora_merge import merge_lora

LORAS = DATA / "loras"
TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def emoji():
    return esd_jax.load("emoji")


def parts(name):
    """The tensors of a sample by what follows the module's name, float32; the few of 8 bits by torch's own cast."""
    file = safetensors.torch.load_file(LORAS / f"{name}.safetensors")
    return {key.partition("to_k.")[2]: value.float().numpy() for key, value in file.items() if "to_k." in key}


def lora(factors, alpha=2):
    down = factors["lora_down.weight"]
    return alpha / len(down) * factors["lora_up.weight"] @ down


def dora(factors, weight):
    """DoRA's equation 5: the magnitude of every output, times the direction of W + BA."""
    whole = weight + lora(factors)
    return factors["dora_scale"] * whole / np.linalg.norm(whole, axis=1, keepdims=True) - weight


# What a sample adds to the matrix.
ADDED = {
    "bundled_word": lambda factors, _: lora(factors),
    "dora": dora,
    "fp8": lambda factors, _: lora(factors),
    "loha": lambda factors, _: loha(factors),
    "lokr": lambda factors, _: np.kron(factors["lokr_w1"], factors["lokr_w2"]),  # of two whole sides alpha says nothing
    "lycoris_prefix": lambda factors, _: lora(factors),
}


@pytest.mark.filterwarnings("ignore:.* brings the word")
@pytest.mark.parametrize("name", ADDED)
def test_a_sample_adds_what_its_kind_means(emoji, name):
    weight = of_torch(emoji, f"{TO_K}.weight")
    change = ADDED[name](parts(name), weight)
    for strength in (1.0, 0.5):
        merged = merge_lora(emoji, LORAS / f"{name}.safetensors", strength)
        assert merged.edits.keys() == {f"unet/{TO_K}.weight"}
        np.testing.assert_allclose(of_torch(merged, f"{TO_K}.weight"), weight + strength * change, atol=2e-5)
        assert np.abs(change).max() > 0.1
    assert api.opened(emoji, LORAS / f"{name}.safetensors").edits.keys() == {f"unet/{TO_K}.weight"}


def test_a_word_that_is_bundled_is_named(emoji):
    with pytest.warns(UserWarning, match=one_line("bundled_word.safetensors", "'x'", "not added", "add_embedding")):
        merge_lora(emoji, LORAS / "bundled_word.safetensors")


def test_what_older_versions_wrote_for_kohya_still_opens(emoji):
    """Alpha 1, and a rank of each matrix's own."""
    file = safetensors.numpy.load_file(LORAS / "kohya_alpha_1.safetensors")
    merged = merge_lora(emoji, LORAS / "kohya_alpha_1.safetensors")
    assert len(merged.edits) == 4 and len({len(v) for k, v in file.items() if k.endswith("down.weight")}) == 4
    for name in merged.edits:
        key = "lora_unet_" + name.removeprefix("unet/").removesuffix(".weight").replace(".", "_")
        up, down = (file[f"{key}.lora_{part}.weight"].astype(np.float32) for part in ("up", "down"))
        expected = of_torch(emoji, name.removeprefix("unet/")) + up @ down / len(down)
        np.testing.assert_allclose(of_torch(merged, name.removeprefix("unet/")), expected, atol=1e-5)


REFUSED = {
    "alpha_nan": ["to_k.alpha", "NaN"],
    "oft": ["OFT or BOFT", "oft_blocks", "not implemented"],
    "glora": ["GLoRA", "a1.weight", "not implemented"],
    "core": ["to_k", "does not fit"],  # a core of 3x3 in a matrix
    "norm": ["b_norm", "does not fit"],  # of 32 channels, where the model has 48
    "diffusion_model": ["no module", "input_blocks.4.1", "another model"],  # which is 3.1 in the model
    "scale": ["to_k.scale' is 2", "alpha / rank is 0.5", "A1111", "ComfyUI", "leave one"],
    "other_text_encoder": ["no module", "layers_99", "another model"],
    "up_missing": ["lora_down.weight", "lacks its other factor"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sample_is_refused_by_what_it_is(emoji, name):
    for read in (merge_lora, api.opened):
        with pytest.raises(ValueError, match=one_line(f"{name}.safetensors", *REFUSED[name])):
            read(emoji, LORAS / f"{name}.safetensors")


# Kinds on convolutions, and DoRA in its three layouts, on tiny networks.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    pipe = factories.make_sd1(folder)
    return esd_jax.load(folder), pipe.unet


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_kinds_of_a_convolution(tiny, kind, tmp_path):
    base, _ = tiny
    shapes, change = CONVOLUTIONS[kind]
    factors = arrays(**shapes)
    merged = merge_lora(base, save(tmp_path, CONV, factors), 0.5)
    expected = of_torch(base, f"{CONV}.weight") + 0.5 * change(factors)
    np.testing.assert_allclose(of_torch(merged, f"{CONV}.weight"), expected, atol=1e-5)


def test_a_norms_scale_and_bias_are_added_to(tiny, tmp_path):
    base, _ = tiny
    factors, alpha = arrays(w_norm=(32,), b_norm=(32,)), 8.0  # which is none of a norm's
    merged = merge_lora(base, save(tmp_path, "conv_norm_out", factors, alpha), 0.5)
    for leaf, key in (("weight", "w_norm"), ("bias", "b_norm")):
        expected = of_torch(base, f"conv_norm_out.{leaf}") + 0.5 * factors[key]
        np.testing.assert_allclose(of_torch(merged, f"conv_norm_out.{leaf}"), expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_dora_is_what_diffusers_makes_of_it(tiny, tmp_path):
    """PEFT's keys, and kohya's, of a matrix. (diffusers 0.42 does not read kohya's magnitude.)"""
    base, unet = tiny
    factors = arrays(**{"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "dora_scale": (32, 1)})
    factors["dora_scale"] = np.abs(factors["dora_scale"]) + 1
    peft = {"lora_A.weight": factors["lora_down.weight"], "lora_B.weight": 0.5 * factors["lora_up.weight"]}
    peft["lora_magnitude_vector"] = factors["dora_scale"][:, 0]
    file = {f"unet.{MATRIX}.{name}": value for name, value in peft.items()}
    safetensors.numpy.save_file(file, tmp_path / "peft.safetensors")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base.provenance.folder, unet=copy.deepcopy(unet))
    pipe.load_lora_weights(tmp_path, weight_name="peft.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = pipe.unet.state_dict()[f"{MATRIX}.weight"].numpy()
    assert np.abs(np.linalg.norm(expected, axis=1) - factors["dora_scale"][:, 0]).max() < 1e-5
    for ours in (tmp_path / "peft.safetensors", save(tmp_path, MATRIX, factors)):
        np.testing.assert_allclose(of_torch(merge_lora(base, ours), f"{MATRIX}.weight"), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "axes"), [((64, 1, 1, 1), (1, 2, 3)), ((1, 64, 1, 1), (0, 2, 3))])
def test_doras_norm_is_of_outputs_or_of_inputs(tiny, size, axes, tmp_path):
    base, _ = tiny
    shapes = {"lora_down.weight": (4, 64, 3, 3), "lora_up.weight": (64, 4, 1, 1), "dora_scale": size}
    factors = arrays(**shapes)
    weight = of_torch(base, f"{CONV}.weight")
    whole = weight + 0.5 * (
        factors["lora_up.weight"].reshape(64, 4) @ factors["lora_down.weight"].reshape(4, -1)
    ).reshape(weight.shape)
    expected = factors["dora_scale"] * whole / np.sqrt(np.square(whole).sum(axes, keepdims=True))
    np.testing.assert_allclose(
        of_torch(merge_lora(base, save(tmp_path, CONV, factors)), f"{CONV}.weight"), expected, atol=1e-5
    )


def test_names_of_comfyui_lycoris_and_wrappers(tiny, tmp_path):
    base, _ = tiny
    factors = arrays(down=(2, 32), up=(32, 2))
    inner = ldm.places({"unet": base.configs["unet"]})[f"unet/{MATRIX}.weight"].key.removeprefix(ldm.UNET)
    inner, text = inner.removesuffix(".weight"), "text_model.encoder.layers.1.mlp.fc1"
    for stem in (
        f"lycoris_{MATRIX.replace('.', '_')}", f"diffusion_model.{inner}", f"unet._orig_mod.{MATRIX}",
        f"base_model.model._orig_mod.{MATRIX}", f"module.{MATRIX}",
    ):  # fmt: skip
        file = {f"{stem}.lora_A.weight": factors["down"], f"{stem}.lora_B.weight": factors["up"]}
        safetensors.numpy.save_file(file, tmp_path / "x.safetensors")
        merged = merge_lora(base, tmp_path / "x.safetensors")
        expected = of_torch(base, f"{MATRIX}.weight") + factors["up"] @ factors["down"]
        np.testing.assert_allclose(of_torch(merged, f"{MATRIX}.weight"), expected, atol=1e-6, err_msg=stem)
        assert api.opened(base, tmp_path / "x.safetensors").edits.keys() == {f"unet/{MATRIX}.weight"}
    file = arrays(**{f"text_encoders.clip_l.transformer.{text}.lora_{a}.weight": s for a, s in
                     (("A", (2, 32)), ("B", (64, 2)))})  # fmt: skip
    safetensors.numpy.save_file(file, tmp_path / "x.safetensors")
    assert merge_lora(base, tmp_path / "x.safetensors").edits.keys() == {"text_encoder/encoder.layers.1.mlp.fc1.weight"}


ONE = {"lora_up.weight": (32, 2), "lora_down.weight": (2, 32)}
WRONG = {
    "half a LoHa": ({"hada_w1_a": (32, 2), "hada_w1_b": (2, 32)}, ["lacks its other factor"]),
    "half a LoKr": ({"lokr_w1": (2, 2)}, ["lacks its other factor"]),
    "one factor of LoKr": ({"lokr_w1": (2, 2), "lokr_w2_a": (16, 2)}, ["lacks its other factor"]),
    "a magnitude alone": ({"dora_scale": (32, 1)}, ["lacks its other factor"]),
    "a magnitude of another size": ({**ONE, "dora_scale": (31, 1)}, ["does not fit"]),
    "a core without factors": ({"lora_mid.weight": (2, 2, 3, 3)}, ["lacks its other factor"]),
    "two kinds": ({**ONE, "diff": (32, 32)}, ["does not fit"]),
    "LoKr of another size": ({"lokr_w1": (2, 2), "lokr_w2": (16, 15)}, ["does not fit"]),
    "LoHa of two ranks": (
        {"hada_w1_a": (32, 2), "hada_w1_b": (3, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}, ["does not fit"],
    ),
    "an unknown part": ({**ONE, "reshape_weight": (2,)}, ["reshape_weight", "no key of a LoRA"]),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_factors_that_do_not_go_together(tiny, wrong, tmp_path):
    shapes, words = WRONG[wrong]
    file = save(tmp_path, MATRIX, arrays(**shapes), alpha=None)
    with pytest.raises(ValueError, match=one_line(file, *words)):
        merge_lora(tiny[0], file)


def test_pefts_other_kinds_are_refused_by_its_config(tiny, tmp_path):
    """It scales a LoKr of two whole sides by alpha / rank, where LyCORIS does not."""
    file = tmp_path / "adapter_model.safetensors"
    factors = arrays(**{f"base_model.model.{MATRIX}.lokr_w{i}": shape for i, shape in ((1, (2, 2)), (2, (16, 16)))})
    safetensors.numpy.save_file(factors, file)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOKR", "alpha": 8, "r": 4}')
    with pytest.raises(ValueError, match=one_line(file, "LOKR", "adapter_config.json", "not implemented")):
        merge_lora(tiny[0], file)


def test_a_scale_that_says_what_alpha_says_is_read(tiny, tmp_path):
    base, _ = tiny
    factors = arrays(**ONE)
    plain = merge_lora(base, save(tmp_path, MATRIX, factors, alpha=1.0))
    merged = merge_lora(base, save(tmp_path, MATRIX, {**factors, "scale": np.float32([0.5])}, alpha=1.0))
    np.testing.assert_array_equal(of_torch(plain, f"{MATRIX}.weight"), of_torch(merged, f"{MATRIX}.weight"))
