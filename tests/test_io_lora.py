"""LoRA files, written and read, against diffusers and peft on tiny pipelines."""

import json

import diffusers
import factories
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from messages import one_line
from torch_oracle import to_nchw, to_nhwc

import esd_jax
from esd_jax import api, exports
from esd_jax.io import ldm
from esd_jax.io.diffusers import read_exact
from esd_jax.io.lora import export_lora, factors
from esd_jax.io.lora_merge import merge_lora
from esd_jax.selection import select

MAKE = {"sd1": factories.make_sd1, "sdxl": factories.make_sdxl}
PROMPTS = ["a photo of the cat", "dogs"]


@pytest.fixture(scope="module", params=MAKE)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    MAKE[request.param](folder)
    return folder, esd_jax.load(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    factories.make_sd1(folder)
    return esd_jax.load(folder)


def edited(base, subset, rank=None, size=0.05):
    """A checkpoint whose tensors of a subset are changed, each matrix by a product of some rank if one is given."""
    changed, shapes = {}, base.network("unet").shapes
    for i, name in enumerate(select(subset, base.network("unet").layouts)):
        noise = size * np.random.default_rng((5, i)).normal(size=shapes[name].shape)
        if rank and noise.ndim > 1:
            u, s, v = np.linalg.svd(noise.reshape(-1, noise.shape[-1]), full_matrices=False)
            noise = ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(noise.shape)
        first = np.asarray(read_exact(base, [f"unet/{name}"])[f"unet/{name}"])
        changed[f"unet/{name}"] = jnp.asarray(first + noise, jnp.float32)
    return base.with_edits(changed, {"concepts": [{"text": "cat"}], "base_sha256": "x"})


def noise(n):
    return np.random.default_rng(0).normal(size=(n, 8, 8, 4)).astype(np.float32)


@torch.no_grad()
def drawn_by_diffusers(folder, latents, file=None, fuse=False):
    kind = diffusers.StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else None
    pipe = (kind or diffusers.StableDiffusionPipeline).from_pretrained(folder)
    if file is not None:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    if fuse:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    final = pipe(PROMPTS, latents=to_nchw(latents), **options).images
    return to_nhwc(pipe.vae.decode(final / pipe.vae.config.scaling_factor).sample)


@pytest.mark.filterwarnings("ignore:.lora_bias=True")  # PEFT cannot fuse it where q, k and v have no bias
@pytest.mark.parametrize("subset", ["esd-x", "esd-u"])
def test_at_full_rank_diffusers_draws_what_the_erased_model_draws(family, subset, tmp_path):
    """Matrices, kernels and biases: what `load_lora_weights` makes of the file is the erased checkpoint."""
    folder, base = family
    erased, latents = edited(base, subset, size=0.02), noise(2)
    whole = esd_jax.export(erased, tmp_path / "whole")
    report = export_lora(erased, tmp_path / "lora.safetensors", rank=10**6, dtype="float32")
    assert report.residual < 1e-10 and report.left_out == ()
    expected = drawn_by_diffusers(whole, latents)
    found = drawn_by_diffusers(folder, latents, tmp_path / "lora.safetensors")
    assert np.abs(found - expected).max() <= 2e-3
    assert np.abs(drawn_by_diffusers(folder, latents) - expected).max() > 0.02


def test_the_image_nears_the_erased_one_as_the_residual_falls(base, tmp_path):
    erased, latents = edited(base, "esd-x-strict"), noise(2)
    folder = base.provenance.folder
    expected = drawn_by_diffusers(esd_jax.export(erased, tmp_path / "whole"), latents)
    residuals, errors = [], []
    for rank in (1, 2, 4, 8, 16, 32):
        report = export_lora(erased, tmp_path / f"{rank}.safetensors", rank=rank, dtype="float32")
        found = drawn_by_diffusers(folder, latents, tmp_path / f"{rank}.safetensors")
        residuals.append(report.residual)
        errors.append(float(np.abs(found - expected).mean()))
    assert all(after < before for before, after in zip(residuals, residuals[1:], strict=False)), residuals
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors
    assert residuals[-1] < 1e-10 and errors[-1] < 1e-4


MATRICES = r"regex:(to_[qkvo]|conv\d|conv_in|conv_out|conv_shortcut|samplers|proj|ff\.|embedding).*\.weight"


def test_kohyas_keys_open_in_diffusers_too(family, tmp_path):
    """Every kind of module, at ranks from 4 to 128, filled up to one: diffusers loses alphas of attention layers."""
    folder, base = family
    erased, latents = edited(base, MATRICES, size=0.02), noise(2)
    report = export_lora(erased, tmp_path / "kohya.safetensors", rank=10**6, style="kohya", dtype="float32")
    assert report.residual < 1e-10 and len({rank for rank, _ in report.ranks.values()}) > 3
    file = safetensors.numpy.load_file(tmp_path / "kohya.safetensors")
    assert {key.rpartition(".")[2] for key in file} == {"weight", "alpha"}
    # diffusers 0.32 takes the rank for alpha once ranks differ: here there is one, and alpha is it.
    (rank,) = {len(value) for key, value in file.items() if key.endswith("lora_down.weight")}
    assert rank == report.padded == max(own for own, _ in report.ranks.values())
    assert all(value.shape[1] == rank for key, value in file.items() if key.endswith("lora_up.weight"))
    assert {float(value) for key, value in file.items() if key.endswith(".alpha")} == {rank}
    two = len(base.text_encoders) == 2
    assert ("lora_unet_input_blocks_0_0.alpha" in file, "lora_unet_conv_in.alpha" in file) == (two, not two)
    expected = drawn_by_diffusers(esd_jax.export(erased, tmp_path / "whole"), latents)
    found = drawn_by_diffusers(folder, latents, tmp_path / "kohya.safetensors")
    assert np.abs(found - expected).max() <= 2e-3
    with safetensors.safe_open(tmp_path / "kohya.safetensors", "np") as opened:  # by which A1111 hides what cannot fit
        assert opened.metadata()["ss_base_model_version"] == ("sdxl_base_v1-0" if two else "sd_v1")


LAYERS = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{name}_proj" for name in "qkv"), "self_attn.out_proj")


def names_in_comfyui(base):
    """The modules that ComfyUI's loader knows, by the rule of its `model_lora_keys_unet` and `model_lora_keys_clip`."""
    known = set()
    for name, place in ldm.places({"unet": base.configs["unet"]}).items():
        module, inner = (text.rpartition(".")[0] for text in (name[5:], place.key.removeprefix(ldm.UNET)))
        flat = module.replace(".", "_")
        known |= {f"lora_unet_{inner.replace('.', '_')}", f"diffusion_model.{inner}", f"lora_unet_{flat}"}
        dotted = module.replace(".to_", ".processor.to_")  # as diffusers had attention's adapters until 2023
        dotted = dotted.removesuffix(".0") if dotted.endswith(".to_out.0") else dotted
        known |= {f"lycoris_{flat}", dotted, f"unet.{dotted}"}
    for encoder, kohya in zip(base.text_encoders, (("lora_te_", "lora_te1_"), ("lora_te2_",)), strict=False):
        for i in range(base.configs[encoder].num_hidden_layers):
            for layer in LAYERS:
                flat = f"text_model_encoder_layers_{i}_{layer.replace('.', '_')}"
                known |= {prefix + flat for prefix in kohya}
                known.add(f"{encoder}.text_model.encoder.layers.{i}.{layer}")
    return known


def test_which_modules_comfyui_knows(family, tmp_path):
    """Of kohya's file all. Of PEFT's all but the attention layers: of ESD-x none, which is what export says."""
    _, base = family
    layer = "encoder.layers.1.self_attn.out_proj.weight"
    names = [f"{encoder}/{layer}" for encoder in base.text_encoders]
    some = r"regex:(conv_in|mid_block.*(to_[qkvo]|conv1|ff\.|proj_in)|samplers).*\.weight"  # of every kind
    erased = edited(base, some).with_edits({name: value + 1 for name, value in read_exact(base, names).items()})
    known = names_in_comfyui(base)

    def modules(erased, style):
        file = export_lora(erased, tmp_path / "x.safetensors", rank=1, style=style, overwrite=True).path
        return {key.rpartition(".lora_")[0] for key in safetensors.numpy.load_file(file) if ".lora_" in key}

    assert modules(erased, "kohya") <= known
    peft = modules(erased, "diffusers")
    assert peft - known == {name for name in peft if name.startswith("unet.") and ".to_" in name} != set()
    assert not modules(edited(base, "esd-x"), "diffusers") & known and modules(edited(base, "esd-x"), "kohya") <= known
    assert "ComfyUI ignores its attention layers" in exports.FORMATS["lora"].what


def test_diffusers_is_told_the_scale_of_every_module(base, tmp_path, monkeypatch):
    """Versions before August 2026 guess it wrong where ranks differ, so it must not be guessed."""
    erased, latents, file = edited(base, "esd-x", size=0.02), noise(2), tmp_path / "x.safetensors"
    report = export_lora(erased, file, energy=0.9, dtype="float32", biases=False)
    assert len({rank for rank, _ in report.ranks.values()}) > 1
    monkeypatch.setattr(diffusers.utils.peft_utils, "get_peft_kwargs", None)
    found = drawn_by_diffusers(base.provenance.folder, latents, file)
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), tmp_path / "untold.safetensors")  # B A as it is
    whole = esd_jax.export(merge_lora(base, tmp_path / "untold.safetensors"), tmp_path / "whole")
    assert np.abs(found - drawn_by_diffusers(whole, latents)).max() <= 1e-4


