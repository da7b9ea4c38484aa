"""Single files of FLUX.1 and SD3: there and back without a changed bit, edits, and what diffusers draws."""

import json
import shutil
from pathlib import Path

import diffusers
import flow_files
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils
from flow_files import KINDS, UNET, converted, folder_and_file, foreign
from messages import one_line
from single_files import raw
from torch_oracle import error

import esd_jax
from esd_jax.io import diffusers as io
from esd_jax.io import flow_file, ldm
from esd_jax.io import safetensors as st
from esd_jax.io.single_file import export_single
from esd_jax.io.tensors import torch_shapes
from esd_jax.models.flux import FluxConfig
from esd_jax.models.sd3 import SD3Config
from esd_jax.pipeline import network

PROMPTS, SIZE, STEPS = ["a photo of a cat", "two cats"], (16, 24), 2
MATRIX = {
    "dev": "transformer/transformer_blocks.1.attn.add_k_proj.weight",
    "schnell": "transformer/single_transformer_blocks.1.proj_mlp.weight",
    "sd3": "transformer/transformer_blocks.0.attn2.to_v.weight",
    "sd3-medium": "transformer/transformer_blocks.1.attn.add_q_proj.weight",
}
SWAPPED = {**dict.fromkeys(KINDS, "norm_out"), "sd3": "transformer_blocks.2.norm1_context"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(kind, folder, torch pipeline, single file)"""
    return request.param, *folder_and_file(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return folder_and_file("dev", tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return folder_and_file("sd3", tmp_path_factory.mktemp("sd3"))


def weights(folder, component="transformer"):
    """A component's tensors, under bare names."""
    (file,) = (folder / component).glob("*.safetensors")
    return {key.removeprefix("text_model."): v for key, v in safetensors.torch.load_file(file).items()}


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        a, b = ours[key], theirs[key]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), key
        assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)), key


# Names.

