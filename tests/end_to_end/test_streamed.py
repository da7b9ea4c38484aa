"""A text encoder that stays in its file: the same prompts, images, erasures and exports, and nothing on the device."""

import gc
import shutil
from types import SimpleNamespace

import flow_factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import one_line
from torch_oracle import error

import esd_jax
from esd_jax import recipe, runs, streamed
from esd_jax.erasing import galleries
from esd_jax.evaluation.attacks import adversary as adversaries
from esd_jax.io import safetensors
from esd_jax.io.diffusers import export
from esd_jax.planning.plan import make_plan

PROMPTS = ["a photo of a cat", "", "Van Gogh"]
T5 = "text_encoder_2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "model"
    flow_factories.make_flux(folder)
    return folder


@pytest.fixture
def in_file(monkeypatch):
    """As if tiny encoders were large. CLIP stays on the device whatever its size."""
    monkeypatch.setattr(streamed, "FROM", 1)


def on_device(shapes):
    """How many arrays of such shapes are alive on devices."""
    gc.collect()
    return sum(array.shape in shapes for array in jax.live_arrays())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_are_encoded_as_by_the_whole_encoder(folder, dtype, monkeypatch):
    whole = esd_jax.load(folder, dtype=dtype)
    monkeypatch.setattr(streamed, "FROM", 1)
    ours = esd_jax.load(folder, dtype=dtype)
    assert [streamed.lies_in_file(ours.params[name]) for name in ("text_encoder", T5, "vae")] == [False, True, False]
    assert {name: value.shape for name, value in ours.params[T5].items()} == {
        name: value.shape for name, value in whole.params[T5].items()
    }
    expected, encoded = whole.encode_prompts(PROMPTS), ours.encode_prompts(PROMPTS)
    assert encoded.embeddings.dtype == jnp.float32
    np.testing.assert_array_equal(encoded.pooled, expected.pooled)
    # The same operations, compiled as several programs: in bfloat16 they may round in other places.
    assert error(encoded.embeddings, expected.embeddings) <= {"float32": 1e-6, "bfloat16": 2e-2}[dtype]


def test_a_device_holds_no_more_than_a_layer(folder, in_file):
    base = esd_jax.load(folder)
    config, shapes = base.configs[T5], {name: s.shape for name, s in base.network(T5).shapes.items()}
    # A width that no other array has: the feed-forward's.
    large = {shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]}
    seen, apply = [], streamed._parts(config, "float32")

    def block(*args):
        seen.append(on_device(large))
        return apply[1](*args)

    before = on_device(large)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "_parts", lambda *_: (apply[0], block, apply[2]))
        base.encode_prompts(PROMPTS)
    assert before == 0 and seen == [2, 2]  # wi_0 and wi_1 of the layer that is applied
    assert on_device(large) == 0
    layer = sum(np.prod(shape) for name, shape in shapes.items() if name.startswith("encoder.block.0."))
    assert streamed.num_resident(base.network(T5).shapes) == layer


def test_an_erasure_leaves_it_in_its_file(folder, in_file, tmp_path):
    base = esd_jax.load(folder)
    fields = {
        "method": "esd", "concept": "a cat", "subset": "flow-kv-text", "sampler": "flow_euler", "steps": 1,
        "timestep_mode": "grid", "sampling_steps": 2, "height": 16, "width": 24, "batch_size": 1,
        "base": str(folder), "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    erased = runs.run(base, recipe.make(**fields), offload_base=True)
    assert streamed.lies_in_file(erased.params[T5])
    written = esd_jax.load(export(erased, tmp_path / "model"))
    for name, value in written.params[T5].items():
        np.testing.assert_array_equal(value, erased.params[T5][name])
    assert esd_jax.load(tmp_path / "run").edits.keys() == erased.edits.keys()


def test_a_search_for_tokens_has_it_on_the_device(folder, in_file, unchecked):
    """It needs gradients through the encoder."""
    base = esd_jax.load(folder)
    assert all(isinstance(value, jax.Array) for value in adversaries.text_of(base).params[1].values())
    half = esd_jax.load(folder, dtype="bfloat16")  # whose file is float32
    tools = SimpleNamespace(params=half.params, text_encoders=half.text_encoders)
    own = galleries.own_params(tools)
    assert {value.dtype for params in own for value in params.values()} == {jnp.dtype("bfloat16")}
    rows = adversaries.conditionings(base, tuple(tokens(PROMPTS) for tokens in base.tokenizers))
    expected = base.encode_prompts(PROMPTS)
    for row, pooled, embeddings in zip(rows, expected.pooled, expected.embeddings, strict=True):
        assert error(row.pooled[0], pooled) <= 1e-6 and error(row.embeddings[0], embeddings) <= 1e-6


def test_a_plan_counts_a_layer(folder, in_file, monkeypatch):
    base = esd_jax.load(folder)
    plan = recipe.make(method="esd", subset="flow-kv-text", timestep_mode="grid", sampler="flow_euler", height=16,
                       width=24, sampling_steps=2)  # fmt: skip
    shapes = base.network(T5).shapes
    before = make_plan(base.configs, base.schedule, plan).before
    monkeypatch.setattr(streamed, "FROM", 10**9)
    whole = make_plan(base.configs, base.schedule, plan).before
    assert whole - before == 4 * (sum(s.size for s in shapes.values()) - streamed.num_resident(shapes))


def test_a_damaged_layer_is_named(folder, in_file, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (path,) = (copy / T5).glob("*.safetensors")
    header = safetensors.read_header(path)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    with path.open("r+b") as file:
        file.seek(header.data + next(e for key, e in header.entries.items() if key.endswith(name)).start)
        file.write(np.float32("nan").tobytes())
    base = esd_jax.load(copy)
    with pytest.raises(ValueError, match=one_line(name, "NaN", "download")):
        base.encode_prompts(PROMPTS)
