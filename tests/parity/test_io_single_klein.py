"""Single files of FLUX.2 [klein]'s transformer: what diffusers' converter makes of ours, and what is read of them."""

import diffusers
import jax.numpy as jnp
import klein_factory
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from flow_files import foreign
from messages import one_line
from single_files import raw

import esd_jax
from esd_jax.families import KLEIN
from esd_jax.io import diffusers as io
from esd_jax.io.single_file import export_single
from esd_jax.models.flux2 import Flux2Config

MATRIX = "transformer/transformer_blocks.1.attn.add_k_proj.weight"
NORM = "transformer/norm_out.linear.weight"  # whose halves a single file swaps


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """(folder, the torch pipeline that wrote it, our single file of it)"""
    root = tmp_path_factory.mktemp("klein")
    pipe = klein_factory.make_klein(root / "model")
    return root / "model", pipe, export_single(io.load(root / "model"), root / "klein.safetensors")


def test_diffusers_reads_every_tensor_bit_for_bit(klein):
    _, pipe, file = klein
    tensors = safetensors.torch.load_file(file)
    # As the published file is named: fused queries, keys and values, and blocks of one stream as they are.
    assert tensors["double_blocks.1.txt_attn.qkv.weight"].shape == (120, 40)
    assert tensors["single_blocks.0.linear1.weight"].shape == (240, 40)
    assert {"double_stream_modulation_txt.lin.weight", "double_blocks.0.img_attn.norm.query_norm.scale"} <= {*tensors}
    converted = convert_flux2_transformer_checkpoint_to_diffusers(tensors)
    expected = pipe.transformer.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], value) for name, value in expected.items())


@pytest.mark.parametrize("others", [False, True], ids=["ours", "with a prefix"])
def test_a_file_is_read_beside_its_base(klein, others, tmp_path):
    folder, _, file = klein
    base = esd_jax.load(folder)
    file = foreign(file, tmp_path / "other.safetensors") if others else file
    for options in ({"base": folder}, {"config": folder}):
        read = esd_jax.load(file, **options)
        assert read.family is KLEIN and read.configs == base.configs
        for component, params in base.params.items():
            for name, value in params.items():
                np.testing.assert_array_equal(read.params[component][name], value, err_msg=name)
    with pytest.raises(ValueError, match=one_line(file, "without its text encoders", "base=")):
        esd_jax.load(file)


def test_edits_go_into_a_file_and_into_a_folder(klein, tmp_path):
    folder, _, file = klein
    base = esd_jax.load(file, base=folder)
    assert raw(export_single(base, tmp_path / "same.safetensors")) == raw(file)
    edits = {name: jnp.asarray(io.read_exact(base, [name])[name] + 1) for name in (MATRIX, NORM)}
    erased = base.with_edits(edits, {"concepts": [{"text": "cat"}], "base_sha256": "x"})
    written = export_single(erased, tmp_path / "erased.safetensors")
    again = esd_jax.load(written, base=folder)
    for name, value in edits.items():
        np.testing.assert_array_equal(io.read_exact(again, [name])[name], value)
    np.testing.assert_array_equal(
        esd_jax.load(io.export(erased, tmp_path / "out")).params["transformer"][NORM[12:]], edits[NORM]
    )
    with pytest.raises(ValueError, match=one_line("alone=False", "FLUX.2")):
        export_single(esd_jax.load(folder), tmp_path / "whole.safetensors", alone=False)


@pytest.mark.parametrize("limit", [None, 20_000], ids=["one file", "shards"])
def test_a_new_folder_holds_what_is_not_read_too(klein, limit, tmp_path):
    """The text encoder's other layers, last norm and readout, and how many batches the VAE's statistics are of."""
    folder, pipe, file = klein
    base = esd_jax.load(file, config=folder)
    edit = {MATRIX: jnp.asarray(io.read_exact(base, [MATRIX])[MATRIX] + 1)}
    erased = base.with_edits(edit, {"concepts": [{"text": "cat"}], "base_sha256": "x"})
    out = io.export(erased, tmp_path / "out", max_shard_size=limit)
    assert (len([*(out / "text_encoder").glob("*.safetensors")]) > 1) == (limit is not None)
    assert "bn.num_batches_tracked" in weights(out / "vae") and "model.norm.weight" in weights(out / "text_encoder")
    for component in ("text_encoder", "vae", "transformer"):
        expected, written = weights(folder / component), weights(out / component)
        assert written.keys() == expected.keys()
        changed = {f"{component}/{name}" for name, value in expected.items() if not torch.equal(value, written[name])}
        assert changed == {*edit} & {f"{component}/{name}" for name in expected}
    opened = diffusers.Flux2KleinPipeline.from_pretrained(out)
    read, encoder = opened.text_encoder.state_dict(), pipe.text_encoder.state_dict()
    assert read.keys() == encoder.keys() and all(torch.equal(read[name], value) for name, value in encoder.items())
    assert opened.vae.bn.num_batches_tracked == pipe.vae.bn.num_batches_tracked


def weights(component):
    """All tensors of a component's folder."""
    return {
        name: value
        for path in component.glob("*.safetensors")
        for name, value in safetensors.torch.load_file(path).items()
    }


def test_the_depth_and_widths_follow_from_the_file(klein, tmp_path):
    folder, pipe, _ = klein
    other = {"num_layers": 1, "num_single_layers": 3, "mlp_ratio": 2.0}
    klein_factory.make_klein(tmp_path / "other", **other)
    file = export_single(io.load(tmp_path / "other"), tmp_path / "pruned.safetensors")
    read = esd_jax.load(file, base=folder)
    assert read.configs["transformer"] == Flux2Config.from_dict(dict(pipe.transformer.config) | other)


def test_another_familys_base_is_refused(klein, tmp_path):
    import flow_factories

    flow_factories.make_flux(tmp_path / "flux", dev=False)
    with pytest.raises(ValueError, match=one_line("is FLUX.2", "another family")):
        esd_jax.load(klein[2], base=tmp_path / "flux")
