"""What other programs take of ours: eval-unlearn a technique and a report, ComfyUI a workflow."""

import json
from importlib.metadata import entry_points

import numpy as np
import pytest
from messages import one_line

import esd_jax
from esd_jax import exports
from esd_jax.evaluation.evidence import Evidence, Finding
from esd_jax.interop import comfyui, eval_unlearn
from esd_jax.io.exact import with_strength
from esd_jax.metrics.intervals import rate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "rose"
    esd_jax.erase("emoji", "a rose", method="uce", output_dir=folder)
    return folder


def test_the_entry_point_names_the_technique():
    (point,) = (one for one in entry_points(group="eval_unlearn.techniques") if one.name == "esd_jax")
    assert point.load() is eval_unlearn.Technique


def test_exports_get_a_workflow_of_the_models_own_size(run, tmp_path):
    erased = esd_jax.load(run)
    written = exports.export_all(erased, tmp_path, ("single", "kohya", "delta"))
    paths = {one.format: one.path for one in written}
    for files, loader, names in (
        (written, "1", {"ckpt_name": paths["single"].name}),
        (written[1:], "2", {"lora_name": paths["kohya"].name}),
    ):
        file = comfyui.of_exports(erased, files, "a rose on a hill")
        nodes = json.loads(file.read_text())
        assert file.parent == paths["single"].parent and nodes["3"]["inputs"]["text"] == "a rose on a hill"
        assert names.items() <= nodes[loader]["inputs"].items()
        assert (nodes["5"]["inputs"]["width"], nodes["5"]["inputs"]["height"]) == (64, 64)
        assert (nodes["6"]["inputs"]["steps"], nodes["6"]["inputs"]["cfg"]) == (20, 3.0)
    assert nodes["1"]["inputs"]["ckpt_name"] == "BASE.safetensors"
    with pytest.raises(ValueError, match=one_line("single file", "--format=single")):
        comfyui.of_exports(erased, written[2:], "a rose")


def test_the_technique_draws_what_sample_draws(run):
    """Image i from seed + i, with the steps and guidance of the model, and what is not known passed over."""
    technique = eval_unlearn.Technique(run=str(run), use_fp16=True, batch_size=2)
    assert technique.erase_concept == "a rose"
    images = technique.generate(["a rose", "a cat"], seed=7, num_inference_steps=2, height="no")
    wanted = esd_jax.sample(
        esd_jax.load(run), ["a rose", "a cat"], seed=[7, 8], steps=2, guidance_scale=3.0, batch_size=2
    )
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), wanted)
    assert all(image.mode == "RGB" for image in images)


def test_no_strength_is_the_base(run):
    technique = eval_unlearn.Technique(run=str(run), strength=0.0, erase_concept="roses")
    assert technique.erase_concept == "roses"
    before = with_strength(esd_jax.load(run), 0.0)
    for name, value in technique.model.edits.items():
        np.testing.assert_array_equal(value, before.edits[name])


def test_without_a_seed_images_differ(run):
    technique = eval_unlearn.Technique(run=str(run), num_inference_steps=2, batch_size=1)
    first, second = (np.asarray(technique.generate(["a cat"])[0]) for _ in range(2))
    assert (first != second).any()


def test_a_report_has_the_fields_of_theirs():
    before, after = rate([True] * 19 + [False]), rate([False] * 20)
    verdict = (Finding("erased", "a rose", before, after), Finding("kept", "SSIM", None, rate([True] * 4), None, False))
    evidence = Evidence("a rose", measured_with={"protocol": "emoji", "n": (1, 2)}, verdict=verdict)
    report = eval_unlearn.report(evidence, when=5.0)
    assert json.loads(json.dumps(report)) == report
    assert (report["technique_name"], report["erase_concept"], report["timestamp"]) == ("esd_jax", "a rose", 5.0)
    assert report["metric_names"] == ["erased: a rose", "kept: SSIM"] == list(report["metric_results"])
    result = report["metric_results"]["erased: a rose"]
    assert (result["name"], result["value"]) == ("erased: a rose", 0.0)
    assert result["details"]["base"] == 0.95 and result["details"]["images"] == 20
    assert report["metric_results"]["kept: SSIM"]["details"]["base"] is None
    assert eval_unlearn.report(evidence)["run_id"] == report["run_id"]


def test_nothing_measured_is_no_report():
    with pytest.raises(ValueError, match="esd-jax evaluate RUN"):
        eval_unlearn.report(Evidence("a rose"))


@pytest.mark.parametrize("lora", [None, "van_gogh.safetensors"])
def test_every_link_of_a_workflow_leads_to_an_output(tmp_path, lora):
    """The prompt passes the LoRA's text encoder, and the sampler its network."""
    file = comfyui.write(tmp_path / "workflow.json", "sd14.safetensors", "a road", lora=lora, strength=0.8, width=768)
    nodes = json.loads(file.read_text())
    for node in nodes.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or (value[0] in nodes and value[1] in (0, 1, 2))
    (sampler,) = (node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler")
    source = nodes[sampler["model"][0]]
    prompt, negative = nodes[sampler["positive"][0]]["inputs"], nodes[sampler["negative"][0]]["inputs"]
    assert (prompt["text"], negative["text"]) == ("a road", "")
    assert prompt["clip"][0] == sampler["model"][0]
    assert nodes[sampler["latent_image"][0]]["inputs"]["width"] == 768
    if lora:
        assert source["class_type"] == "LoraLoader" and source["inputs"]["lora_name"] == lora
        assert source["inputs"]["strength_model"] == source["inputs"]["strength_clip"] == 0.8
        source = nodes[source["inputs"]["model"][0]]
    assert source == {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd14.safetensors"}}
