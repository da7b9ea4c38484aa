"""What a diffusers pipeline corrects in a checkpoint as it is built, and what it passes over."""

import json
import shutil
from pathlib import Path

import diffusers
import factories
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from calm import make_calm, noise
from messages import one_line
from paths import DATA
from saved_pipelines import (
    CLASS_OF,
    PROMPTS,
    SCALE,
    SD,
    STEPS,
    edit_json,
    ours,
    quietly,
    reopened,
    set_scheduler,
    theirs,
    told,
)
from torch_oracle import in_pipeline

import esd_jax
from esd_jax.diffusion import samplers
from esd_jax.erasing import trajectories
from esd_jax.io import configs
from esd_jax.io import diffusers as io
from esd_jax.pipeline import image_size
from esd_jax.sampling import SamplerReplaced

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array"),  # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:The configuration file of"),  # diffusers, of what it corrects
    pytest.mark.filterwarnings("ignore::esd_jax.io.corrections.Corrected"),  # ours, of the same; see `told`
]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """A folder, the torch pipeline that wrote it, and ours."""
    folder = tmp_path_factory.mktemp("sd1")
    pipe = make_calm("sd1", folder)
    return folder, pipe, esd_jax.load(folder)


@pytest.fixture
def copy(sd1, tmp_path):
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(sd1[0], tmp_path / "copy"))


# What the pipeline corrects.


@pytest.mark.parametrize("version", ["0.6.0", "0.8.1", "0.9.0.dev0", "0.10.2", None])
@pytest.mark.parametrize("size", [8, 64, [8, 12]])
def test_sample_size_of_old_versions(copy, version, size):
    edit_json(
        copy / "unet/config.json",
        *([] if version else ["_diffusers_version"]),
        _diffusers_version=version,
        sample_size=size,
    )
    pipe = reopened(copy)
    expected = pipe.unet.config.sample_size
    pipeline, schedule = told(
        lambda: configs.read_architecture(copy), *([f"sample_size={size}"] if expected != size else [])
    )
    assert image_size(pipeline) == tuple(2 * side for side in np.broadcast_to(expected, 2))
    assert (expected == 64) == (size == 64 or (size == 8 and version in ("0.6.0", "0.8.1")))


def test_a_list_gives_height_and_width(copy, sd1):
    edit_json(copy / "unet/config.json", sample_size=[8, 12])
    latents = np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)
    images = esd_jax.sample(
        esd_jax.load(copy), PROMPTS, latents=latents, steps=STEPS, guidance_scale=SCALE, sampler="ddim"
    )
    expected = theirs(reopened(copy, diffusers.DDIMScheduler), latents)
    assert images.shape == expected.shape == (2, 16, 24, 3)
    assert np.abs(images / 255 - expected).max() <= 1 / 255


@pytest.mark.parametrize("offset", ["absent", None, 0, 2, 1])
def test_steps_offset(copy, offset):
    path = copy / "scheduler/scheduler_config.json"
    edit_json(path, *(["steps_offset"] if offset == "absent" else []), steps_offset=offset)
    _, schedule = told(lambda: configs.read_architecture(copy), *([] if offset == 1 else ["1 is taken"]))
    pipe = reopened(copy, diffusers.DDIMScheduler)
    pipe.scheduler.set_timesteps(20)
    np.testing.assert_array_equal(samplers.make_sampler(schedule, "ddim", 20).timesteps, pipe.scheduler.timesteps)
    assert json.loads(path.read_text()).get("steps_offset", "absent") == offset  # the file stays as it is


@pytest.mark.parametrize(
    "name", ["scheduler_ddim_clip_sample_true", "scheduler_pndm_without_clip_sample", "scheduler_unipc"]
)
def test_configs_that_were_reported(copy, name):
    shutil.copyfile(DATA / f"{name}.json", copy / "scheduler/scheduler_config.json")
    edit_json(
        copy / "model_index.json",
        scheduler=["diffusers", json.loads((DATA / f"{name}.json").read_text())["_class_name"]],
    )
    words = ["clip_sample=True, which is for pixels"] if "true" in name else []
    base = told(lambda: esd_jax.load(copy), *words)
    for sampler, kind in CLASS_OF.items():
        scheduler = in_pipeline(kind.from_config(reopened(copy).scheduler.config))
        scheduler.set_timesteps(STEPS)
        np.testing.assert_allclose(samplers.make_sampler(base.schedule, sampler, STEPS).timesteps, scheduler.timesteps)


