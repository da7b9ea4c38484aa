"""What is exported, opened by the programs that people have: other versions of diffusers and transformers, LyCORIS,
open_clip, stable-diffusion.cpp. Figures of these tests are in docs/formats.md, under "Opened in"."""

import re

import factories
import full_size
import jax.numpy as jnp
import ldm_oracle
import numpy as np
import other_programs
import pytest
import safetensors.torch
import torch
from adapter_files import CONV, CONVOLUTIONS, MATRIX, arrays, of_torch, save
from lora_files import edited

import esd_jax
from esd_jax import demo
from esd_jax.io import diffusers as io
from esd_jax.io.diffusers import read_exact
from esd_jax.io.lora import export_lora
from esd_jax.io.lora_merge import merge_lora
from esd_jax.io.single_file import export_single

pytestmark = pytest.mark.slow
DIFFUSERS = ("newest", "transformers 4.54, diffusers 0.32")
PROMPTS = ["a photo of the cat", "dogs"]
# What kohya's trainer adapts. (diffusers 0.32 does not know its names of conv_in, conv_out and time_embedding.)
TRAINED = r"regex:(to_[qkvo]|conv\d|conv_shortcut|samplers|proj|ff\.).*\.weight"


def erased_from(base, size):
    """A checkpoint with matrices of every kind changed, in the UNet and the text encoders, at ranks of their own."""
    changed = edited(base, TRAINED, rank=3, size=size)
    names = [
        f"{encoder}/encoder.layers.1.{m}.weight"
        for encoder in base.text_encoders
        for m in ("mlp.fc1", "self_attn.q_proj")
    ]
    edits = {
        name: value + size * np.random.default_rng(i).normal(size=value.shape).astype(np.float32)
        for i, (name, value) in enumerate(read_exact(base, names).items())
    }
    return changed.with_edits({name: jnp.asarray(value) for name, value in edits.items()})


