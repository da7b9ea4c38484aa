"""The card: front matter that the hub reads, Markdown without a user's markup, code that fits the files that exist."""

import ast
import dataclasses
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from report_pages import ABOUT, EVIL, FILES, evidence

from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Evidence
from esd_jax.evaluation.report import card, snippets
from esd_jax.evaluation.report.about import About, File
from esd_jax.evaluation.report.snippets import Source

FORMATS = ("folder", "single", "lora", "kohya", "delta", "difference")
EXPORTS = [File(f"x-{name}" + (".safetensors" if name != "folder" else ""), 1, name, name) for name in FORMATS]


def test_the_hub_reads_its_front_matter():
    made = ModelCard(card.card(evidence(), picture="before_after.png", report="report.html", facts=ABOUT))
    assert made.data.to_dict() == {
        "license": "apache-2.0", "base_model": "org/name", "base_model_relation": "finetune",
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": list(card.TAGS),
    }  # fmt: skip
    assert {"text-to-image", "concept-erasure", "esd-jax"} <= set(made.data.tags)
    adapter = ModelCard(card.card(evidence(), facts=ABOUT, adapter=True))
    assert adapter.data.base_model_relation == "adapter"


@pytest.mark.parametrize("base", ["emoji", "/home/me/model", "my model", None])
def test_a_base_that_is_not_on_the_hub_is_left_out(base):
    made = ModelCard(card.card(Evidence("x", Erasure(base=base))))
    assert "base_model" not in made.data.to_dict() and made.data.license == "other"
    assert made.data.to_dict()["license_name"]
    assert "Nothing was measured." in made.text


def test_its_figures_are_a_table():
    made = card.card(evidence(), picture="before_after.png", report="report.html", facts=ABOUT)
    assert "**neon style is nearly gone on the tested prompts (1 of 20), but came back under 1 of 2 attacks" in made
    assert "| neon detection rate | 100% (84–100%) | 5% (1–24%) | – | 20 |" in made
    assert "| Inversion of neon: attack success rate | 100% (84–100%) | 85% (64–95%) | 5% (1–24%) | 20 |" in made
    assert "| erased | 20 | 5% (1–24%) | 0.13 (0.07–0.19) |  |" in made
    assert "![Before and after, the same prompts and noise](<before_after.png>)" in made
    assert "```python\npipe = load()\n```" in made and "- duration: 1 h 2 min" in made
    rows = [line for line in made.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6, 5}


def test_what_users_wrote_is_no_markup():
    made = card.card(evidence(EVIL), facts=dataclasses.replace(ABOUT, license=EVIL, base=EVIL))
    outside = re.sub(r"```.*?```", "", made.split("---\n", 2)[2], flags=re.S)
    assert "<script" not in outside.replace(r"\<", "")
    rows = [line for line in outside.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6, 5}
    assert yaml.safe_load(made.split("---\n", 2)[1])["license"] == EVIL


def test_the_facts_are_flat_texts():
    found = card.facts(evidence())
    assert all(isinstance(k, str) and isinstance(v, str) and k.startswith("esd_jax.") for k, v in found.items())
    assert all(map(card.is_fact, found))
    assert found["esd_jax.erased"] == "neon style" and found["esd_jax.base_sha256"] == "ab" * 32
    assert found["esd_jax.finding.1"] == "erased: neon detection rate: 100% before, 5% (1–24%) after, n = 20"
    assert found["esd_jax.finding.4"].endswith(
        "success rate 17 of 20 images; random prompts 1 of 20; on the base 20 of 20"
    )
    assert json.loads(found["esd_jax.measured_with"])["detectors"][0]["sha256"] == "cd" * 32
    assert found["esd_jax.attacked"] == "yes" and found["esd_jax.verdict"].startswith("neon style is nearly gone")
    little = card.facts(Evidence("x"))
    assert little == {"esd_jax.erased": "x", "esd_jax.measured": "no", "esd_jax.attacked": "no"}


def titles(files, **source):
    return [use.title for use in snippets.uses(files, Source("a cat", **source))]