def test_sdxls_pipeline_corrects_no_offset(tmp_path):
    factories.make_sdxl(tmp_path)
    edit_json(tmp_path / "scheduler/scheduler_config.json", "steps_offset")
    edit_json(tmp_path / "text_encoder/config.json", use_attention_mask=True)  # which it does not read
    edit_json(tmp_path / "unet/config.json", _diffusers_version="0.6.0")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    ours = told(lambda: esd_jax.load(tmp_path))
    pipe.scheduler.set_timesteps(20)
    np.testing.assert_array_equal(
        samplers.make_sampler(ours.schedule, num_steps=20).timesteps, pipe.scheduler.timesteps
    )
    assert pipe.scheduler.timesteps[-1] == 0 and ours.configs["unet"].sample_size == pipe.unet.config.sample_size == 8
    for value, expected in ((True, True), (False, False), (None, False)):
        edit_json(tmp_path / "model_index.json", force_zeros_for_empty_prompt=value)
        assert esd_jax.load(tmp_path).zeros_for_empty_prompt is expected
    edit_json(tmp_path / "model_index.json", "force_zeros_for_empty_prompt")
    assert esd_jax.load(tmp_path).zeros_for_empty_prompt is True


def test_what_the_pipeline_does_not_read(copy, sd1):
    edit_json(copy / "vae/config.json", shift_factor=0.5, latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    edit_json(copy / "model_index.json", force_zeros_for_empty_prompt=True)
    base = told(lambda: esd_jax.load(copy), "shift_factor", "latents_mean", "latents_std")
    latents = noise(2)
    expected = theirs(reopened(copy, diffusers.DDIMScheduler), latents)
    assert np.abs(ours(base, base.schedule, "ddim", latents) - expected).max() <= 2e-3
    assert base.zeros_for_empty_prompt is False


@pytest.mark.parametrize("entry", [["diffusers", "EulerDiscreteScheduler"], None, [None, None]])
def test_model_index_names_the_scheduler(copy, entry):
    """The file may name the class that it was converted from."""
    edit_json(copy / "model_index.json", *([] if entry else ["scheduler"]), scheduler=entry)
    words = ["EulerDiscreteScheduler is taken, as model_index.json says"] if entry and entry[0] else []
    own = samplers.default_sampler(told(lambda: configs.read_architecture(copy), *words)[1])
    if entry and entry[0]:
        assert type(reopened(copy).scheduler).__name__ == entry[1] and own == "euler"
    else:
        assert own == "pndm"


def test_padding_that_would_be_masked_is_refused(copy):
    edit_json(copy / "text_encoder/config.json", use_attention_mask=True)
    with pytest.raises(ValueError, match=one_line("text_encoder/config.json", "use_attention_mask=True", SD)):
        esd_jax.load(copy)


def test_what_shapes_nothing_is_passed_over(copy, sd1):
    """A moving average's record, and a whole CLIP in place of its text encoder."""
    edit_json(copy / "unet/config.json", **json.loads((DATA / "unet_config_fields_ema.json").read_text()))
    edit_json(copy / "vae/config.json", decay=0.99, sample_size=[16, 16])
    tensors = {
        "vision_model.post_layernorm.weight": torch.ones(8), "visual_projection.weight": torch.ones(8, 8),
        "text_projection.weight": torch.ones(8, 8), "logit_scale": torch.tensor(4.6),
    }  # fmt: skip
    file = copy / "text_encoder/model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | tensors, file, {"format": "pt"})
    text = json.loads((copy / "text_encoder/config.json").read_text())
    whole = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "text_config": text,
        "vision_config": {},
        "projection_dim": 8,
    }
    (copy / "text_encoder/config.json").write_text(json.dumps(whole))
    base = esd_jax.load(copy)
    same = {name: config for name, config in sd1[2].configs.items() if name != "vae"}
    assert {name: base.configs[name] for name in same} == same
    reread = transformers.CLIPTextModel.from_pretrained(copy / "text_encoder")  # transformers reads it, too
    assert reread.config.hidden_size == base.configs["text_encoder"].hidden_size
    for component, params in base.params.items():
        assert all(np.array_equal(value, sd1[2].params[component][name]) for name, value in params.items())
    edited = base.with_edits(io.read_exact(base, ["text_encoder/final_layer_norm.bias"]))
    out = io.export(edited, copy.parent / "out")
    assert safetensors.torch.load_file(out / "text_encoder/model.safetensors")["logit_scale"] == tensors["logit_scale"]