SD3_MEDIUM = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
}  # fmt: skip
PUBLISHED = {
    "flux-dev": FluxConfig(guidance_embeds=True),
    "flux-schnell": FluxConfig(),
    "sd3-medium": SD3Config(**SD3_MEDIUM),
    "sd35-medium": SD3Config(
        **{**SD3_MEDIUM, "pos_embed_max_size": 384}, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
    ),
    "sd35-large": SD3Config(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
    ),
}
# A few names as the published files have them, so that nothing hangs on diffusers' converters alone.
KNOWN = {
    "flux-dev": {
        "double_blocks.18.img_attn.qkv.weight": (9216, 3072),
        "double_blocks.0.txt_attn.norm.key_norm.scale": (128,),
        "double_blocks.0.txt_mlp.2.weight": (3072, 12288),
        "single_blocks.37.linear1.weight": (21504, 3072),
        "single_blocks.0.linear2.weight": (3072, 15360),
        "single_blocks.0.modulation.lin.bias": (9216,),
        "final_layer.adaLN_modulation.1.weight": (6144, 3072),
        "guidance_in.in_layer.weight": (3072, 256),
        "img_in.weight": (3072, 64),
    },
    "sd35-medium": {
        "joint_blocks.12.x_block.attn2.qkv.weight": (4608, 1536),
        "joint_blocks.0.x_block.adaLN_modulation.1.weight": (13824, 1536),
        "joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536),
        "joint_blocks.0.context_block.attn.ln_k.weight": (64,),
        "pos_embed": (1, 147456, 1536),
        "y_embedder.mlp.0.weight": (1536, 2048),
        "x_embedder.proj.weight": (1536, 16, 2, 2),
        "final_layer.linear.weight": (64, 1536),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_reads_the_names_of_the_published_ones(name):
    config = PUBLISHED[name]
    shapes = {f"transformer/{tensor}": s for tensor, s in torch_shapes(network(config, "float32")).items()}
    places = ldm.places({"transformer": config})
    slots = [(place.key, place.rows) for place in places.values()]
    assert len(set(slots)) == len(slots)  # no place twice
    keys = {place.key: place.whole_shape(shapes[tensor]) for tensor, place in places.items()}
    assert sum(np.prod(shape) for shape in shapes.values()) == sum(np.prod(shape) for shape in keys.values())
    assert {key: keys.get(key) for key in KNOWN.get(name, {})} == KNOWN.get(name, {})
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    results = converted("dev" if "flux" in name else "sd3", checkpoint, width=3072)
    assert {f"transformer/{key}": tuple(value.shape) for key, value in results.items()} == shapes

    # And the file shows which one it is, whatever transformer its folder has.
    for prefix in ("", UNET):
        entries = {prefix + key: st.Entry("BF16", shape, 0, 0) for key, shape in keys.items()}
        header = st.Header(Path("model.safetensors"), 0, entries, {})
        other = FluxConfig(num_layers=1, guidance_embeds=name == "flux-dev") if "flux" in name else SD3Config()
        assert flow_file.name_of(header) == name
        assert flow_file.with_architecture(header, {"transformer": other})["transformer"] == config


# There and back.


def test_diffusers_converts_it(kind):
    name, folder, _, file = kind
    assert_same_bits(converted(name, safetensors.torch.load_file(file)), weights(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alone", [True, False])
def test_folder_to_single_to_folder(kind, dtype, alone, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(kind[1], folder)
    if dtype != torch.float32:
        for file in folder.glob("*/*.safetensors"):
            cast = {key: value.to(dtype) for key, value in safetensors.torch.load_file(file).items()}
            safetensors.torch.save_file(cast, file, {"format": "pt"})
    single = export_single(io.load(folder), tmp_path / "single.safetensors", alone=alone)
    header = st.read_header(single)
    assert {st.DTYPES[entry.dtype].itemsize for entry in header.entries.values()} == {dtype.itemsize}
    assert {key.partition(".")[0] for key in header.entries if "blocks" not in key} & {"text_encoders"} == (
        set() if alone else {"text_encoders"}
    )
    out = io.export(io.load(single, config=folder, dtype="bfloat16"), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        copy = out / path.relative_to(folder)
        if path.suffix == ".safetensors":
            assert_same_bits(weights(out, path.parent.name), weights(folder, path.parent.name))
        elif path.suffix == ".json":
            assert json.loads(copy.read_text()) == json.loads(path.read_text()), path
        else:
            assert copy.read_bytes() == path.read_bytes()
    # And once more: the single file of the new folder is the first one.
    again = export_single(io.load(out), tmp_path / "again.safetensors", alone=alone)
    assert again.read_bytes() == single.read_bytes()


def test_single_to_edit_to_single(kind, tmp_path):
    """Of a file that others wrote: the rows that were edited change, and no other byte."""
    name, folder, _, _ = kind
    alone = export_single(io.load(folder), tmp_path / "alone.safetensors", alone=True)
    base = foreign(alone, tmp_path / "base.safetensors")
    pipeline = io.load(base, config=folder)
    assert raw(export_single(pipeline, tmp_path / "same.safetensors")) == raw(base)

    names = [MATRIX[name], f"transformer/{SWAPPED[name]}.linear.bias"]
    shapes = [pipeline.params["transformer"][tensor.partition("/")[2]].shape for tensor in names]
    draws = np.random.default_rng(0)
    edits = {tensor: jnp.asarray(draws.normal(size=s), jnp.float32) for tensor, s in zip(names, shapes, strict=True)}
    out = export_single(pipeline.with_edits(edits, {"concepts": ["cat"]}), tmp_path / "out.safetensors")
    ours, theirs = raw(out), raw(base)
    assert list(ours) == list(theirs)
    places = ldm.places({"transformer": pipeline.configs["transformer"]}, prefix=UNET)
    assert {key for key in ours if ours[key] != theirs[key]} == {places[tensor].key for tensor in names}
    now, before = safetensors.torch.load_file(out), safetensors.torch.load_file(base)
    place = places[names[0]]
    start, stop = place.rows
    np.testing.assert_array_equal(now[place.key][start:stop].T, edits[names[0]])
    assert now[place.key][:start].equal(before[place.key][:start])
    assert now[place.key][stop:].equal(before[place.key][stop:])
    half = edits[names[1]].size // 2
    np.testing.assert_array_equal(now[places[names[1]].key], np.roll(edits[names[1]], half))
    with safetensors.safe_open(out, "np") as opened:
        assert opened.metadata() == {"format": "pt", "author": "A", "esd_jax": json.dumps([{"concepts": ["cat"]}])}
    again = io.load(out, config=folder)
    for tensor, value in io.read_exact(again, names).items():
        np.testing.assert_array_equal(value, edits[tensor])


def test_a_file_is_written_into_the_one_that_a_folder_was_made_of(dev, tmp_path):
    folder, _, file = dev
    base = foreign(file, tmp_path / "base.safetensors")
    edited = io.load(folder).with_edits({MATRIX["dev"]: jnp.ones((32, 32))})
    out = export_single(edited, tmp_path / "out.safetensors", into=base)
    changed = {key for key, value in raw(out).items() if value != raw(base)[key]}
    assert changed == {UNET + "double_blocks.1.txt_attn.qkv.weight"}
    flow_files.flow_factories.make_flux(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=one_line("another model", "transformer/")):
        export_single(io.load(tmp_path / "other"), tmp_path / "no.safetensors", into=base)


# What a file does not hold.


def test_a_transformer_takes_the_rest_from_a_base(dev, tmp_path):
    folder, _, file = dev
    flow_files.flow_factories.make_flux(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=one_line("dev.safetensors", "without its text encoders", "base=")):
        esd_jax.load(file)
    for loaded in (
        esd_jax.load(file, base=tmp_path / "other"),
        esd_jax.load(file, base=esd_jax.load(tmp_path / "other")),
        esd_jax.load(file, config=tmp_path / "other"),
    ):
        own, other = io.load(folder), io.load(tmp_path / "other")
        for component, params in loaded.params.items():
            for name, value in params.items():
                expected = (own if component == "transformer" else other).params[component][name]
                np.testing.assert_array_equal(value, expected, f"{component}/{name}")
        assert (loaded.provenance.source, loaded.provenance.file) == (str(file), file)
        assert raw(export_single(loaded, tmp_path / "out.safetensors", overwrite=True)) == raw(file)
    out = io.load(io.export(loaded, tmp_path / "out"))
    for component, params in loaded.params.items():
        for name, value in params.items():
            np.testing.assert_array_equal(out.params[component][name], value)


def test_a_pruned_transformer_has_its_own_depth(dev, tmp_path):
    """As FLUX.1-lite, whose folder is [dev]'s but for fewer blocks."""
    folder, _, file = dev
    tensors = safetensors.torch.load_file(file)
    pruned = tmp_path / "pruned.safetensors"
    safetensors.torch.save_file({k: v for k, v in tensors.items() if not k.startswith("double_blocks.1.")}, pruned)
    pipeline = io.load(pruned, config=folder)
    assert (pipeline.configs["transformer"].num_layers, pipeline.configs["transformer"].num_single_layers) == (1, 2)
    out = io.export(pipeline, tmp_path / "out")
    written, before = (json.loads((f / "transformer" / "config.json").read_text()) for f in (out, folder))
    assert written == before | {"num_layers": 1}
    diffusers.FluxTransformer2DModel.from_pretrained(out, subfolder="transformer")


def test_an_edit_that_the_file_does_not_hold_is_refused(dev, tmp_path):
    folder, _, file = dev
    name = "text_encoder/final_layer_norm.bias"
    for base, words in ((io.load(folder), ["alone=False"]), (io.load(file, config=folder), ["dev.safetensors"])):
        edited = base.with_edits({name: jnp.ones(base.params["text_encoder"]["final_layer_norm.bias"].shape)})
        with pytest.raises(ValueError, match=one_line(name, "does not hold", *words)):
            export_single(edited, tmp_path / "out.safetensors")
    edited = io.load(folder).with_edits(edited.edits)
    out = export_single(edited, tmp_path / "all.safetensors", alone=False)
    assert raw(out)["text_encoders.clip_l.transformer.text_model.final_layer_norm.bias"][1] == (32,)
    with pytest.raises(ValueError, match=one_line("alone=True", "written into", "leave it out")):
        export_single(io.load(file, config=folder), tmp_path / "no.safetensors", alone=True)


# What diffusers draws.


@torch.no_grad()
def latents(pipe):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": STEPS, "output_type": "latent", "max_sequence_length": 12}
    return pipe(PROMPTS, height=SIZE[0], width=SIZE[1], generator=generator, **options).images.numpy()


def test_diffusers_opens_a_transformer(kind, tmp_path, monkeypatch):
    """The edited file in the pipeline of the base, against the edited folder."""
    name, folder, pipe, _ = kind
    flow_files.diffusers_reads_tiny_flux(monkeypatch)
    base = io.load(folder)
    value = base.params["transformer"][MATRIX[name].partition("/")[2]]
    edited = base.with_edits({MATRIX[name]: value + 0.5})
    file = export_single(edited, tmp_path / "edited.safetensors", alone=True)
    before, transformer = latents(pipe), type(pipe.transformer)
    of_file = transformer.from_single_file(str(file), config=str(folder), subfolder="transformer")
    of_folder = transformer.from_pretrained(io.export(edited, tmp_path / "out"), subfolder="transformer")
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "transformer", of_file)
        ours = latents(pipe)
        patch.setattr(pipe, "transformer", of_folder)
        np.testing.assert_array_equal(ours, latents(pipe))
    assert error(ours, before) > 1e-3  # so that the edit shows


def test_diffusers_opens_a_whole_sd3(tmp_path):
    """The text encoder's projection is none, as in the published files: diffusers reads no other."""
    folder, _, file = folder_and_file("sd3", tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors | {"text_projection.weight": torch.eye(32)}, path, {"format": "pt"})
    file = export_single(io.load(folder), tmp_path / "whole.safetensors")
    # diffusers tells the CLIPs by their width, which is one here, and leaves T5's embedding without values, which has
    # a second name in transformers 5.
    others = {
        "text_encoder_2": transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        "text_encoder_3": transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_3"),
    }
    pipe = diffusers.StableDiffusion3Pipeline.from_single_file(str(file), config=str(folder), **others)
    t5 = single_file_utils.convert_sd3_t5_checkpoint_to_diffusers(safetensors.torch.load_file(file))
    assert_same_bits(t5, weights(folder, "text_encoder_3"))
    for component in ("transformer", "vae", "text_encoder"):
        theirs = {key.removeprefix("text_model."): v for key, v in getattr(pipe, component).state_dict().items()}
        assert_same_bits({key: theirs[key] for key in weights(folder, component)}, weights(folder, component))
    np.testing.assert_array_equal(latents(pipe), latents(diffusers.StableDiffusion3Pipeline.from_pretrained(folder)))