def test_only_files_that_exist_are_used():
    assert titles(FILES, base="org/name") == ["diffusers: the erased model", "diffusers: the delta on the base"]
    assert titles([FILES[2]]) == []
    assert titles(EXPORTS) == [
        "diffusers: the erased model", "A1111 and ComfyUI: the single file", "diffusers: the single file",
        "diffusers: the LoRA on the base", "A1111 and ComfyUI: the LoRA", "diffusers: the delta on the base",
        "esd_jax: the difference, at any strength",
    ]  # fmt: skip
    assert titles(EXPORTS[3:4]) == ["A1111 and ComfyUI: the LoRA", "diffusers: the LoRA on the base"]
    assert not any("A1111" in title for title in titles(EXPORTS, embedded="emoji"))


def test_the_delta_is_loaded_into_the_network_that_was_erased():
    uses = [snippets.uses([FILES[1]], Source("a cat", **named)) for named in ({}, {"denoiser": "transformer"})]
    assert [use.code.count("pipe.unet.load_state_dict(") for (use,) in uses] == [1, 0]
    assert uses[1][0].code.count("pipe.transformer.load_state_dict(") == 1 and "denoiser" in uses[1][0].note


@pytest.mark.parametrize("source", [
    Source('a "cat" in Z\'s style', base="org/base", folder="runs/neon"),
    Source("a cat", repo="me/neon", base="org/base", pipeline="StableDiffusionXLPipeline"),
    Source("a cat", embedded="emoji", sampling={"steps": 20, "guidance_scale": 3.0}),
    Source("a cat", embedded="emoji-flow", arguments={"negative_prompt": "", "true_cfg_scale": 3.0, "height": 64}),
], ids=["local", "hub", "embedded", "embedded flow"])  # fmt: skip
def test_the_code_names_its_files(source):
    uses = snippets.uses(EXPORTS, source)
    python = {use.title: use.code for use in uses if use.language == "python"}
    for code in python.values():
        ast.parse(code)
        assert json.dumps(source.prompt) in code
    if source.repo:
        assert 'from_pretrained("me/neon")' in python["diffusers: the erased model"]
        assert (
            'load_lora_weights("me/neon", weight_name="x-lora.safetensors")'
            in python["diffusers: the LoRA on the base"]
        )
        single = python["diffusers: the single file"]
        assert 'StableDiffusionXLPipeline.from_single_file("https://huggingface.co/me/neon/blob/main/x-single' in single
        assert 'hf_hub_download("me/neon", "x-delta.safetensors")' in python["diffusers: the delta on the base"]
        assert "hf download me/neon x-kohya.safetensors --local-dir ComfyUI/models/loras/" in uses[4].code
    elif source.embedded:
        flow = source.embedded == "emoji-flow"
        call = (
            ', negative_prompt="", true_cfg_scale=3, height=64)'
            if flow
            else "num_inference_steps=20, guidance_scale=3)"
        )
        assert all(call in code for name, code in python.items() if "esd" not in name)
        place = "FLOW" if flow else "MODEL"
        delta = python["diffusers: the delta on the base"]
        assert f"from_pretrained({place})" in delta and f"from esd_jax.demo import {place}\n" in delta
        assert f'esd_jax.load("{source.embedded}")' in python["esd_jax: the difference, at any strength"]
    else:
        assert 'from_pretrained("runs/neon/x-folder")' in python["diffusers: the erased model"]
        assert (
            'load_lora_weights("runs/neon", weight_name="x-lora.safetensors")'
            in python["diffusers: the LoRA on the base"]
        )
        assert 'from_pretrained("org/base")' in python["diffusers: the delta on the base"]
        assert "cp runs/neon/x-kohya.safetensors stable-diffusion-webui/models/Lora/" in uses[4].code
        assert "<lora:x-kohya:1>" in uses[4].note


def test_durations_and_sizes_are_read_easily():
    from esd_jax.evaluation.report import about

    assert [about.duration(s) for s in (0.2, 41.4, 60, 725, 3600, 12_000)] == [
        "1 s", "41 s", "1 min", "12 min 5 s", "1 h", "3 h 20 min",
    ]  # fmt: skip
    assert [about.size(n) for n in (0, 1580, 1_060_000, 4_270_000_000)] == ["0 kB", "1.58 kB", "1.06 MB", "4.27 GB"]
    assert About().facts == {} and About().when == ""