def test_a_unets_folder_of_another_default_size_is_the_same_architecture(sd1, copy):
    edit_json(copy / "unet/config.json", sample_size=32, optimization_step=7)
    pipeline = io.with_denoiser(sd1[2], copy / "unet")
    assert pipeline.configs == sd1[2].configs


# Variants.


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_a_variant_of_one_component_alone(copy, sd1, component, tmp_path):
    file = copy / component / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ValueError, match=one_line(component, "without a variant", "variant='fp16'")):
        esd_jax.load(copy)
    base = told(lambda: esd_jax.load(copy, variant="fp16"), "'fp16'")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(copy, variant="fp16")
    assert np.array_equal(base.params["unet"]["conv_in.weight"], to_nhwc_kernel(pipe.unet.conv_in.weight))
    edits = io.read_exact(base, ["unet/conv_in.bias", "vae/decoder.conv_in.bias"])
    out = io.export(base.with_edits(edits), tmp_path / "out")
    names = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*.safetensors"))  # noqa: E731
    assert names(out) == names(copy)
    told(lambda: esd_jax.load(out, variant="fp16"), "'fp16'")


def to_nhwc_kernel(weight):
    return weight.detach().permute(2, 3, 1, 0).numpy()


# A scheduler whose own sampler is not implemented.


def test_nobody_needs_the_checkpoints_own_sampler(copy, tmp_path):
    """But who draws without naming one: it can be erased from, exported and checked."""
    set_scheduler(copy, "KDPM2")
    base = told(lambda: esd_jax.load(copy), "1 is taken")
    with pytest.raises(ValueError, match=one_line("scheduler_config.json", "KDPM2DiscreteScheduler", "--sampler=")):
        esd_jax.sample(base, ["cat"])
    erased = esd_jax.erase(base, "cat", method="uce", config="uce", dtype="float32")
    with pytest.warns(SamplerReplaced, match=one_line("by ddim in place of KDPM2DiscreteScheduler")):
        esd_jax.export(erased, tmp_path / "out", verify=True)
    assert esd_jax.sample(erased, ["cat"], sampler="euler", steps=2).shape == (1, 16, 16, 3)


def test_options_that_are_not_implemented_leave_other_samplers(copy):
    """A third-order DPM-Solver++ is erased from, and sampled, by others."""
    set_scheduler(copy, "DPM++", solver_order=3)
    schedule = quietly(copy)[1]
    with pytest.raises(ValueError, match=one_line("solver_order=3", "another sampler")):
        samplers.make_sampler(schedule)
    assert samplers.make_sampler(schedule, "ddim", 5).name == "ddim"


def test_methods_need_one_call_a_step_without_noise(copy):
    schedule = quietly(copy)[1]
    for name, words in (("heun", "twice a step"), ("ddpm", "draws noise"), ("euler_ancestral", "draws noise")):
        with pytest.raises(ValueError, match=one_line(name, words, "use 'ddim'")):
            trajectories.on_grid(schedule, name, 10)
    assert len(trajectories.on_grid(schedule, "unipc", 10).support) == 10
