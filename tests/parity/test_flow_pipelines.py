"""FLUX.1 and SD3 as whole checkpoints: what diffusers' pipelines make of the same folder and the same noise."""

import json
import shutil
from pathlib import Path

import diffusers
import flow_factories
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flow_factories import CHANNELS
from messages import one_line
from saved_pipelines import edit_json
from torch_oracle import error, to_nchw, to_nhwc

import esd_jax
from esd_jax import conditionings, families, sampling
from esd_jax.diffusion import programs
from esd_jax.pipeline import image_size

PROMPTS = ["a photo of a cat", "two cats, and a photo"]
SIZE = (16, 24)  # pixels: latents of 8 x 12, 4 x 6 tokens
STEPS = 3


def make_undistilled(folder):
    """[schnell]'s layout, which this package's mark says is guided classifier-free; T5 is padded to its positions."""
    pipe = flow_factories.make_flux(folder, dev=False)
    edit_json(folder / "transformer/config.json", _undistilled=True)
    edit_json(folder / "text_encoder_2/config.json", n_positions=TOKENS["undistilled"])
    return pipe


MAKE = {
    "dev": lambda folder: flow_factories.make_flux(folder),
    "schnell": lambda folder: flow_factories.make_flux(folder, dev=False),
    "undistilled": make_undistilled,
    "sd3": lambda folder: flow_factories.make_sd3(folder),
    "sd3, no T5": lambda folder: flow_factories.make_sd3(folder, t5=False),
}
# Tokens of T5 by which diffusers' pipelines are called.
TOKENS = {"dev": 512, "schnell": 256, "undistilled": 12, "sd3": 256, "sd3, no T5": 256}
SCALES = {"dev": (3.5, 1.25), "schnell": (1.0,), "undistilled": (3.0, 1.0), "sd3": (7.0, 1.0), "sd3, no T5": (7.0,)}
CASES = [(kind, scale) for kind, scales in SCALES.items() for scale in scales]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (folder, the torch pipeline that wrote it, ours), each made when it is first used."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("flow") / "model"
            made[kind] = folder, MAKE[kind](folder), esd_jax.load(folder)
        return made[kind]

    return of