@pytest.fixture(scope="module", params=["emoji", "sd1", "sd2", "sdxl"])
def exported(request, tmp_path_factory):
    """What a user has: the base, the erased model as folder and single file, and its change as both LoRAs."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "emoji":
        base = esd_jax.load("emoji")
    else:
        ldm_oracle.make(request.param, root / "made")
        base = io.load(root / "made")
    erased = erased_from(base, 0.02)
    files = {"base": io.export(base, root / "base"), "folder": io.export(erased, root / "folder")}
    files["single"] = export_single(erased, root / "single.safetensors")
    for style in ("diffusers", "kohya"):
        report = export_lora(erased, root / f"{style}.safetensors", energy=1 - 1e-9, style=style, dtype="float32")
        assert report.residual < 1e-6 and len({rank for rank, _ in report.ranks.values()}) > 1
        files[style] = report.path
    size = base.configs["unet"].sample_size
    np.save(root / "latents.npy", np.random.default_rng(0).normal(size=(2, 4, size, size)).astype(np.float32))
    return root, {name: str(path) for name, path in files.items()}


@pytest.mark.parametrize("environment", DIFFUSERS)
def test_every_form_opens_whole_and_draws_the_same_image(exported, environment):
    root, files = exported
    common = {"prompts": PROMPTS, "latents": str(root / "latents.npy")}
    jobs = {
        "base": {"folder": files["base"]},
        "folder": {"folder": files["folder"]},
        "single": {"folder": files["folder"], "file": files["single"]},
        "diffusers": {"folder": files["base"], "lora": files["diffusers"]},
        "kohya": {"folder": files["base"], "lora": files["kohya"]},
    }
    report, images = other_programs.run(
        environment, "diffusers_child.py", [{**common, **job} for job in jobs.values()], root
    )
    images = {name: 255 * images[f"images_{i}"] for i, name in enumerate(jobs)}
    differences = {name: float(np.abs(images[name] - images["folder"]).max()) for name in jobs}
    print(root.name, report["versions"], {name: round(value, 3) for name, value in differences.items()})
    for name, one in zip(jobs, report["jobs"], strict=True):
        assert one == {"faults": [], "said": []}, name
    assert (
        differences["base"] > 3
        and differences["single"] == 0
        and differences["diffusers"] <= 1
        and differences["kohya"] <= 1
    )


def test_both_versions_draw_the_same_image(exported):
    root, files = exported
    job = [{"folder": files["folder"], "prompts": PROMPTS, "latents": str(root / "latents.npy")}]
    one, other = (other_programs.run(name, "diffusers_child.py", job, root)[1]["images_0"] for name in DIFFUSERS)
    print(root.name, "between versions", 255 * np.abs(one - other).max())
    assert 255 * np.abs(one - other).max() <= 0.5


def test_a_name_without_the_text_model_is_what_transformers_4_loses(tmp_path):
    """Why names are changed on export: the test would fail otherwise, so it can."""
    folder = io.export(io.load(demo.MODEL), tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {key.removeprefix("text_model."): value for key, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    np.save(tmp_path / "latents.npy", np.zeros((1, 4, 16, 16), np.float32))
    job = [{"folder": str(folder), "prompts": ["a cat"], "latents": str(tmp_path / "latents.npy")}]
    report, _ = other_programs.run(DIFFUSERS[1], "diffusers_child.py", job, tmp_path)
    assert len(report["jobs"][0]["faults"]) == 2 * 52
    with pytest.warns(UserWarning, match="text_model"):
        again = io.export(io.load(folder), tmp_path / "again")
    report, _ = other_programs.run(DIFFUSERS[1], "diffusers_child.py", [{**job[0], "folder": str(again)}], tmp_path)
    assert report["jobs"][0]["faults"] == []


def test_lycoris_layers_give_what_ours_give(tmp_path):
    """LyCORIS's own layers in a UNet of diffusers, for each of its kinds, of a convolution and of a matrix."""
    pipe = factories.make_sd1(tmp_path / "base")
    base, jobs = esd_jax.load(tmp_path / "base"), []
    matrices = {
        "LoRA": {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4)},
        "DoRA": {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "dora_scale": (32, 1)},
        "LoHa": {"hada_w1_a": (32, 4), "hada_w1_b": (4, 32), "hada_w2_a": (32, 4), "hada_w2_b": (4, 32)},
        "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (8, 8)},
        "LoKr in factors": {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (8, 1), "lokr_w2_b": (1, 8)},
    }
    cases = [(CONV, shapes, kind) for kind, (shapes, _) in CONVOLUTIONS.items()]
    cases += [(MATRIX, shapes, kind) for kind, shapes in matrices.items()]
    for number, (module, shapes, _) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        file = save(tmp_path / str(number), module, arrays(**shapes), prefix="lycoris_")
        x = np.random.default_rng(1).normal(size=(2, 64, 8, 8) if module == CONV else (2, 5, 32)).astype(np.float32)
        np.save(tmp_path / str(number) / "x.npy", x)
        jobs.append({"folder": str(tmp_path / "base"), "file": str(file), "module": module})
        jobs[-1]["input"] = str(tmp_path / str(number) / "x.npy")
    _, outputs = other_programs.run("LyCORIS", "lycoris_child.py", jobs, tmp_path)
    for number, (module, _, kind) in enumerate(cases):
        layer = pipe.unet.get_submodule(module)
        x, before = torch.from_numpy(np.load(jobs[number]["input"])), layer.weight.data
        with torch.no_grad():
            unchanged = layer(x).numpy()
            layer.weight.data = torch.from_numpy(
                of_torch(merge_lora(base, jobs[number]["file"]), f"{module}.weight").copy()
            )
            ours, layer.weight.data = layer(x).numpy(), before
        scale = np.abs(ours).max()
        print(kind, np.abs(ours - outputs[f"output_{number}"]).max() / scale)
        np.testing.assert_allclose(ours, outputs[f"output_{number}"], atol=1e-5 * scale, err_msg=kind)
        assert np.abs(ours - unchanged).max() > 0.05 * scale, kind


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_open_clips_own_text_model_opens_strictly(kind, tmp_path):
    """What Stability's codes build, less its image half: no key missing, none unexpected."""
    pipe = ldm_oracle.make(kind, tmp_path / "folder")
    config = getattr(pipe, "text_encoder_2" if kind == "sdxl" else "text_encoder").config
    file = export_single(io.load(tmp_path / "folder"), tmp_path / "x.safetensors")
    text = {"context_length": 77, "vocab_size": config.vocab_size, "width": config.hidden_size}
    text |= {"heads": config.num_attention_heads, "layers": 2 if kind == "sdxl" else 3}
    text["mlp_ratio"] = config.intermediate_size / config.hidden_size
    job = {"file": str(file), "text": text, "projection": 40 if kind == "sdxl" else 32}
    job["prefix"] = "conditioner.embedders.1.model." if kind == "sdxl" else "cond_stage_model.model."
    report, _ = other_programs.run("open_clip", "open_clip_child.py", job, tmp_path)
    assert report["missing"] == report["unexpected"] == [] and report["tensors"] > 20


