"""LoRA files of FLUX.1 and SD3, written and read, against diffusers and peft on tiny pipelines."""

import json

import flow_files
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flow_files import MAKE
from messages import one_line
from torch_oracle import error

import esd_jax
from esd_jax import exports
from esd_jax.io.diffusers import read_exact
from esd_jax.io.lora import export_lora
from esd_jax.io.lora_merge import merge_lora
from esd_jax.selection import select

PROMPTS, SIZE = ["a photo of a cat", "two cats"], (16, 24)
SPLIT = "transformer/single_transformer_blocks.1"


@pytest.fixture(scope="module", params=["dev", "sd3"])
def kind(request, tmp_path_factory):
    """(kind, torch pipeline, our pipeline)"""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    pipe = MAKE[request.param](folder)
    return request.param, pipe, esd_jax.load(folder)


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dev") / "model"
    return MAKE["dev"](folder), esd_jax.load(folder)


def edited(base, subset, size=0.05):
    """A checkpoint whose tensors of a subset are changed."""
    net = base.network("transformer")
    names = [f"transformer/{name}" for name in select(subset, net.layouts, base.family.subsets)]
    exact = read_exact(base, names)
    draws = {name: size * np.random.default_rng((5, i)).normal(size=exact[name].shape) for i, name in enumerate(names)}
    changed = {name: jnp.asarray(exact[name] + draws[name], jnp.float32) for name in names}
    return base.with_edits(changed, {"concepts": [{"text": "cat"}], "base_sha256": "x"})


@torch.no_grad()
def latents(pipe, transformer=None):
    before = pipe.transformer
    pipe.transformer = transformer or before
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 12}
    try:
        return pipe(PROMPTS, height=SIZE[0], width=SIZE[1], generator=generator, **options).images.numpy()
    finally:
        pipe.transformer = before


def with_lora(pipe, file):
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    try:
        return latents(pipe)
    finally:
        pipe.unload_lora_weights()


def of_folder(pipe, erased, path):
    folder = esd_jax.export(erased, path)
    return latents(pipe, type(pipe.transformer).from_pretrained(folder, subfolder="transformer"))


# Written.


@pytest.mark.parametrize("subset", ["flow-text", r"regex:(embed|blocks\.1\.(ff|proj|norm|attn)).*\.weight"])
def test_at_full_rank_diffusers_draws_what_the_erased_model_draws(kind, subset, tmp_path):
    """Attention with its biases; and linear layers of every other kind."""
    _, pipe, base = kind
    subset = (
        subset
        if "regex" not in subset
        else r"regex:^(?!pos_embed)(?!.*norm_(q|k|added)).*\.(linear_2|proj|to_[kv]|linear|2)\.weight"
    )
    erased = edited(base, subset)
    report = export_lora(erased, tmp_path / "lora.safetensors", rank=10**6, dtype="float32")
    assert report.residual < 1e-10 and report.left_out == ()
    keys = safetensors.numpy.load_file(tmp_path / "lora.safetensors")
    assert all(key.startswith("transformer.") for key in keys)
    before, expected = latents(pipe), of_folder(pipe, erased, tmp_path / "whole")
    assert error(with_lora(pipe, tmp_path / "lora.safetensors"), expected) <= 1e-4
    assert error(before, expected) > 1e-2
    again = merge_lora(base, tmp_path / "lora.safetensors")
    for name, value in erased.edits.items():
        np.testing.assert_allclose(again.edits[name], value, atol=1e-5, err_msg=name)