def noise(size=SIZE):
    shape = (len(PROMPTS), size[0] // 2, size[1] // 2, CHANNELS)
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


@torch.no_grad()
def theirs(pipe, kind, scale, size=SIZE, output="latent", steps=STEPS, **others):
    """Latents or images, NHWC. others: arguments of the pipeline."""
    x = to_nchw(noise(size))
    flux = isinstance(pipe, diffusers.FluxPipeline)
    packed = pipe._pack_latents(x, *x.shape) if flux else x
    options = {"num_inference_steps": steps, "guidance_scale": scale, "max_sequence_length": TOKENS[kind]} | others
    if kind == "undistilled":  # "" in place of no negative prompt, or it is not guided
        options |= {"true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)}
    result = pipe(PROMPTS, height=size[0], width=size[1], latents=packed, output_type=output, **options).images
    if output != "latent":
        return result
    return to_nhwc(pipe._unpack_latents(result, *size, pipe.vae_scale_factor) if flux else result)


def ours(base, scale, size=SIZE):
    """The latents that `sample` decodes."""
    schedule = base.family.at_size(base.configs, base.schedule, size)
    run = programs.steps(base.network(base.denoiser), programs.sampler(schedule, "flow_euler", STEPS, 0.0))
    guided = scale > 1 and base.family.guide is None
    condition = conditionings.make_conditioning(base, PROMPTS, size, len(PROMPTS), guided, guidance_scale=scale)
    return run(base.params[base.denoiser], noise(size), condition(np.arange(len(PROMPTS))), jnp.float32(scale))


@pytest.mark.parametrize("kind", MAKE)
def test_prompts_are_encoded_as_by_the_pipeline(kind, folders):
    _, pipe, base = folders(kind)
    with torch.no_grad():
        if kind.startswith("sd3"):
            embeddings, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
        else:
            embeddings, pooled, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=TOKENS[kind])
    encoded = base.encode_prompts(PROMPTS)
    assert error(encoded.embeddings, embeddings) <= 1e-4 and error(encoded.pooled, pooled) <= 1e-4
    assert (encoded.guidance is None) == (kind != "dev")
    shapes = base.family.encoded(base.configs, 2)
    assert [a.shape for a in _leaves(shapes)] == [a.shape for a in _leaves(encoded)]


def _leaves(conditioning):
    return [a for a in (conditioning.embeddings, conditioning.pooled, conditioning.guidance) if a is not None]


@pytest.mark.parametrize(("kind", "scale"), CASES)
def test_latents_are_those_of_the_pipeline(kind, scale, folders):
    _, pipe, base = folders(kind)
    expected = theirs(pipe, kind, scale)
    assert error(ours(base, scale), expected) <= 1e-4
    other = theirs(pipe, kind, 2.0)
    assert kind == "schnell" or error(other, expected) > 1e-2  # the scale of guidance matters


def test_the_shift_follows_the_size_of_the_image(folders):
    """As it does for [dev]: another size visits other noise levels."""
    _, pipe, base = folders("dev")
    size = (24, 32)
    assert error(ours(base, 3.5, size), theirs(pipe, "dev", 3.5, size)) <= 1e-4
    grids = [base.family.at_size(base.configs, base.schedule, one).visited(STEPS) for one in (SIZE, size)]
    assert np.abs(grids[0] - grids[1]).max() > 1e-2
    with pytest.raises(ValueError, match=one_line("image size", "use_dynamic_shifting")):
        base.schedule.visited(STEPS)


@pytest.mark.parametrize("kind", ["dev", "schnell", "sd3"])
def test_images_are_those_of_the_pipeline(kind, folders):
    _, pipe, base = folders(kind)
    steps, scale = base.family.sampling(base.configs).steps, base.family.sampling(base.configs).guidance_scale
    expected = theirs(pipe, kind, scale, output="np", steps=steps)
    images = esd_jax.sample(base, PROMPTS, latents=noise(), height=SIZE[0], width=SIZE[1])
    assert expected.std() > 0.05 and np.abs(images / 255 - expected).max() <= 0.5 / 255 + 1e-3


def test_vaes_with_a_shift_encode_and_decode(folders):
    _, pipe, base = folders("dev")
    images = np.random.default_rng(1).uniform(-1, 1, (1, *SIZE, 3)).astype(np.float32)
    with torch.no_grad():
        mean = pipe.vae.encode(to_nchw(images)).latent_dist.mean
    expected = to_nhwc((mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)
    assert error(base.encode(images), expected) <= 1e-4


def test_what_they_are(folders):
    base = folders("dev")[2]
    assert (base.family, base.denoiser) == (families.FLUX, "transformer") and "FLUX.1 [dev]" in repr(base)
    assert "FLUX.1 [schnell]" in repr(folders("schnell")[2])
    with_t5, without = folders("sd3")[2], folders("sd3, no T5")[2]
    assert with_t5.family is without.family is families.SD3 and "SD 3.5" in repr(without)
    assert with_t5.text_encoders == ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert without.text_encoders == ("text_encoder", "text_encoder_2") and len(without.tokenizers) == 2
    assert image_size(base.configs) == (256, 256) and image_size(without.configs) == (16, 16)
    assert not with_t5.zeros_for_empty_prompt


def test_sizes_that_are_no_whole_tokens_are_refused(folders):
    for kind in ("dev", "sd3"):
        with pytest.raises(ValueError, match=one_line("18x24", "multiple of 4 pixels")):
            esd_jax.sample(folders(kind)[2], "a cat", height=18, width=24)
    with pytest.raises(ValueError, match=one_line("36x16", "beyond the 32 pixels")):
        esd_jax.sample(folders("sd3")[2], "a cat", height=36, width=16)


@pytest.mark.parametrize(("kind", "scale", "true_cfg"), [("dev", 3.5, 2.5), ("sd3", 5.0, None)])
def test_negative_prompts_are_those_of_the_pipeline(kind, scale, true_cfg, folders):
    """Of [dev] by classifier-free guidance beside its own."""
    _, pipe, base = folders(kind)
    negatives = ["two photos", "a cat"]
    options = {"negative_prompt": negatives} | ({} if true_cfg is None else {"true_cfg_scale": true_cfg})
    expected = theirs(pipe, kind, scale, output="np", **options)
    ours = {"steps": STEPS, "guidance_scale": scale, "latents": noise(), "height": SIZE[0], "width": SIZE[1]}
    images = esd_jax.sample(base, PROMPTS, negative_prompt=negatives, true_cfg=true_cfg, **ours)
    assert np.abs(images / 255 - expected).max() <= 0.5 / 255 + 1e-3
    assert np.abs(esd_jax.sample(base, PROMPTS, **ours) / 255 - expected).max() > 0.02


SLD = esd_jax.guidance.SLD.preset("strong", "cat")


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("dev", {"negative_prompt": "a dog"}, ["negative_prompt", "classifier-free", "FLUX.1 [dev]", "true_cfg"]),
        ("dev", {"rule": SLD, "guidance_scale": 3.0}, ["SLD", "classifier-free", "FLUX.1 [dev]", "true_cfg"]),
        ("dev", {"rule": SLD, "true_cfg": 1.0}, ["SLD", "true_cfg, above 1"]),
        ("schnell", {"negative_prompt": "a dog"}, ["negative_prompt", "FLUX.1 [schnell]", "leave it out"]),
        ("schnell", {"rule": SLD, "true_cfg": 4.0}, ["SLD", "FLUX.1 [schnell]", "leave it out"]),
        ("schnell", {"true_cfg": 4.0}, ["true_cfg=4.0", "FLUX.1 [schnell]", "leave it out"]),
        ("sd3", {"true_cfg": 4.0}, ["true_cfg=4.0", "SD 3.5 takes a guidance_scale"]),
        ("sd3", {"rule": SLD, "guidance_scale": 1.0}, ["guidance_scale=1.0", "SLD needs it"]),
        ("dev", {"reweight": {"cat": 0.5}}, ["reweight", "cross-attention", "FLUX.1"]),
        ("sd3", {"reweight": {"cat": 0.5}}, ["reweight", "cross-attention", "Stable Diffusion 3"]),
    ],
)
def test_guidance_that_a_model_does_not_have_is_refused(kind, options, named, folders):
    with pytest.raises(ValueError, match=one_line(*named)):
        esd_jax.sample(folders(kind)[2], "a cat", **{"steps": 2, "height": 16, "width": 16} | options)