@pytest.mark.filterwarnings("ignore:.lora_bias=True")
def test_without_biases_it_can_be_fused(base, tmp_path):
    """Keys and values have no bias for PEFT to add to, so with the output's it refuses, and says so."""
    erased, latents, folder = edited(base, "esd-x", size=0.02), noise(2), base.provenance.folder
    for biases in (True, False):
        export_lora(erased, tmp_path / f"{biases}.safetensors", rank=8, dtype="float32", biases=biases)
    fused = drawn_by_diffusers(folder, latents, tmp_path / "False.safetensors", fuse=True)
    np.testing.assert_allclose(fused, drawn_by_diffusers(folder, latents, tmp_path / "False.safetensors"), atol=1e-4)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        drawn_by_diffusers(folder, latents, tmp_path / "True.safetensors", fuse=True)


def test_sd2_is_named_as_a1111_knows_it(tmp_path):
    factories.make_sd2(tmp_path / "sd2")
    base = esd_jax.load(tmp_path / "sd2")
    export_lora(edited(base, "regex:conv_in"), tmp_path / "x.safetensors", rank=1, style="kohya")
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert (file.metadata()["ss_v2"], file.metadata()["ss_base_model_version"]) == ("True", "sd_v2_v")


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_text_encoders_are_carried_too(family, style, tmp_path):
    folder, base = family
    layer = "encoder.layers.1."
    names = [layer + "self_attn.q_proj.weight", layer + "mlp.fc1.weight", layer + "self_attn.out_proj.weight"]
    names += [layer + "self_attn.q_proj.bias"] * (style == "diffusers")
    names = [f"{encoder}/{name}" for encoder in base.text_encoders for name in names]
    first = read_exact(base, names)
    edits = {
        name: value + np.float32(0.2) * np.random.default_rng(i).normal(size=value.shape).astype(np.float32)
        for i, (name, value) in enumerate(first.items())
    }
    erased, latents, file = edited(base, "esd-x-strict").with_edits(edits), noise(2), tmp_path / "lora.safetensors"
    report = export_lora(erased, file, rank=10**6, style=style, dtype="float32")
    assert report.residual < 1e-10 and not report.left_out
    expected = drawn_by_diffusers(esd_jax.export(erased, tmp_path / "whole"), latents)
    assert np.abs(drawn_by_diffusers(folder, latents, file) - expected).max() <= 2e-3
    unet_alone = export_lora(edited(base, "esd-x-strict"), tmp_path / "unet.safetensors", rank=64, dtype="float32")
    assert np.abs(drawn_by_diffusers(folder, latents, unet_alone.path) - expected).max() > 0.02
    again = merge_lora(base, file)
    assert again.edits.keys() == erased.edits.keys()
    for name in names:
        np.testing.assert_allclose(again.edits[name], erased.edits[name], atol=2e-6)


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc2"])
def test_a_single_layer_of_a_text_encoder_is_carried(base, layer, tmp_path):
    """diffusers tells kohya's keys of attention layers by an output projection: without one it left the others out."""
    name = f"text_encoder/encoder.layers.1.{layer}.weight"
    value = read_exact(base, [name])[name]
    change = 0.2 * np.random.default_rng(0).normal(size=value.shape).astype(np.float32)
    erased, file = base.with_edits({name: value + change}), tmp_path / "kohya.safetensors"
    export_lora(erased, file, rank=10**6, style="kohya", dtype="float32")
    folder, latents = base.provenance.folder, noise(2)
    expected = drawn_by_diffusers(esd_jax.export(erased, tmp_path / "whole"), latents)
    assert np.abs(drawn_by_diffusers(folder, latents, file) - expected).max() <= 2e-3
    assert np.abs(drawn_by_diffusers(folder, latents) - expected).max() > 0.02
    assert merge_lora(base, file).edits.keys() == {name}


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_what_was_written_is_read_again(family, style, tmp_path):
    _, base = family
    erased = edited(base, "esd-u")
    report = export_lora(erased, tmp_path / "a.safetensors", rank=10**6, style=style, dtype="float32")
    again = merge_lora(base, tmp_path / "a.safetensors")
    carried = erased.edits.keys() - set(report.left_out)
    assert again.edits.keys() == carried and (style == "diffusers") == (not report.left_out)
    for name in carried:
        np.testing.assert_allclose(np.asarray(again.edits[name]), np.asarray(erased.edits[name]), atol=2e-6)
    half = merge_lora(base, tmp_path / "a.safetensors", strength=0.5)
    for name in sorted(carried)[:20]:
        middle = (np.asarray(read_exact(base, [name])[name]) + np.asarray(erased.edits[name])) / 2
        np.testing.assert_allclose(half.edits[name], middle, atol=2e-6)
    assert api.opened(base, tmp_path / "a.safetensors").edits.keys() == carried