def test_kohyas_keys_open_in_diffusers_too(dev, tmp_path, monkeypatch):
    """Of parts of fused modules, of wholes and of the swapped norm at the end, at ranks from 8 to 128."""
    pipe, base = dev
    flow_files.diffusers_reads_tiny_flux(monkeypatch)
    subset = r"regex:(add_[kv]|to_add_out|1\.attn\.to_q|proj_mlp|0\.proj_out|ff\.net\.2|1\.norm\.linear).*weight"
    erased = edited(base, subset)
    file = tmp_path / "kohya.safetensors"
    report = export_lora(erased, file, rank=10**6, style="kohya", dtype="float32")
    assert report.residual < 1e-10 and report.left_out == ()
    tensors = safetensors.numpy.load_file(file)
    modules = {key.partition(".")[0] for key in tensors}
    assert {"lora_unet_double_blocks_0_txt_attn_qkv", "lora_unet_single_blocks_1_linear1"} <= modules
    assert all(module.startswith(("lora_unet_double_blocks_", "lora_unet_single_blocks_")) for module in modules)
    for module in modules:  # alpha is the rank, however it is guessed
        assert tensors[f"{module}.alpha"] == len(tensors[f"{module}.lora_down.weight"])
        assert tensors[f"{module}.lora_up.weight"].shape[1] == len(tensors[f"{module}.lora_down.weight"])
    expected = of_folder(pipe, erased, tmp_path / "whole")
    assert error(with_lora(pipe, file), expected) <= 1e-4
    assert error(latents(pipe), expected) > 1e-2
    again = merge_lora(base, file)
    assert again.edits.keys() == erased.edits.keys()
    for name, value in erased.edits.items():
        np.testing.assert_allclose(again.edits[name], value, atol=1e-5, err_msg=name)


def test_the_norm_at_the_end_is_swapped_in_kohyas_file(dev, tmp_path):
    _, base = dev
    erased = edited(base, r"regex:norm_out\.linear\.weight")
    export_lora(erased, tmp_path / "x.safetensors", rank=10**6, style="kohya", dtype="float32")
    file = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    name = "lora_unet_final_layer_adaLN_modulation_1"
    change = file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"]
    (edit,) = erased.edits
    expected = np.asarray(erased.edits[edit] - read_exact(base, [edit])[edit]).T
    np.testing.assert_allclose(change, np.concatenate([expected[32:], expected[:32]]), atol=1e-6)
    np.testing.assert_allclose(merge_lora(base, tmp_path / "x.safetensors").edits[edit], erased.edits[edit], atol=1e-6)


def test_all_formats_verify(kind, tmp_path):
    name, _, base = kind
    erased = edited(base, r"regex:\.attn\.add_[kv]_proj\.weight")  # no biases, which kohya's file does not carry
    possible = exports.possible(erased)
    assert ("kohya" in possible) == (name == "dev") and {"single", "lora", "delta", "folder"} <= set(possible)
    formats = [kind for kind in possible if kind in ("single", "lora", "kohya", "delta")]
    verify = name == "sd3"  # whose default size is small
    for written in exports.export_all(erased, tmp_path, formats, verify=verify, dtype="float32", rank=32):
        if verify:
            assert written.carried > 0.99 if written.format in ("lora", "kohya") else written.carried == 1
        whole = written.format == "single" and name == "sd3"
        opened = esd_jax.load(written.path, **({"config": base.provenance.folder} if whole else {"base": base}))
        for edit, value in read_exact(opened, erased.edits).items():
            np.testing.assert_allclose(value, erased.edits[edit], atol=1e-5)


# Read.


def test_what_peft_trains_is_merged(kind, tmp_path):
    """A file as diffusers' own training scripts write it, with alpha, of two ranks."""
    _, pipe, base = kind
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["attn.add_k_proj", "attn.to_out.0", "ff.net.2"],
        rank_pattern={"ff.net.2": 2}, init_lora_weights=False,
    )  # fmt: skip
    transformer = type(pipe.transformer).from_pretrained(base.provenance.folder, subfolder="transformer")
    before = {key: value.clone() for key, value in transformer.state_dict().items()}
    torch.manual_seed(0)
    transformer.add_adapter(config)
    layers = peft.utils.get_peft_model_state_dict(transformer)
    metadata = {"transformer": transformer.peft_config["default"].to_dict()}
    metadata["transformer"] |= {"peft_type": "LORA", "target_modules": sorted(config.target_modules)}
    type(pipe).save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata["transformer"]
    )
    transformer.fuse_lora()
    merged = merge_lora(base, tmp_path / "pytorch_lora_weights.safetensors")
    changed = 0
    for key, value in transformer.state_dict().items():
        name = key.replace(".base_layer", "")
        if "lora_" in key or name.endswith("bias") or torch.equal(value, before[name]):
            continue
        changed += 1
        np.testing.assert_allclose(merged.edits[f"transformer/{name}"].T, value.numpy(), atol=1e-5, err_msg=name)
    assert changed == len(merged.edits) > 4


