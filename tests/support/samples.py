"""How the samples in tests/data/written_by_0_1 are opened, and carried on: what their maker and their test share."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
from paths import DATA

import esd_jax
from esd_jax import api, dossier, exports
from esd_jax.evaluation.attacks import Goal
from esd_jax.io.safetensors import to_file
from esd_jax.io.tensors import torch_shapes
from esd_jax.pipeline import network

SAMPLES = DATA / "written_by_0_1"
ENDED = ("full", "lora")  # runs that are resumed
ATTACK = {
    "names": ["concept_inversion"], "budget": "emoji", "settings": {"concept_inversion": {"steps": 2, "tokens": 2}},
    "judge": "brightness", "seeds": 1, "random": False, "num_steps": 2, "guidance_scale": 3.0,
}  # fmt: skip
SEARCH = {
    "concept": "cat style", "grid": {"learning_rate": [1e-3]}, "steps": [1], "strengths": (0.5, 1.0),
    "config": "full.py",
}  # fmt: skip


def is_exact(name):
    """Whether a sample is read without arithmetic that another machine rounds otherwise."""
    return not any(word in name for word in ("lora", "kohya", " to its end"))


def tensors(pipeline):
    """What was erased, or of a whole checkpoint everything: float32, in torch layout."""
    files = {}
    for part, params in pipeline.params.items():
        layouts = pipeline.network(part).layouts
        for key, value in params.items():
            name = f"{part}/{key}"
            if name in (pipeline.edits or [name]):
                array = np.asarray(pipeline.edits.get(name, value), np.float32)
                files[name] = np.ascontiguousarray(to_file(array, layouts[key]))
    return files


def checksum(values):
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(f"{name} {value.shape} ".encode() + value.astype("<f4").tobytes())
    return digest.hexdigest()


def shapes(values):
    """Zeros in place of values, so that their checksum is one of names and shapes."""
    return {name: np.zeros_like(value) for name, value in values.items()}


def in_a_row(values):
    """All values by their tensors' names, in one array."""
    return np.concatenate([value.ravel() for _, value in sorted(values.items())])


def open_sample(name, base, sdxl):
    if name == "base":
        return base
    if name.endswith("-orbax"):
        return exports.FORMATS["orbax"].read(base, Path(name))
    return api.opened(sdxl if name.startswith("sdxl") else base, name)


def with_zeros(folder):
    """The checkpoint of a folder that holds configs alone, with zeros for weights, and the tokenizer of the base."""
    configs, _ = api.architecture(folder)
    for part, config in configs.items():
        zeros = {name: np.zeros(s, np.float16) for name, s in torch_shapes(network(config, "float32")).items()}
        safetensors.numpy.save_file(zeros, Path(folder, part, "model.safetensors"))
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree("base/tokenizer", Path(folder, name))
    return esd_jax.load(folder)


def goal():
    """What the attack wants: bright images."""
    images = np.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3).astype(np.uint8)
    return Goal("cat style", ("a photo of the cat style",), images, lambda some: some.mean((1, 2, 3)) > 127)


def evaluated(base, erased, **options):
    options |= {"prompt_list": "prompts.csv", "num_steps": 2, "guidance_scale": 3.0}
    return dossier.evaluate(base, erased, "custom", output_dir="full/evidence", **options)