def test_names_that_other_trainers_give_a_module(base, tmp_path):
    """One change of one matrix in every spelling, with alpha, and in a text encoder."""
    rng = np.random.default_rng(0)
    down, up = rng.normal(size=(2, 32)).astype(np.float32), rng.normal(size=(32, 2)).astype(np.float32)
    unet, module = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", "attn2.to_out.0"
    place = ldm.places({"unet": base.configs["unet"]})[unet + ".weight"].key
    bare = unet.removeprefix("unet/")
    spellings = {
        f"unet.{bare}.lora_A.weight": f"unet.{bare}.lora_B.weight",
        f"base_model.model.{bare}.lora_A.default.weight": f"base_model.model.{bare}.lora_B.default.weight",
        f"unet.{bare}.lora.down.weight": f"unet.{bare}.lora.up.weight",
        f"unet.{bare.replace(module, 'attn2.processor.to_out')}_lora.down.weight": (
            f"unet.{bare.replace(module, 'attn2.processor.to_out')}_lora.up.weight"
        ),
        f"lora_unet_{bare.replace('.', '_')}.lora_down.weight": f"lora_unet_{bare.replace('.', '_')}.lora_up.weight",
    }
    old = {key.removeprefix("unet."): other.removeprefix("unet.") for key, other in spellings.items() if ".proc" in key}
    ldm_name = "lora_unet_" + place.removeprefix(ldm.UNET).removesuffix(".weight").replace(".", "_")
    spellings |= {**old, f"{ldm_name}.lora_down.weight": f"{ldm_name}.lora_up.weight"}
    first = read_exact(base, [f"{unet}.weight"])[f"{unet}.weight"]
    for one, other in spellings.items():
        safetensors.numpy.save_file({one: down, other: up}, tmp_path / "x.safetensors")
        found = merge_lora(base, tmp_path / "x.safetensors", 0.5)
        assert found.edits.keys() == {f"{unet}.weight"}, one
        assert api.opened(base, tmp_path / "x.safetensors").edits.keys() == found.edits.keys(), one
        np.testing.assert_allclose(found.edits[f"{unet}.weight"], first + 0.5 * (up @ down).T, atol=1e-5)
    name = "text_encoder/encoder.layers.0.self_attn.q_proj.weight"
    first = read_exact(base, [name])[name]
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    dotted = "text_encoder.text_model.encoder.layers.0.self_attn"
    for one, other in {
        f"lora_te_{layer}.lora_down.weight": f"lora_te_{layer}.lora_up.weight",
        f"lora_te1_{layer}.lora_down.weight": f"lora_te1_{layer}.lora_up.weight",
        f"{dotted}.q_proj.lora_A.weight": f"{dotted}.q_proj.lora_B.weight",
        f"{dotted}.q_proj.lora_linear_layer.down.weight": f"{dotted}.q_proj.lora_linear_layer.up.weight",
        f"{dotted}.to_q_lora.down.weight": f"{dotted}.to_q_lora.up.weight",
    }.items():
        safetensors.numpy.save_file({one: down, other: up}, tmp_path / "x.safetensors")
        found = merge_lora(base, tmp_path / "x.safetensors")
        assert found.edits.keys() == {name}, one
        np.testing.assert_allclose(found.edits[name], first + (up @ down).T, atol=1e-5)