@pytest.mark.parametrize("named", ["lora_unet_{}", "diffusion_model.{}"])
def test_a_lora_of_a_fused_module_changes_each_of_its_parts(dev, named, tmp_path):
    """As kohya trains it: one pair of factors for all, whose alpha is not its rank."""
    _, base = dev
    draws = np.random.default_rng(3)
    module = "single_blocks.1.linear1"
    written = named.format(module.replace(".", "_") if "unet" in named else module)
    down, up = (draws.normal(size=shape).astype(np.float32) for shape in ((4, 32), (7 * 32, 4)))
    names = ("lora_down", "lora_up") if "unet" in named else ("lora_A", "lora_B")
    file = {f"{written}.{names[0]}.weight": down, f"{written}.{names[1]}.weight": up}
    safetensors.numpy.save_file(file | {f"{written}.alpha": np.asarray(2, np.float32)}, tmp_path / "x.safetensors")
    merged = merge_lora(base, tmp_path / "x.safetensors", strength=0.5)
    change, start = 0.5 * (2 / 4) * up.astype(np.float64) @ down, 0
    for part, rows in (("attn.to_q", 32), ("attn.to_k", 32), ("attn.to_v", 32), ("proj_mlp", 128)):
        name = f"{SPLIT}.{part}.weight"
        expected = np.asarray(read_exact(base, [name])[name], np.float64) + change[start : start + rows].T
        np.testing.assert_allclose(merged.edits[name], expected, atol=1e-5)
        start += rows
    assert len(merged.edits) == 4


def test_kohyas_lora_of_sd3_is_read(tmp_path):
    """ComfyUI reads it, diffusers does not."""
    MAKE["sd3"](tmp_path / "model")
    base = esd_jax.load(tmp_path / "model")
    draws, written = np.random.default_rng(3), "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1"
    down, up = (draws.normal(size=shape).astype(np.float32) for shape in ((2, 32), (64, 2)))
    file = {f"{written}.lora_down.weight": down, f"{written}.lora_up.weight": up}
    safetensors.numpy.save_file(file, tmp_path / "x.safetensors")
    (name, value), = merge_lora(base, tmp_path / "x.safetensors").edits.items()  # fmt: skip
    assert name == "transformer/transformer_blocks.2.norm1_context.linear.weight"
    change = up @ down
    expected = np.asarray(read_exact(base, [name])[name]) + np.concatenate([change[32:], change[:32]]).T
    np.testing.assert_allclose(value, expected, atol=1e-5)
    with pytest.raises(ValueError, match=one_line("style='kohya'", "Stable Diffusion 3")):
        export_lora(edited(base, "flow-kv-text"), tmp_path / "no.safetensors", style="kohya")


@pytest.mark.parametrize(
    "key, words",
    [
        ("double_blocks.0.processor.qkv_lora1.down.weight", ["XLabs", "not implemented"]),
        ("double_blocks.0.img_attn.norm.query_norm.scale", ["control LoRA", "not implemented"]),
        ("lora_unet_double_blocks_7_img_attn_qkv.lora_down.weight", ["no module", "another model"]),
    ],
)
def test_other_loras_are_refused_by_name(dev, key, words, tmp_path):
    beside = "double_blocks.0.img_attn.qkv.lora_A.weight"
    keys = (key, beside) if "query_norm" in key else (key,)
    safetensors.numpy.save_file(dict.fromkeys(keys, np.ones((2, 2), np.float32)), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=one_line("x.safetensors", *words)):
        merge_lora(dev[1], tmp_path / "x.safetensors")


def test_the_metadata_name_the_model(kind, tmp_path):
    name, _, base = kind
    file = export_lora(edited(base, "flow-kv-text"), tmp_path / "x.safetensors", rank=2).path
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata()["ss_base_model_version"] == {"dev": "flux1", "sd3": "sd3"}[name]
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 2