@pytest.mark.parametrize(("kind", "options"), [("sd3", {"guidance_scale": 5.0}), ("dev", {"true_cfg": 3.0})])
def test_rules_steer(kind, options, folders):
    base, options = folders(kind)[2], {"steps": STEPS, "latents": noise(), "height": 16, "width": 24} | options
    rule = esd_jax.guidance.SLD("cat", warmup=0, threshold=1.0)
    plain, steered = (esd_jax.sample(base, PROMPTS, rule=one, **options) for one in (None, rule))
    assert np.abs(plain.astype(int) - steered).max() > 5


@pytest.mark.parametrize("kind", ["dev", "sd3"])
def test_images_are_inverted_and_drawn_again(kind, folders):
    base = folders(kind)[2]
    images = esd_jax.sample(base, ["a cat"], steps=2, height=16, width=24, guidance_scale=1.0)
    drawn, lost = esd_jax.purify(base, images, steps=40), esd_jax.purify(base, images, steps=2)
    same = sampling.reconstruct(base, images).astype(int)
    assert np.abs(drawn - same).mean() < 0.3 * np.abs(lost - same).mean()


@pytest.mark.parametrize(
    ("kind", "component", "change", "named"),
    [
        ("dev", "transformer", {"in_channels": 32}, "Fill, Depth, Canny"),
        ("dev", "transformer", {"pooled_projection_dim": 20}, "pooled_projection_dim=20"),
        ("dev", "text_encoder_2", {"d_model": 24}, "joint_attention_dim=72"),
        ("dev", "scheduler", {"invert_sigmas": True}, "invert_sigmas=True"),
        ("sd3", "transformer", {"in_channels": 8}, "takes 8 channels"),
        ("sd3", "transformer", {"joint_attention_dim": 60}, "joint_attention_dim=60"),
        ("sd3", "transformer", {"pooled_projection_dim": 64}, "pooled_projection_dim=64"),
        ("sd3", "text_encoder_3", {"d_model": 24}, "joint_attention_dim=72"),
    ],
)
def test_configs_that_do_not_belong_together_are_refused(kind, component, change, named, folders, tmp_path):
    copy = Path(shutil.copytree(folders(kind)[0], tmp_path / "copy"))
    stem = "scheduler_config" if component == "scheduler" else "config"
    edit_json(copy / component / f"{stem}.json", **change)
    with pytest.raises(ValueError, match=one_line(named)):
        esd_jax.load(copy)


def test_the_second_name_of_t5s_embedding_is_passed_over(folders, tmp_path):
    """Older files have it beside `shared.weight`."""
    import safetensors.torch

    copy = Path(shutil.copytree(folders("dev")[0], tmp_path / "copy"))
    file = copy / "text_encoder_2" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    safetensors.torch.save_file(tensors, file)
    np.testing.assert_array_equal(
        esd_jax.load(copy).encode_prompts(PROMPTS).embeddings, folders("dev")[2].encode_prompts(PROMPTS).embeddings
    )
    assert json.loads((copy / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
