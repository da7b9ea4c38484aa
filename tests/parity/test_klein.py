"""FLUX.2 [klein] as a whole checkpoint: what diffusers' pipeline makes of the same folder and the same noise."""

import shutil
from pathlib import Path

import diffusers
import jax.numpy as jnp
import klein_factory
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from klein_factory import CHANNELS, LAYERS
from messages import one_line
from saved_pipelines import edit_json
from torch_oracle import error, to_nchw, to_nhwc

import esd_jax
from esd_jax import conditionings, families, streamed
from esd_jax.diffusion import programs
from esd_jax.diffusion.flow import CLASS
from esd_jax.families.klein import KleinSchedule, empirical_mu
from esd_jax.pipeline import image_size

PROMPTS = ["a photo of a cat", "two cats, and a photo"]
SIZE = (16, 24)  # pixels: latents of 4 x 6, each a token
STEPS = 3


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """(folder, the torch pipeline that wrote it, ours)"""
    folder = tmp_path_factory.mktemp("klein") / "model"
    return folder, klein_factory.make_klein(folder), esd_jax.load(folder)


def noise(size=SIZE):
    shape = (len(PROMPTS), size[0] // 4, size[1] // 4, 4 * CHANNELS)
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


@torch.no_grad()
def theirs(pipe, scale, size=SIZE, output="latent", steps=STEPS):
    """Images NHWC, or the VAE's own latents NCHW."""
    options = {"num_inference_steps": steps, "guidance_scale": scale, "text_encoder_out_layers": LAYERS}
    return pipe(
        prompt=PROMPTS, height=size[0], width=size[1], latents=to_nchw(noise(size)), output_type=output, **options
    ).images


def ours(base, scale, size=SIZE):
    """The latents that `sample` decodes."""
    schedule = base.family.at_size(base.configs, base.schedule, size)
    run = programs.steps(base.network(base.denoiser), programs.sampler(schedule, "flow_euler", STEPS, 0.0))
    condition = conditionings.make_conditioning(base, PROMPTS, size, len(PROMPTS), scale > 1, guidance_scale=scale)
    return run(base.params[base.denoiser], noise(size), condition(np.arange(len(PROMPTS))), jnp.float32(scale))


def of_the_vae(pipe, latents):
    """The VAE's own latents, of those that the transformer takes."""
    bn, x = pipe.vae.bn, to_nchw(np.asarray(latents))
    mean, variance = (a.view(1, -1, 1, 1) for a in (bn.running_mean, bn.running_var + bn.eps))
    return pipe._unpatchify_latents(x * variance.sqrt() + mean)


def test_prompts_are_encoded_as_by_the_pipeline(klein):
    _, pipe, base = klein
    with torch.no_grad():
        embeddings, _ = pipe.encode_prompt(PROMPTS, text_encoder_out_layers=LAYERS)
    encoded = base.encode_prompts(PROMPTS)
    assert error(encoded.embeddings, embeddings) <= 1e-4
    assert base.family.encoded(base.configs, 2).embeddings.shape == embeddings.shape


def test_prompts_are_encoded_layer_by_layer_as_by_the_whole_encoder(klein, monkeypatch):
    folder, _, base = klein
    monkeypatch.setattr(streamed, "FROM", 1)
    ours = esd_jax.load(folder)
    assert streamed.lies_in_file(ours.params["text_encoder"]) and not streamed.lies_in_file(base.params["text_encoder"])
    assert error(ours.encode_prompts(PROMPTS).embeddings, base.encode_prompts(PROMPTS).embeddings) <= 1e-6
    shapes = base.network("text_encoder").shapes
    layer = sum(shape.size for name, shape in shapes.items() if name.startswith("model.layers.0."))
    assert streamed.num_resident(shapes) == layer


@pytest.mark.parametrize(("scale", "size"), [(4.0, SIZE), (1.0, SIZE), (4.0, (24, 32))])
def test_latents_are_those_of_the_pipeline(scale, size, klein):
    _, pipe, base = klein
    expected = theirs(pipe, scale, size)
    assert error(of_the_vae(pipe, ours(base, scale, size)), expected) <= 1e-4
    assert error(theirs(pipe, 2.0, size), expected) > 1e-2  # the scale of guidance matters


def test_images_are_those_of_the_pipeline(klein):
    """With its 50 steps, guidance of 4, and the encoded "" in place of no prompt."""
    _, pipe, base = klein
    defaults = base.family.sampling(base.configs)
    assert (defaults.steps, defaults.guidance_scale) == (50, 4.0)
    expected = theirs(pipe, 4.0, output="np", steps=50)
    images = esd_jax.sample(base, PROMPTS, latents=noise(), height=SIZE[0], width=SIZE[1])
    assert expected.std() > 0.05 and np.abs(images / 255 - expected).max() <= 0.5 / 255 + 1e-3


def test_the_vae_encodes_and_decodes(klein):
    _, pipe, base = klein
    images = np.random.default_rng(1).uniform(-1, 1, (2, *SIZE, 3)).astype(np.float32)
    with torch.no_grad():
        expected = to_nhwc(pipe._encode_vae_image(to_nchw(images), None))
        distribution = pipe.vae.encode(to_nchw(images)).latent_dist
        decoded = to_nhwc(pipe.vae.decode(of_the_vae(pipe, noise())).sample)
    assert expected.shape[1:] == base.family.latents(base.configs, SIZE)
    assert error(base.encode(images), expected) <= 1e-4
    assert error(base.decode(jnp.asarray(noise())), decoded) <= 1e-4
    ours = base.network("vae").apply(base.params["vae"], images, "encode")
    drawn, draws = ours.sample(jnp.asarray(noise())), to_nchw(noise())
    theirs = distribution.mean + distribution.std * pipe._unpatchify_latents(draws)
    assert error(of_the_vae(pipe, drawn), theirs) <= 1e-4


@pytest.mark.parametrize("tokens", [16, 1024, 4096, 4301, 10_000])
@pytest.mark.parametrize("steps", [4, 28, 50, 200])
def test_noise_levels_are_those_of_the_pipeline(tokens, steps):
    mu = compute_empirical_mu(tokens, steps)
    assert empirical_mu(tokens, steps) == pytest.approx(mu, rel=1e-12)
    for options in ({"use_dynamic_shifting": True, "shift": 3.0}, {"shift": 2.0}):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        schedule = KleinSchedule.from_config({"_class_name": CLASS, **options}, even=True)
        np.testing.assert_allclose(schedule.at(tokens).visited(steps), scheduler.sigmas[:-1].numpy(), rtol=3e-6)
    with pytest.raises(ValueError, match=one_line("image size", "use_dynamic_shifting")):
        KleinSchedule.from_config({"_class_name": CLASS, "use_dynamic_shifting": True}, even=True).visited(steps)


def test_schedules_of_different_sizes_differ():
    """Though at 50 steps their shifts may be equal."""
    schedule = KleinSchedule.from_config({"_class_name": CLASS, "use_dynamic_shifting": True}, even=True)
    assert schedule.at(64) == schedule.at(64) != schedule.at(65)
    assert len({schedule, schedule.at(64), schedule.at(64)}) == 2
    assert schedule.at(64).dynamic == pytest.approx(np.exp(empirical_mu(64, 50)))


def test_what_it_is(klein):
    base = klein[2]
    assert (base.family, base.denoiser) == (families.KLEIN, "transformer") and "FLUX.2 [klein]" in repr(base)
    assert base.text_encoders == ("text_encoder",) and not base.zeros_for_empty_prompt
    assert image_size(base.configs) == (256, 256)
    names = base.params["text_encoder"]
    assert "model.layers.2.mlp.up_proj.weight" in names and "model.layers.3.mlp.up_proj.weight" not in names
    with pytest.raises(ValueError, match=one_line("18x24", "multiple of 4 pixels")):
        esd_jax.sample(base, "a cat", height=18, width=24)


def test_an_export_is_its_source_byte_for_byte(klein, tmp_path):
    """The layers and statistics that are not read, too; the distilled model's mark is in model_index.json."""
    folder, _, base = klein
    esd_jax.export(base, tmp_path / "out")
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    written = {path.relative_to(tmp_path / "out"): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written.keys() == files.keys() and len(files) > 8
    for name, path in written.items():
        assert path.read_bytes() == files[name], name


@pytest.mark.parametrize(
    ("component", "change", "named"),
    [
        ("transformer", {"in_channels": 32}, "takes 32 channels"),
        ("transformer", {"joint_attention_dim": 60}, "joint_attention_dim=60"),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds=True"),
        ("vae", {"patch_size": [4, 4]}, "patch_size=[4, 4]"),
        ("vae", {"decoder_block_out_channels": [8, 16]}, "decoder_block_out_channels=[8, 16]"),
        ("text_encoder", {"hidden_size": 32}, "joint_attention_dim=72"),
        ("scheduler", {"invert_sigmas": True}, "invert_sigmas=True"),
        ("scheduler", {"time_shift_type": "cubic"}, "time_shift_type 'cubic'"),
        ("", {"is_distilled": True}, "is_distilled=True"),
    ],
)
def test_what_is_not_implemented_is_refused(component, change, named, klein, tmp_path):
    copy = Path(shutil.copytree(klein[0], tmp_path / "copy"))
    stem = {"scheduler": "scheduler_config", "": "model_index"}.get(component, "config")
    edit_json(copy / component / f"{stem}.json", **change)
    with pytest.raises(ValueError, match=one_line(named)):
        esd_jax.load(copy)
