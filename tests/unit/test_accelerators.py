"""GPUs and TPUs on a machine that has none: programs lowered for them, their plan, and where tensors lie."""

import contextlib
import re
from contextlib import contextmanager
from functools import partial

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import pxla

import esd_jax
from esd_jax import recipe, runs, sharding
from esd_jax.erasing import embedding_search
from esd_jax.evaluation.attacks import ATTACKS, concept_inversion, hidden, p4d, unlearn_diff_atk
from esd_jax.evaluation.attacks.adversary import Goal
from esd_jax.models import attention
from esd_jax.models.attention import Device
from esd_jax.params import prefixed
from esd_jax.planning import plan
from esd_jax.runs import each
from esd_jax.training import together
from launch.benchmarks import cards, work

HOPPER = Device((9, 0), 91900)
PLATFORMS = ("cuda", "tpu")
# Few and short: what is drawn before the first step runs here, on the CPU.
METHODS = {
    "esd": ("paper", {"sampling_steps": 4}),
    "all_but_one": ("table1", {"replace_with": "a dog"}),
    "sdd": ("paper", {"max_grad_norm": 1.0}),
    "ablating": (
        "style",
        {"replace_with": "painting", "anchor_prompts": "a painting of a cat", "drawn_images": 2, "drawing_steps": 2},
    ),
    "forget_me_not": ("object", {"drawn_images": 2, "drawing_steps": 2}),
    "stereo": ("style", {"drawn_images": 4, "drawing_steps": 2, "sampling_steps": 4, "inversion_tokens": "<rand-1>"}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """SD 1 in small, of one block: 64 queries, 77 tokens, heads of 16 channels."""
    folder = tmp_path_factory.mktemp("base")
    one = {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",)}
    factories.make_sd1(folder, **one, up_block_types=("CrossAttnUpBlock2D",))
    return esd_jax.load(folder, dtype="bfloat16")


@contextmanager
def tracing_for(platform):
    """What is traced meanwhile takes attention as on an H100 with cuDNN, whatever the size; or as on a TPU."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(sharding, "on_cpu", lambda mesh: False)
        if platform == "cuda":
            patch.setenv(attention.CHOICE, "cudnn")
            stack.enter_context(cards.named("h100").standing_in())
            patch.setattr(attention, "describe", lambda device: HOPPER)
        yield


def lowered(step, platform, *arguments):
    """The program of a jitted function for a platform, as StableHLO."""
    with tracing_for(platform):
        return step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def check(text, platform):
    """Attention is cuDNN's on a GPU, forwards and backwards; no product or convolution is of float32 numbers."""
    fused = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} if platform == "cuda" else set()
    assert set(re.findall(r"@(__cudnn\$fmha\w+)", text)) == fused
    for operation in ("convolution", "dot_general"):
        operands = re.findall(rf"stablehlo\.{operation}.* : \(tensor<([^>]*)>, tensor<([^>]*)>\)", text)
        # A search compares embeddings with the whole vocabulary in float32, once an update.
        networks = ["".join(pair) for pair in operands if str(factories.VOCAB_SIZE) not in "".join(pair)]
        assert networks and not [pair for pair in networks if "f32" in pair]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("method", METHODS)
def test_the_step_of_every_trained_method_lowers(base, method, platform):
    preset, fields = METHODS[method]
    config = recipe.preset(method, preset, concept="a cat", dtype="bfloat16", batch_size=1, **fields)
    config.subset = "full" if method == "forget_me_not" else "esd-u"
    plan = recipe.make(**config.to_dict())
    mesh = sharding.make_mesh(1)
    whole = runs.assemble(base, plan, mesh)
    theta_0, frozen = whole.split(base.params["unet"])
    check(lowered(whole.step, platform, whole.begin(theta_0), theta_0, frozen, whole.inputs), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_step_of_several_runs_lowers(base, platform):
    """LoRAs of two concepts: attention has a further axis, of runs."""
    preset, fields = METHODS["esd"]
    config = recipe.preset("esd", preset, dtype="bfloat16", batch_size=1, rank=2, subset="esd-x", **fields)
    setups = each.assembled(base, each.plans(recipe.make(**{**config.to_dict(), "concept": "a cat; a dog"})))
    inputs, differ = each.alike(setups, ["a cat", "a dog"])
    theta_0, frozen = setups[0].split(base.params["unet"])
    states = [runs.begin(one, base, None)._replace(memory=one.memory()) for one in setups]
    step = together.make_step(setups[0].step, differ)
    check(lowered(step, platform, together.stacked(states), theta_0, frozen, inputs), platform)


SEARCHES = {
    "concept_inversion": ({"steps": 1, "tokens": 1}, (concept_inversion,)),
    "unlearn_diff_atk": ({"num_times": 1, "iterations": 1, "tokens": 2, "together": 1}, (unlearn_diff_atk,)),
    "p4d": ({"iterations": 1, "judge_every": 1, "judged_on": 1, "length": 3, "keep": 1, "together": 1}, (p4d,)),
}


def goal():
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    return Goal("cat", ("a photo of a cat",), images, lambda images: np.zeros(len(images), bool))


def recorded(texts, platform):
    """In place of `repeated`: the step is lowered for a platform and never run; it gives zeros."""

    def repeated(step):
        def run(carry, inputs, *fixed):
            now = jax.tree.map(lambda a: jnp.asarray(a)[0], inputs)
            texts.append(lowered(jax.jit(step), platform, carry, now, *fixed))
            arguments = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(step, carry, now, *fixed))
            return arguments[0], jax.tree.map(lambda a: jnp.stack([a] * len(jax.tree.leaves(inputs)[0])), arguments[1])

        return run

    return repeated


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", SEARCHES)
def test_the_step_of_every_search_with_gradients_lowers(base, name, platform, monkeypatch):
    fields, modules = SEARCHES[name]
    texts = []
    for module in modules:
        monkeypatch.setattr(embedding_search, "repeated", recorded(texts, platform))
        module.searcher.cache_clear()
    ATTACKS[name](**fields).run(base, base, goal(), seed=0)
    for module in modules:
        module.searcher.cache_clear()
    assert texts
    check(texts[0], platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_benign_fine_tuning_lowers(base, platform, monkeypatch):
    """The step of `hidden.resurge`, on a model whose cross-attention was edited."""
    texts = []
    monkeypatch.setattr(embedding_search, "repeated", recorded(texts, platform))
    hidden.healer.cache_clear()
    edited = {name: value for name, value in prefixed(base.params["unet"], "unet").items() if "attn1" in name}
    victim = base.with_edits(jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), edited), {})
    hidden.resurge(victim, goal().images, ["a dog"], hidden.Resurgence(steps=1, batch_size=1))
    hidden.healer.cache_clear()
    check(texts[0], platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_textual_inversion_lowers(base, platform, monkeypatch):
    texts = []
    monkeypatch.setattr(embedding_search, "repeated", recorded(texts, platform))
    plan = recipe.make(
        **{
            **recipe.preset(
                "forget_me_not", concept="a cat", inversion_steps=1, drawn_images=2, drawing_steps=2
            ).to_dict()
        }
    )
    runs.assemble(base, plan)
    check(texts[0], platform)


def test_a_run_is_planned_where_nothing_tells_the_cost_of_a_program(monkeypatch):
    """On GPUs and TPUs JAX cannot count the operations of a program that is not compiled."""
    configs, schedule = work.architecture("tiny")
    recipe_ = work.plan("tiny", "esd-x", 1)
    expected = plan.make_plan(configs, schedule, recipe_)
    monkeypatch.setattr(pxla.xb, "using_pjrt_c_api", lambda backend: True)
    assert jax.jit(lambda x: x @ x).lower(jnp.zeros((2, 2))).cost_analysis() is None
    assert plan.make_plan(configs, schedule, recipe_) == expected
    assert "TFLOP an evaluation of the denoiser" in str(expected)


def test_kernels_of_convolutions_lie_as_a_gpu_reads_them(base, monkeypatch):
    """Where cuDNN is, and nothing else changes: a run gives the same tensors."""
    config = recipe.preset("esd", concept="a cat", dtype="bfloat16", subset="esd-u", sampling_steps=4)
    plan = recipe.make(**{**config.to_dict(), "steps": 2, "learning_rate": 1e-3})
    expected = runs.run(base, plan)
    monkeypatch.setattr(attention, "describe", lambda device: HOPPER)
    monkeypatch.setenv(attention.CHOICE, "xla")
    tree = {name: value for name, value in base.params["unet"].items()}
    placed = sharding.place(tree, sharding.make_mesh(1))
    layouts = {name: value.format.layout.major_to_minor for name, value in placed.items()}
    assert layouts["conv_in.weight"] == (3, 0, 1, 2) and layouts["time_embedding.linear_1.weight"] == (0, 1)
    erased = runs.run(base, plan)
    assert erased.edits.keys() == expected.edits.keys()
    for name, value in erased.edits.items():
        np.testing.assert_allclose(value, expected.edits[name], atol=1e-5)
    owned = runs.run(esd_jax.load(base.provenance.folder, dtype="bfloat16"), plan, offload_base=True)
    np.testing.assert_array_equal(owned.edits["unet/conv_in.weight"], erased.edits["unet/conv_in.weight"])
