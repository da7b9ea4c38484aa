"""The published architectures against diffusers and transformers, without weights; and what is not implemented."""

import json
from functools import cache

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch_oracle import AXES

from esd_jax import api, families
from esd_jax.models import architectures
from esd_jax.models.clip import CLIPTextConfig, CLIPTextModel
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import VAEConfig
from esd_jax.params import functional, num_scalars

CLIP_L, OPENCLIP_H, OPENCLIP_G, VAE = (196, 123_060_480), (372, 340_387_840), (517, 694_659_840), (248, 83_653_863)
# (tensors, scalars), as counted in the published files.
COUNTS = {
    "sd14": {"unet": (686, 859_520_964), "vae": VAE, "text_encoder": CLIP_L},
    "sd21": {"unet": (686, 865_910_724), "vae": VAE, "text_encoder": OPENCLIP_H},
    "sd21-base": {"unet": (686, 865_910_724), "vae": VAE, "text_encoder": OPENCLIP_H},
    "sdxl": {"unet": (1680, 2_567_463_684), "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_G},
}
CLIP_L_PROJECTED, T5, VAE_16 = (197, 123_650_304), (219, 4_762_310_656), (244, 83_819_683)
FLUX = {"vae": VAE_16, "text_encoder": CLIP_L, "text_encoder_2": T5}
SD3 = {"vae": VAE_16, "text_encoder": CLIP_L_PROJECTED, "text_encoder_2": OPENCLIP_G, "text_encoder_3": T5}
# The scalars of SD3's include the sines of the places, which nothing trains.
COUNTS |= {
    "flux-dev": {"transformer": (1160, 11_901_408_320), **FLUX},
    "flux-schnell": {"transformer": (1156, 11_891_178_560), **FLUX},
    "sd3-medium": {"transformer": (683, 2_028_328_000 + 56_623_104), **SD3},
    "sd35-medium": {"transformer": (909, 2_243_171_520 + 226_492_416), **SD3},
    "sd35-large": {"transformer": (1227, 8_056_627_520 + 89_653_248), **SD3},
    # The VAE's include the statistics of its latents, 128 channels; of Qwen3's 36 layers 27 are needed.
    "klein-4b": {
        "transformer": (169, 3_875_544_576),
        "vae": (250, 84_046_115 + 2 * 128),
        "text_encoder": (1 + 27 * 11, 151_936 * 2560 + 27 * 100_930_816),
    },
}
NETWORKS = [(name, component) for name, components in COUNTS.items() for component in components]


@cache
def network(name, component):
    config = api.architecture(name)[0][component]
    return functional(lambda: families.module(config)(config))


def theirs(config):
    """The network that diffusers or transformers builds from a config file, without memory for its weights."""
    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        kind = getattr(transformers, config["architectures"][0])
        return kind(kind.config_class(**config))


def test_every_architecture_is_counted():
    assert tuple(COUNTS) == architectures.ARCHITECTURES
    for name, components in COUNTS.items():
        assert set(architectures.read(name)) == {*components, "scheduler", "model_index"}


@pytest.mark.parametrize(("name", "component"), NETWORKS)
def test_counts(name, component):
    shapes = network(name, component).shapes
    assert (len(shapes), num_scalars(shapes)) == COUNTS[name][component]


@pytest.mark.parametrize(("name", "component"), NETWORKS)
def test_names_and_shapes_are_those_of_torch(name, component):
    ours, config = network(name, component), architectures.read(name)[component]
    original = theirs(config)
    expected = {key.removeprefix("text_model."): tuple(v.shape) for key, v in original.state_dict().items()}
    expected.pop("encoder.embed_tokens.weight", None)  # which is shared.weight
    ignores = getattr(api.architecture(name)[0][component], "ignores", lambda key: False)
    expected = {key: shape for key, shape in expected.items() if not ignores(key)}
    # AXES leads from torch's layout to ours; argsort inverts it.
    for key, value in ours.shapes.items():
        # A vector may have several axes, which are the same in torch.
        axes = range(len(value.shape)) if ours.layouts[key] == "vector" else np.argsort(AXES[ours.layouts[key]])
        assert tuple(value.shape[i] for i in axes) == expected.pop(key), key
    assert not expected
    # What they write, every field spelled out, is read as the same architecture.
    if component.startswith("text"):
        written = original.config.to_dict() | {"architectures": config["architectures"]}
    else:
        written = json.loads(original.to_json_string())
    kind = type(api.architecture(name)[0][component])
    assert kind.from_dict(written) == kind.from_dict(config)


@pytest.mark.parametrize("name", architectures.UNETS)
def test_pipeline_and_scheduler_are_known_to_diffusers(name):
    configs = architectures.read(name)
    index = configs["model_index"]
    assert index["_class_name"] == ("StableDiffusionXLPipeline" if name == "sdxl" else "StableDiffusionPipeline")
    assert index["scheduler"][1] == configs["scheduler"]["_class_name"]
    scheduler = getattr(diffusers, configs["scheduler"]["_class_name"]).from_config(configs["scheduler"])
    assert scheduler.config.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")
    assert 0.0046 < scheduler.alphas_cumprod[-1] < 0.0047  # of the scaled linear schedule
    for component in COUNTS[name]:
        library, kind = index[component]
        assert kind in (configs[component].get("_class_name"), *configs[component].get("architectures", ()))
        assert library == ("transformers" if component.startswith("text") else "diffusers")
    sides = {"sd14": 512, "sd21": 768, "sd21-base": 512, "sdxl": 1024}
    factor = VAEConfig.from_dict(configs["vae"]).factor
    assert configs["unet"]["sample_size"] * factor == sides[name]
    assert configs["vae"]["scaling_factor"] == (0.13025 if name == "sdxl" else 0.18215)


@pytest.mark.parametrize("name", architectures.TRANSFORMERS)
def test_pipeline_and_scheduler_of_flows_are_known_to_diffusers(name):
    read, (configs, schedule) = architectures.read(name), api.architecture(name)
    index, flux, klein = read["model_index"], name.startswith("flux"), name == "klein-4b"
    families.of(configs).check(configs)
    for component in COUNTS[name]:
        library, kind = index[component]
        assert kind in (read[component].get("_class_name"), *read[component].get("architectures", ()))
        assert library == ("transformers" if component.startswith("text") else "diffusers")
    assert families.of(configs).default_size(configs) == (1024, 1024)
    # The scales of VAEs, and the noise levels of a square image of 1024 pixels.
    scaled = (1.0, None) if klein else (0.3611, 0.1159) if flux else (1.5305, 0.0609)
    assert (configs["vae"].scaling_factor, configs["vae"].shift_factor) == scaled
    theirs = getattr(diffusers, read["scheduler"]["_class_name"]).from_config(read["scheduler"])
    mu = compute_empirical_mu(4096, 4) if klein else 1.15
    levels = {"sigmas": np.linspace(1, 1 / 4, 4), "mu": mu} if flux or klein else {"num_inference_steps": 4}
    theirs.set_timesteps(**levels)
    ours = families.of(configs).at_size(configs, schedule, (1024, 1024)).visited(4)
    np.testing.assert_allclose(ours, theirs.sigmas[:-1].numpy(), rtol=3e-7)


def test_unknown_architecture():
    with pytest.raises(ValueError, match="no architecture is named 'sd3': choose one of sd14, .*, klein-4b"):
        architectures.read("sd3")


def test_parameters_of_a_new_network_differ():
    config = CLIPTextConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2)
    layers = CLIPTextModel(config).encoder.layers
    first, second = (jax.device_get(layer.mlp.fc1.kernel[...]) for layer in layers)
    assert (first != second).all()


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type='timestep' is not implemented"),
        ("unet", {"num_class_embeds": 1000}, "num_class_embeds=1000 is not implemented"),
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256 is not implemented"),
        ("unet", {"dropout": 0.1}, r"dropout=0.1 is not implemented \(implemented: 0.0\)"),
        ("unet", {"act_fn": "gelu"}, r"act_fn='gelu' is not implemented \(implemented: 'silu'\)"),
        ("unet", {"mid_block_type": None}, "mid_block_type=None is not implemented"),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D' is not implemented"),
        ("unet", {"norm_num_groups": None}, "norm_num_groups=None is not implemented"),
        ("unet", {"num_attention_heads": 8}, "num_attention_heads=8 is not implemented"),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj' is not implemented"),
        ("unet", {"addition_embed_type": "text"}, "addition_embed_type='text' is not implemented"),
        ("unet", {"addition_embed_type": "text_time"}, "needs the config field addition_time_embed_dim"),
        ("unet", {"only_cross_attention": [True, True, False, False]}, "only_cross_attention=.* is not implemented"),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift' is not impl"),
        ("unet", {"reverse_transformer_layers_per_block": [1]}, "reverse_transformer_layers_per_block=.* is not impl"),
        ("unet", {"transformer_layers_per_block": [[1, 2], 1, 1, 1]}, "nested transformer_layers_per_block is not"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types='AttnDownBlock2D' is not impl"),
        ("unet", {"up_block_types": ["UpBlock2D"] * 3}, "up_block_types has 3 entries for 4 block_out_channels"),
        ("unet", {"attention_head_dim": [5, 10]}, "attention_head_dim has 2 entries for 4 block_out_channels"),
        ("unet", {"attention_head_dim": 7}, "attention_head_dim=7 heads do not divide 320"),
        ("unet", {"sample_size": [64, 96, 64]}, r"sample_size=.* is neither a number nor \(height, width\)"),
        ("unet", {"sample_size": 0}, "sample_size=0 must be finite, above 0"),
        ("unet", {"norm_eps": float("nan")}, "norm_eps=nan must be finite, above 0"),
        ("unet", {"freq_shift": float("inf")}, "freq_shift=inf must be finite and"),
        ("unet", {"block_out_channels": [320, 640, -1280, 1280]}, "block_out_channels=.* must be finite, above 0"),
        ("unet", {"cross_attention_dim": 10**30}, "cross_attention_dim=10+ must be finite, above 0 and no more"),
        ("unet", {"a_new_field": 1}, "a_new_field=1 is not implemented"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "='AttnDownEncoderBlock2D' is not implemented"),
        ("vae", {"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types has 3 entries for 4 block_out_channels"),
        ("vae", {"scaling_factor": 0}, "scaling_factor=0 must be finite, above 0"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor=nan must be finite, above 0"),
        ("vae", {"scaling_factor": float("inf")}, "scaling_factor=inf must be finite, above 0"),
        ("vae", {"scaling_factor": -0.18}, "scaling_factor=-0.18 must be finite, above 0"),
        ("vae", {"shift_factor": float("nan")}, "shift_factor=nan must be finite and"),
        ("text_encoder", {"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 must be finite, above 0"),
        ("text_encoder", {"hidden_size": float("inf")}, "hidden_size=inf is not implemented"),
        ("vae", {"act_fn": "relu"}, "act_fn='relu' is not implemented"),
        ("vae", {"latents_mean": [0.0] * 4}, "latents_mean=.* is not implemented"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
        ("text_encoder", {"model_type": "t5"}, "model_type='t5' is not implemented"),
        ("text_encoder", {"architectures": ["CLIPModel"]}, "architectures='CLIPModel' is not implemented"),
    ],
)
def test_refusals(component, changes, message):
    with pytest.raises(ValueError, match=message):
        type(api.architecture("sd14")[0][component]).from_dict(architectures.read("sd14")[component] | changes)


def test_fields_that_are_off_are_accepted():
    off = {"class_embed_type": None, "mid_block_only_cross_attention": None, "upcast_attention": None, "_future": 1}
    UNetConfig.from_dict(architectures.read("sdxl")["unet"] | off)