def test_the_scale_is_what_the_file_says(base, tmp_path):
    """kohya's alpha; and the `LoraConfig` in diffusers' metadata, or beside PEFT's own file, with its exceptions."""
    rng = np.random.default_rng(0)
    down, up, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 32), (32, 4), (32,)))
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    first = read_exact(base, names := [f"unet/{module}.weight", f"unet/{module}.bias"])

    def check(file, scale, scale_of_bias):
        found = merge_lora(base, file, 0.5)
        expected = [first[names[0]] + 0.5 * scale * (up @ down).T, first[names[1]] + 0.5 * scale_of_bias * bias]
        for name, value in zip(names, expected, strict=True):
            np.testing.assert_allclose(found.edits[name], value, atol=1e-5)

    flat = "lora_unet_" + module.replace(".", "_")
    kohya = {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32([2])[0], "diff_b": bias}
    kohya = {f"{flat}.{key}": np.asarray(value) for key, value in kohya.items()}
    safetensors.numpy.save_file(kohya, tmp_path / "kohya.safetensors")
    check(tmp_path / "kohya.safetensors", 2 / 4, 1)
    safetensors.numpy.save_file({**kohya, f"{flat}.alpha": np.asarray(8)}, tmp_path / "kohya.safetensors")
    check(tmp_path / "kohya.safetensors", 8 / 4, 1)

    parts = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias}
    (tmp_path / "peft").mkdir()
    beside = tmp_path / "peft" / "adapter_model.safetensors"
    safetensors.numpy.save_file({f"base_model.model.{module}.{key}": value for key, value in parts.items()}, beside)
    check(beside, 1, 1)
    for config, scale in [
        ({"r": 4, "lora_alpha": 8}, 2),
        ({"lora_alpha": 8, "use_rslora": True}, 4),
        ({"lora_alpha": 8, "alpha_pattern": {"attn2.to_out.0": 1, "attn2.to_q": 3}}, 1 / 4),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 3, r"attn1\..*": 5}}, 2),
    ]:
        (beside.parent / "adapter_config.json").write_text(json.dumps(config))
        check(beside, scale, scale)
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
        file = {f"unet.{module}.{key}": value for key, value in parts.items()}
        safetensors.numpy.save_file(file, tmp_path / "x.safetensors", metadata)
        check(tmp_path / "x.safetensors", scale, scale)
    for text in ("no JSON", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(": 1}}'):
        safetensors.numpy.save_file(file, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=one_line("x.safetensors", "no ")):
            merge_lora(base, tmp_path / "x.safetensors")


def test_a_training_of_low_rank_is_exported_as_it_is(base, tmp_path):
    """What is left is float32's rounding of the trained tensors, which grows beside a smaller change."""
    fields = {"concept": "cat style", "sampling_steps": 4, "timestep_mode": "grid", "learning_rate": 1e-2}
    erased = esd_jax.erase(base.provenance.folder, rank=2, steps=3, **fields)
    for style, options in [("diffusers", {"rank": 2}), ("kohya", {"rank": 2}), ("diffusers", {"energy": 1 - 1e-6})]:
        file = tmp_path / "x.safetensors"
        report = export_lora(erased, file, style=style, dtype="float32", overwrite=True, **options)
        assert {rank for rank, _ in report.ranks.values()} == {2} and report.residual < 1e-11


def test_rank_and_energy(base, tmp_path):
    erased = edited(base, "esd-x-strict", rank=3)
    exact = export_lora(erased, tmp_path / "a.safetensors", energy=1 - 1e-9, dtype="float32")
    assert {rank for rank, _ in exact.ranks.values()} == {3} and exact.residual < 1e-9
    half = export_lora(erased, tmp_path / "b.safetensors", energy=0.5)
    assert {rank for rank, _ in half.ranks.values()} <= {1, 2} and 0 < half.residual <= 0.5
    assert min(half.kept.values()) >= 0.5 - 1e-6
    with safetensors.safe_open(tmp_path / "b.safetensors", "np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["esd_jax.lora"])["residual"] == pytest.approx(half.residual)
    assert json.loads(metadata["esd_jax"])[0]["concepts"] == [{"text": "cat"}]
    assert f"{1 - half.residual:.4%} of the change" in str(half)


def test_what_cannot_be_carried_is_counted(base, tmp_path):
    """Norms in both styles; biases in kohya's, or where they are not wanted."""
    erased = edited(base, "regex:norm|attn2.to_out")
    change = {
        name: np.square(np.asarray(value - read_exact(base, [name])[name])).sum()
        for name, value in erased.edits.items()
    }
    for options in ({"style": "kohya"}, {"biases": False}, {}):
        report = export_lora(erased, tmp_path / "a.safetensors", rank=64, dtype="float32", overwrite=True, **options)
        wanted = {n for n in change if "norm" in n or (options and n.endswith(".bias"))}
        assert set(report.left_out) == wanted
        lost = sum(change[name] for name in wanted) / sum(change.values())
        assert report.residual == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9)])