SIZE, SEED, GUIDANCE, TIMES = 64, 7, 3.0, (999, 666, 333)
PROMPT, NEGATIVE = "a photo of a cat", "a dog"


def sigmas(pipe):
    alphas = pipe.scheduler.alphas_cumprod.double()[list(TIMES)]
    return [*((1 - alphas) / alphas).sqrt().tolist(), 0.0]


@torch.no_grad()
def sampled_by_euler(pipe):
    """What stable-diffusion.cpp samples with "euler" and these sigmas: 0 to 255, not rounded."""
    noise, steps = torch.Generator().manual_seed(SEED), sigmas(pipe)
    x = steps[0] * torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=noise)
    prompt, null = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    for t, sigma, following in zip(TIMES, steps[:-1], steps[1:], strict=True):
        scaled = x / (sigma**2 + 1) ** 0.5
        eps_null, eps_c = (pipe.unet(scaled, t, text).sample for text in (null, prompt))
        x = x + (eps_null + GUIDANCE * (eps_c - eps_null)) * (following - sigma)
    image = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return (255 * (image / 2 + 0.5).clamp(0, 1))[0].permute(1, 2, 0).numpy()


def test_stable_diffusion_cpp_samples_the_same_images(tmp_path):
    """An SD 1.4 of true size: its single file, and both LoRAs of a change."""
    pipe = full_size.make_sd14(tmp_path / "base")
    base = io.load(tmp_path / "base", dtype="float16")
    file = export_single(base, tmp_path / "single.safetensors")
    edits = {}
    for i, name in enumerate(
        n for n in base.params["unet"] if re.fullmatch(r"(mid_block|up_blocks.1).*attn2.*weight", n)
    ):
        value, rng = np.asarray(base.params["unet"][name], np.float32), np.random.default_rng(i)
        rank = 1 + i % 3
        factors = rng.normal(size=(value.shape[0], rank)) @ rng.normal(size=(rank, value.shape[1]))
        edits[f"unet/{name}"] = jnp.asarray(value + 6 * value.std() / rank**0.5 * factors, jnp.float32)
    erased = base.with_edits(edits)
    for style in ("diffusers", "kohya"):
        export_lora(erased, tmp_path / "loras" / f"{style}.safetensors", energy=0.9999, style=style)
    unedited = sampled_by_euler(pipe)
    tensors = pipe.unet.state_dict()
    pipe.unet.load_state_dict({**tensors, **{n[5:]: torch.from_numpy(np.array(v).T.copy()) for n, v in edits.items()}})
    expected = {"": unedited, "<lora:diffusers:1>": sampled_by_euler(pipe)}
    expected["<lora:kohya:1>"] = expected["<lora:diffusers:1>"]
    steps = sigmas(pipe)
    del pipe, tensors
    one = {"negative": NEGATIVE, "seed": SEED, "sigmas": steps, "guidance": GUIDANCE, "size": SIZE}
    job = {"file": str(file), "loras": str(tmp_path / "loras")}
    job["jobs"] = [{"prompt": PROMPT + lora, **one} for lora in expected]
    report, images = other_programs.run("stable-diffusion.cpp", "sdcpp_child.py", job, tmp_path, timeout=3600)
    errors = [float(np.abs(images[f"image_{i}"] - image).max()) for i, image in enumerate(expected.values())]
    print(report["faults"], report["applied"], errors, np.abs(unedited - expected["<lora:kohya:1>"]).max())
    assert report["faults"] == [] and max(errors) <= 1
    assert np.abs(unedited - expected["<lora:kohya:1>"]).max() > 10
    n = len(edits)
    assert report["applied"] == [
        [],
        [[2 * n, 2 * n]],
        [[2 * n, 2 * n], [3 * n, 3 * n]],
    ]  # the second takes one off first
