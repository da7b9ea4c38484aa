"""The names of single-file checkpoints at true size, without weights; what a file says of its family; its tokenizer."""

import json
import warnings
from pathlib import Path

import diffusers
import ldm_oracle
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from messages import one_line

from esd_jax.diffusion import samplers
from esd_jax.diffusion.schedule import Schedule
from esd_jax.io import configs as config_files
from esd_jax.io import diffusers as io
from esd_jax.io import ldm, ldm_file
from esd_jax.io import safetensors as st
from esd_jax.io.corrections import Corrected
from esd_jax.io.tensors import torch_shapes
from esd_jax.models import architectures
from esd_jax.models.architectures import UNETS, clip_bpe
from esd_jax.pipeline import network
from esd_jax.text import Tokenizer

END = clip_bpe.END


def shapes_of(name):
    """Of a published architecture: "unet/NAME" -> torch shape, key -> shape in a single file, and the places."""
    configs, _ = config_files.read_architecture(architectures.folder(name))
    shapes = {
        f"{component}/{tensor}": shape
        for component, config in configs.items()
        for tensor, shape in torch_shapes(network(config, "float32")).items()
    }
    places = ldm.places(configs)
    assert places.keys() == shapes.keys()
    keys = {place.key: place.whole_shape(shapes[tensor]) for tensor, place in places.items()}
    return shapes, keys, places


def header(keys, metadata=None, **extra):
    """What `read_header` would find in a file with such tensors, none of which takes room here."""
    entries = {key: st.Entry("F16", shape, 0, 0) for key, shape in {**keys, **extra}.items()}
    return st.Header(Path("model.safetensors"), 0, entries, metadata or {})


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_reads_the_names_of_the_published_architectures(name):
    shapes, keys, places = shapes_of(name)
    slots = [(place.key, place.rows) for place in places.values()]
    assert len(set(slots)) == len(slots)  # no place twice
    assert sum(np.prod(shape) for shape in shapes.values()) == sum(np.prod(shape) for shape in keys.values())
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    results = {
        f"{component}/{tensor}": tuple(value.shape)
        for component, config in architectures.read(name).items()
        if component in ("unet", "vae", "text_encoder", "text_encoder_2")
        for tensor, value in ldm_oracle.from_ldm(checkpoint, component, config, xl=name == "sdxl").items()
    }
    assert results == shapes


@pytest.mark.filterwarnings("ignore:.*does not say what it predicts")
@pytest.mark.parametrize("name", UNETS)
def test_a_published_file_is_told_by_its_keys_and_shapes(name, tmp_path):
    keys = shapes_of(name)[1]
    others = {"alphas_cumprod": ("F32", (1000,)), "cond_stage_model.model.logit_scale": ("F32", ())}
    entries = st.lay_out({key: ("F16", shape) for key, shape in keys.items()} | others)
    entry = {key: {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.start, e.stop]} for key, e in entries.items()}
    text = json.dumps(entry).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:  # gigabytes of nothing, which take no room on the disk
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + max(e.stop for e in entries.values()))

    folder = architectures.folder({"sd21-base": "sd21"}.get(name, name))
    header = st.read_header(file)
    assert ldm_file.config_folder(header, None) == folder
    configs, schedule = io.describe(file)
    assert configs == config_files.read_architecture(folder)[0]
    assert schedule.prediction_type == ("v_prediction" if "sd21" in name else "epsilon")
    assert {name: source.key for name, source in ldm_file.locate(header, configs).items()} == {
        name: place.key for name, place in shapes_of(folder.name)[2].items()
    }
    assert io.describe(file, config=name)[1].prediction_type == ("v_prediction" if name == "sd21" else "epsilon")


def test_families_that_are_not_implemented():
    keys = shapes_of("sdxl")[1]
    to_k = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    for extra, words in (
        ({"edm_mean": (4,)}, ["EDM"]),
        ({"edm_vpred.sigma_max": ()}, ["EDM"]),
        ({to_k: (640, 1280)}, ["1280 wide"]),
    ):
        with pytest.raises(ValueError, match=one_line("model.safetensors", "unknown family", *words, "config=")):
            ldm_file.config_folder(header({**keys, **extra}), None)


