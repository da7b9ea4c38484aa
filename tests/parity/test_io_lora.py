"""LoRA files as they are written, against diffusers and peft on tiny pipelines."""

import json

import diffusers
import factories
import numpy as np
import pytest
import safetensors.numpy
import torch
from lora_files import MAKE, edited, noise
from messages import one_line
from torch_oracle import to_nchw, to_nhwc

import esd_jax
from esd_jax import exports
from esd_jax.io import ldm
from esd_jax.io.diffusers import read_exact
from esd_jax.io.lora import export_lora, factors
from esd_jax.io.lora_merge import merge_lora

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
    actual = drawn_by_diffusers(folder, latents, tmp_path / "lora.safetensors")
    assert np.abs(actual - expected).max() <= 2e-3
    assert np.abs(drawn_by_diffusers(folder, latents) - expected).max() > 0.02


def test_the_image_nears_the_erased_one_as_the_residual_falls(base, tmp_path):
    erased, latents = edited(base, "esd-x-strict"), noise(2)
    folder = base.provenance.folder
    expected = drawn_by_diffusers(esd_jax.export(erased, tmp_path / "whole"), latents)
    residuals, errors = [], []
    for rank in (1, 2, 4, 8, 16, 32):
        report = export_lora(erased, tmp_path / f"{rank}.safetensors", rank=rank, dtype="float32")
        actual = drawn_by_diffusers(folder, latents, tmp_path / f"{rank}.safetensors")
        residuals.append(report.residual)
        errors.append(float(np.abs(actual - expected).mean()))
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
    actual = drawn_by_diffusers(folder, latents, tmp_path / "kohya.safetensors")
    assert np.abs(actual - expected).max() <= 2e-3
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
    actual = drawn_by_diffusers(base.provenance.folder, latents, file)
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), tmp_path / "untold.safetensors")  # B A as it is
    whole = esd_jax.export(merge_lora(base, tmp_path / "untold.safetensors"), tmp_path / "whole")
    assert np.abs(actual - drawn_by_diffusers(whole, latents)).max() <= 1e-4


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
