"""ESD deltas: others load them with `load_state_dict(strict=False)`, which is silent where this must refuse."""

import copy

import factories
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from messages import one_line
from paths import DATA

from esd_jax import api, demo
from esd_jax.io import diffusers as io
from esd_jax.io.delta import delta_name, export_delta, load_delta

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
NAMES = [f"{BLOCK}.{tensor}" for tensor in ("attn2.to_k.weight", "attn2.to_out.0.bias", "ff.net.0.proj.weight")]
NAMES += ["conv_in.weight"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    torch_pipe = factories.make_sd1(folder)
    return io.load(folder), torch_pipe


@pytest.fixture(scope="module")
def erased(base):
    exact = io.read_exact(base[0], [f"unet/{name}" for name in NAMES])
    rng = np.random.default_rng(0)
    edits = {name: array + rng.normal(size=array.shape).astype(np.float32) for name, array in exact.items()}
    return base[0].with_edits(edits, {"concepts": ["golden retriever"]})


def test_file_names():
    name = delta_name("golden retriever", None, "esd-u")
    assert name == "esd-golden_retriever-from-golden_retriever-esdu.safetensors"
    assert delta_name("glasses", "a person", "esd-x-strict") == "esd-glasses-from-a_person-esdxstrict.safetensors"
    assert delta_name("cat", None, r"regex:attn2\.to_[kv]|up_blocks/x") == "esd-cat-from-cat-custom.safetensors"
    name = delta_name("St. Peter's/../x\\y", "v1.5", "full")
    assert name.count(".") == 1 and "/" not in name and "\\" not in name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_diffusers_loads_it(base, erased, dtype, tmp_path):
    path = export_delta(erased, tmp_path / "new" / delta_name("golden retriever", None, "esd-u"), dtype=dtype)
    delta = safetensors.torch.load_file(path)
    assert delta.keys() == set(NAMES) and {value.dtype for value in delta.values()} == {getattr(torch, dtype)}
    unet = copy.deepcopy(base[1].unet)
    result = unet.load_state_dict(delta, strict=False)
    assert result.unexpected_keys == [] and len(result.missing_keys) == len(unet.state_dict()) - len(NAMES)

    loaded = load_delta(base[0], path)
    layout = {"conv_in.weight": (2, 3, 1, 0)}
    for name in NAMES:
        theirs = unet.state_dict()[name]
        theirs = theirs.permute(layout.get(name, tuple(reversed(range(theirs.ndim))))).numpy()
        np.testing.assert_array_equal(loaded.edits[f"unet/{name}"], theirs)
        np.testing.assert_array_equal(loaded.params["unet"][name], theirs)
        tolerance = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
        np.testing.assert_allclose(theirs, erased.edits[f"unet/{name}"], rtol=tolerance, atol=1e-7 * bool(tolerance))
    (erasure,) = loaded.provenance.erased
    assert erasure.to_dict() == {"delta": path.name, "erased": [{"concepts": ["golden retriever"]}]}


def test_loads_what_others_write(base, tmp_path):
    """bfloat16, no metadata, saved by torch."""
    values = {name: torch.randn_like(base[1].unet.state_dict()[name]).bfloat16() for name in NAMES}
    safetensors.torch.save_file(values, tmp_path / "x.safetensors")
    loaded = load_delta(base[0], tmp_path / "x.safetensors")
    np.testing.assert_array_equal(loaded.params["unet"][NAMES[0]], values[NAMES[0]].float().numpy().T)
    assert loaded.edits.keys() == {f"unet/{name}" for name in NAMES}


@pytest.mark.parametrize("prefix", ["", "unet.", "module.", "_orig_mod.", "unet._orig_mod.", "module.unet."])
def test_a_prefix_that_all_names_share_is_taken_off(base, erased, prefix, tmp_path):
    delta = safetensors.torch.load_file(export_delta(erased, tmp_path / "x.safetensors"))
    file = tmp_path / "named.SAFETENSORS"  # a suffix in capitals is the same one
    safetensors.torch.save_file({prefix + name: value for name, value in delta.items()}, file)
    for read in (load_delta, api.opened):
        loaded = read(base[0], file)
        assert loaded.edits.keys() == {f"unet/{name}" for name in NAMES}
        np.testing.assert_array_equal(loaded.edits[f"unet/{NAMES[0]}"], delta[NAMES[0]].float().numpy().T)


def test_a_delta_of_the_authors_newer_class():
    """Whose modules are those of a pipeline, "unet....": the sample has two of its tensors."""
    file = DATA / "delta_unet_prefix.safetensors"
    loaded = api.opened(io.load(demo.MODEL), file)
    for key, value in safetensors.torch.load_file(file).items():
        np.testing.assert_array_equal(loaded.edits[key.replace("unet.", "unet/")], value.float().numpy().T)
    assert len(loaded.edits) == 2


def test_deltas_that_do_not_fit(base, tmp_path):
    path = tmp_path / "x.safetensors"
    for tensors, words in [
        ({"unet.conv_in.wieght": torch.zeros(3)}, ["does not have", "'unet.conv_in.wieght'"]),
        ({"unet." + NAMES[0]: torch.zeros(32, 32), NAMES[1]: torch.zeros(32)}, ["does not have", "'unet." + NAMES[0]]),
        ({"emb_params": torch.zeros(2, 32)}, ["does not have", "textual inversion", "add_embedding"]),
        ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3)}, ["does not have", "FLUX"]),
        ({NAMES[0]: torch.zeros(32, 32), "conv_in.wieght": torch.zeros(3)}, ["does not have", "'conv_in.wieght'"]),
        ({NAMES[0]: torch.zeros(32, 768)}, [NAMES[0], "(32, 768)", "(32, 32)"]),
        ({}, ["holds no tensors"]),
    ]:
        safetensors.torch.save_file(tensors, path)
        with pytest.raises(ValueError, match=one_line(path, *words)):
            load_delta(base[0], path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=one_line("x.gguf", "no safetensors file")):
        load_delta(base[0], tmp_path / "x.gguf")
    with pytest.raises(ValueError, match=one_line("x.pt", "pickle", "save_file(torch.load(OLD, weights_only=True)")):
        load_delta(base[0], "x.pt")
    with pytest.raises(FileNotFoundError, match=one_line("nowhere.safetensors")):
        load_delta(base[0], tmp_path / "nowhere.safetensors")


def test_what_is_not_exported(base, erased, tmp_path):
    path = tmp_path / "x.safetensors"
    text = {"text_encoder/final_layer_norm.bias": jnp.zeros(32)}
    for pipeline, options, words in [
        (base[0], {}, ["no unet tensor is edited"]),
        (erased.with_edits(text), {}, ["text_encoder/final_layer_norm.bias", "whole folder"]),
        (erased, {"dtype": "int8"}, ["int8", "bfloat16"]),
        (erased.with_edits({f"unet/{NAMES[0]}": jnp.full((32, 32), jnp.inf)}), {}, ["unet/" + NAMES[0], "infinity"]),
        (erased.with_edits({"unet/conv_in.bias": jnp.full(32, 7e4)}), {"dtype": "float16"}, ["unet/conv_in.bias"]),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            export_delta(pipeline, path, **options)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=one_line("x.bin", ".safetensors file")):
        export_delta(erased, tmp_path / "x.bin")
    path.write_text("the old one")
    with pytest.raises(ValueError, match=one_line(path, "overwrite=True")):
        export_delta(erased, path)
    assert path.read_text() == "the old one"
    assert export_delta(erased, path, overwrite=True) == path
    assert len(safetensors.torch.load_file(path)) == len(NAMES)