# A few names as the published files have them, so that nothing hangs on diffusers' converters alone.
KNOWN = {
    "sd14": {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.bias": (1280,),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.time_embed.2.bias": (1280,),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.norm_out.weight": (512,),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    },
    "sd21": {
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.bias": (4096,),
        "model.diffusion_model.input_blocks.2.1.proj_in.weight": (320, 320),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias": (3840,),
        "conditioner.embedders.1.model.ln_final.weight": (1280,),
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_names(name):
    keys = shapes_of(name)[1]
    assert {key: keys.get(key) for key in KNOWN[name]} == KNOWN[name]


def test_what_training_codes_have_besides():
    """Of SD 2 what diffusers leaves out by name, and the temperature; of SDXL that alone."""
    configs = {name: config_files.read_architecture(architectures.folder(name))[0] for name in ("sd14", "sd21", "sdxl")}
    besides = ldm.unread(configs["sd21"])
    temperature = "cond_stage_model.model.logit_scale"
    assert besides.keys() - {temperature} == set(single_file_utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE)
    assert besides["cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight"] == (3072, 1024)
    assert besides["cond_stage_model.model.transformer.resblocks.23.mlp.c_proj.weight"] == (1024, 4096)
    assert (besides[temperature], besides["cond_stage_model.model.text_projection"]) == ((), (1024, 1024))
    assert ldm.unread(configs["sdxl"]) == {"conditioner.embedders.1.model.logit_scale": ()}
    assert ldm.unread(configs["sd14"]) == {}


def test_the_moving_average_has_no_dots():
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert ldm.ema_key(key) == "model_ema.diffusion_modelinput_blocks00weight"


def test_what_a_file_says_of_its_schedule():
    sd1, sd2, sdxl = (header(shapes_of(name)[1]) for name in ("sd14", "sd21", "sdxl"))

    def changes(file, metadata=None, **extra):
        entries = {**file.entries, **{key: st.Entry("F32", (0,), 0, 0) for key in extra}}
        return ldm_file.scheduler_changes(st.Header(file.path, 0, entries, metadata or {}), None)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert changes(sd1) == changes(sdxl) == {}
        assert changes(sd2, {"modelspec.prediction_type": "epsilon"}) == {"prediction_type": "epsilon"}
        assert changes(sd2, {"modelspec.prediction_type": "v"}) == {"prediction_type": "v_prediction"}
        assert changes(sd1, {"modelspec.prediction_type": "v"}) == {"prediction_type": "v_prediction"}
        assert changes(sdxl, v_pred=1) == {"prediction_type": "v_prediction"}
        from_noise = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        v = {"prediction_type": "v_prediction"}
        assert changes(sdxl, v_pred=1, ztsnr=1) == v | from_noise
        for word in ("v_prediction", "V-Prediction", "v_pred", " v "):
            assert changes(sdxl, {"modelspec.prediction_type": word}) == v
        assert changes(sdxl, {"modelspec.predict_key": "v"}) == v  # ComfyUI
        assert changes(sd2, {"modelspec.predict_key": "epsilon"}) == {"prediction_type": "epsilon"}
        kohya = {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}
        assert changes(sdxl, kohya) == v | from_noise
        assert changes(sd1, kohya) == v | from_noise | {"_class_name": "DDIMScheduler"}  # PNDM knows no such noise
        assert changes(sd2, {"ss_v_parameterization": "False"}) == {"prediction_type": "epsilon"}
        not_so = {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "None"}
        assert changes(sdxl, not_so) == {"prediction_type": "epsilon"}
        assert changes(sdxl, {"ss_zero_terminal_snr": "true"}) == {"rescale_betas_zero_snr": True}
        assert ldm_file.scheduler_changes(sd2, "sd21-base") == ldm_file.scheduler_changes(sd2, "sd21") == {}
        marked = st.Header(sdxl.path, 0, {**sdxl.entries, "v_pred": st.Entry("F32", (0,), 0, 0)}, {})
        assert ldm_file.scheduler_changes(marked, "sdxl") == {"prediction_type": "v_prediction"}
        assert ldm_file.scheduler_changes(marked, architectures.folder("sdxl")) == {}
    with pytest.warns(Corrected, match=one_line("model.safetensors", "does not say", "config='sd21-base'")):
        assert changes(sd2) == {}
    with pytest.warns(Corrected, match=one_line("modelspec.prediction_type='flow'", "not known")):
        assert changes(sdxl, {"modelspec.prediction_type": "flow"}, v_pred=1) == v
    with pytest.warns(Corrected, match=one_line("ss_v_parameterization='maybe'", "neither True nor False")):
        assert changes(sdxl, {"ss_v_parameterization": "maybe"}) == {}
    with pytest.warns(Corrected, match=one_line("epsilon by modelspec.prediction_type", "v_prediction by v_pred")):
        assert changes(sdxl, {"modelspec.prediction_type": "epsilon"}, v_pred=1) == {"prediction_type": "epsilon"}


def test_a_file_of_zero_terminal_snr_has_its_schedule():
    """Of a class that knows it: the published SD 1 is of another."""
    metadata = {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}
    for name, kind in (("sd14", "DDIMScheduler"), ("sdxl", "EulerDiscreteScheduler")):
        published = config_files.read_architecture(architectures.folder(name))[1].config
        changes = ldm_file.scheduler_changes(header(shapes_of(name)[1], metadata), None)
        schedule = Schedule.from_config({**published, **changes})
        assert schedule.config["_class_name"] == kind
        assert (schedule.prediction_type, schedule.alpha_bar[-1]) == ("v_prediction", 0)
        theirs = getattr(diffusers, kind).from_config(schedule.config)
        np.testing.assert_allclose(schedule.alpha_bar[:-1], theirs.alphas_cumprod[:-1].numpy(), rtol=1e-4, atol=1e-7)
        assert samplers.make_sampler(schedule, num_steps=20).timesteps[0] == 999


def test_the_step_count_of_sd2_base(tmp_path):
    keys = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": ("F32", (1, 1024))}
    file = tmp_path / "base.safetensors"
    for steps, changes in ((875000, {"prediction_type": "epsilon"}), (110000, {})):
        entries = st.lay_out(keys)
        stop = 1024 * 4
        entries["global_step"] = st.Entry("I64", (), stop, stop + 8)
        values = {"global_step": np.array([steps])}
        st.write(file, entries, lambda key, values=values: values.get(key, np.zeros((1, 1024), np.float32)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if steps != 875000 else "error")
            assert ldm_file.scheduler_changes(st.read_header(file), None) == changes


def test_the_tokenizer_that_the_package_carries():
    assert clip_bpe.MERGES.stat().st_size < 400_000
    start, end = 49406, 49407
    # Ids of open_clip's SimpleTokenizer.
    expected = {
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "Van Gogh": [2451, 19697],
        "a café in Zürich, 1887!": [320, 15304, 530, 89, 6522, 4021, 267, 272, 279, 279, 278, 256],
        "🐱 cats & dogs'": [22979, 3989, 261, 3255, 262],
        "  Multiple   spaces\tand\nlines ": [6470, 9006, 537, 3418],
    }
    for pad, padding in ((END, end), ("!", 0)):
        tokenizer = Tokenizer.clip(pad, 77)
        assert tokenizer.max_length == 77
        rows = [[start, *ids, end] for ids in expected.values()]
        if pad == "!":  # transformers takes a text's own "!" for the padding then, in the published folders, too
            rows = [[0 if token == 256 else token for token in row] for row in rows]
        rows = [row + [padding] * (77 - len(row)) for row in rows]
        np.testing.assert_array_equal(tokenizer(list(expected)), rows)