def test_factors_are_the_nearest_of_their_rank(shape):
    change = np.random.default_rng(1).normal(size=shape)
    u, s, v = np.linalg.svd(change, full_matrices=False)
    for rank in (1, 3, 6):
        down, up = factors(change, rank)
        np.testing.assert_allclose(up @ down, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-10)
    down, up = factors(np.zeros(shape))
    assert down.shape == (1, shape[1]) and up.shape == (shape[0], 1) and not (up @ down).any()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"unet.nowhere.lora_A.weight": (2, 32), "unet.nowhere.lora_B.weight": (32, 2)}, ["no module", "nowhere"]),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, ["conv_in", "lacks its other factor"]),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (31, 2, 1, 1)}, ["does not fit"]),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (32, 3, 1, 1)}, ["does not fit"]),
        ({"unet.conv_in.oft_blocks": (2, 2, 2)}, ["OFT", "not implemented"]),
        ({"lora_unet_conv_in.on_input": (1,)}, ["IA3", "not implemented"]),
        ({"conv_in.weight": (32, 4, 3, 3)}, ["no key of a LoRA"]),
        ({"down_blocks.0.x.weight": (2,)}, ["no key of a LoRA", "UNet tensors alone"]),
        ({"emb_params": (2, 32)}, ["no key of a LoRA", "textual inversion", "add_embedding"]),
        ({}, ["holds no LoRA"]),
    ],
)  # fmt: skip
def test_files_that_are_refused(base, content, words, tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({key: np.ones(shape, np.float32) for key, shape in content.items()}, file)
    with pytest.raises(ValueError, match=one_line(file, *words)):
        merge_lora(base, file)
    if "not implemented" in words:
        with pytest.raises(ValueError, match=one_line(file, *words)):
            api.opened(base, file)


def test_numbers_that_are_none_are_refused(base, tmp_path):
    file = {"unet.conv_in.lora_A.weight": np.ones((1, 4, 3, 3), np.float32)}
    file["unet.conv_in.lora_B.weight"] = np.full((32, 1, 1, 1), np.nan, np.float32)
    safetensors.numpy.save_file(file, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=one_line("x.safetensors", "conv_in.lora_B", "NaN")):
        merge_lora(base, tmp_path / "x.safetensors")


def test_what_cannot_be_written(base, tmp_path):
    erased = edited(base, "esd-x-strict")
    (tmp_path / "there.safetensors").touch()
    for path, options, words in [
        ("x.bin", {}, [".safetensors"]),
        ("there.safetensors", {}, ["exists", "overwrite=True"]),
        ("x.safetensors", {"rank": 0}, ["rank=0"]),
        ("x.safetensors", {"rank": 1, "energy": 0.5}, ["one of them"]),
        ("x.safetensors", {"energy": 1.5}, ["energy=1.5"]),
        ("x.safetensors", {"style": "peft"}, ["style='peft'", "kohya"]),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            export_lora(erased, tmp_path / path, **options)
    with pytest.raises(ValueError, match=one_line("no tensor is edited")):
        export_lora(base, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
