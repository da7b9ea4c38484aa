"""Concepts that are erased from sentences, too, each of which is led to what it says without the concept."""

import diffusers
import esd_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from esd_world import SCHEDULE, as_ours, given, make, settings, world
from messages import one_line
from torch_oracle import error, exactly, in_pipeline, to_nchw, to_nhwc

from esd_jax import recipe
from esd_jax.erasing import contexts
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.contexts import Context
from esd_jax.erasing.method import Models
from esd_jax.methods import esd

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2

CONTEXTS = "a dog by {}: a dog | {} at sea: the sea"
GRID = {"sample_with": "teacher", "timestep_mode": "grid"}


def test_contexts_are_read():
    assert contexts.parse(None) == contexts.parse(" | ") == ()
    assert contexts.parse(CONTEXTS) == (Context("a dog by {}", "a dog"), Context("{} at sea", "the sea"))
    assert contexts.parse("{} again:") == (Context("{} again", ""),)


@pytest.mark.parametrize("text", ["a dog by {}", "a dog: a dog", ": a dog", ": {}", "a dog by {}: a dog | x"])
def test_contexts_that_say_too_little_are_refused(text):
    with pytest.raises(ValueError, match=one_line("contexts", "'a dog in {}: a dog'")):
        esd.ESD(contexts=text)


def test_every_concept_is_erased_alone_and_in_every_context():
    rows = contexts.expanded([Concept("Monet", strength=2.0), Concept("Goya")], contexts.parse(CONTEXTS))
    roles = esd.ESD(contexts=CONTEXTS).roles()
    asked = [tuple(roles[role](row) for role in ("student", "sample", "anchor", "concept")) for row in rows]
    assert asked == [
        ("Monet", "Monet", "", "Monet"),
        ("a dog by Monet", "a dog by Monet", "a dog", "Monet"),
        ("Monet at sea", "Monet at sea", "the sea", "Monet"),
        ("Goya", "Goya", "", "Goya"),
        ("a dog by Goya", "a dog by Goya", "a dog", "Goya"),
        ("Goya at sea", "Goya at sea", "the sea", "Goya"),
    ]
    assert [row.strength for row in rows] == [2.0] * 3 + [1.0] * 3


def test_a_replacement_may_stand_in_what_remains_of_a_context():
    both = contexts.parse("{} in ink: {} in ink | a house of {}: a house of {}")
    cat, dog = contexts.expanded([Concept("a cat", replace_with=("a fox",))], both)[1:]
    assert (cat.from_, cat.replace_with) == ("a cat in ink", ("a fox in ink",))
    assert (dog.from_, dog.replace_with) == ("a house of a cat", ("a house of a fox",))
    assert [row.replace_with for row in contexts.expanded([Concept("a cat")], both)[1:]] == [
        ("in ink",),
        ("a house of",),
    ]


def test_no_contexts_change_nothing():
    rows = [Concept("glasses", "a person with glasses"), Concept("Goya", replace_with=("a painter",))]
    assert contexts.expanded(rows, ()) == rows


def test_blank_contexts_are_none():
    blank, none = (esd.ESD(contexts=text, anchor="from", eta=0.7, context_eta=0.4) for text in (" | ", None))
    glasses = Concept("glasses", "a person with glasses")
    assert blank.roles()["sample"](glasses) == none.roles()["sample"](glasses) == "glasses"


def test_a_step_equals_its_equation():
    """Example 0 is the concept alone, example 1 in the context; both of the teacher's own trajectories."""
    w = world("unet", "float32")
    strengths = {"eta": 0.7, "context_eta": 0.4}
    method, inputs = make(w, "paper", [("Van Gogh", None)], contexts="a dog by {}: a dog", **strengths, **GRID)
    prompts, anchors, concept = ["Van Gogh", "a dog by Van Gogh"], ["", "a dog"], ["Van Gogh"] * 2
    eta = torch.tensor([0.7, 0.4])[:, None, None, None]
    scheduler = in_pipeline(diffusers.DDIMScheduler(**esd_oracle.SD14))
    with exactly("float32"):
        prepare, gradient = jax.jit(method.prepare), jax.jit(jax.value_and_grad(method.loss))
        for index in (0, 3, 25):
            draws = given(method, index, "float32")
            batch = prepare(Models(w.student, w.teacher), draws, inputs)
            eps = esd_oracle.guided(w.models, w.models.teacher, prompts, 3.0)
            x = esd_oracle.scheduled(scheduler, eps, to_nchw(draws.noise), index)
            t = int(scheduler.timesteps[index])
            e_c, e_null, e_anchor = (w.models.e_star(x, t, texts) for texts in (concept, [""] * 2, anchors))
            target = e_anchor - eta * (e_c - e_null)
            assert float(batch.t) == t
            assert np.abs(np.asarray(batch.x) - to_nhwc(x)).max() <= 1e-3
            assert error(batch.target, to_nhwc(target)) <= 1e-4

            student = w.models.student.requires_grad_(True)
            loss = w.models.loss(x, t, prompts, target)
            names, values = zip(*student.named_parameters(), strict=True)
            expected = torch.autograd.grad(loss, values)
            student.requires_grad_(False)
            ours, grads = gradient(w.student, batch)
            assert error(ours, loss) <= 1e-4
            for name, value in zip(names, expected, strict=True):
                assert error(grads[f"unet/{name}"], as_ours(w, name, value)) <= 1e-4, name


def test_contexts_are_drawn_as_often_as_the_concept():
    w = world("toy", "float32")
    method, inputs = make(w, "paper", [("Monet", None), ("Goya", None)], contexts=CONTEXTS, **GRID)
    keys = jax.random.split(jax.random.key(0), 6_001)
    draws = jax.jit(lambda keys: method.draw(0, keys[0], keys[1:], (1, 1, 1), inputs))(keys)
    counts = np.bincount(draws.concept)
    assert len(counts) == 6 and np.abs(counts - 1000).max() < 120  # four standard deviations


def test_kept_trajectories_are_those_of_the_contexts():
    """Every point is one that the teacher's sampler meets with the row's own prompt."""
    w = world("toy", "float32")
    kept = {"updates_per_trajectory": 4, "trajectory_buffer": 2, "sampling_steps": 5}
    method, inputs = make(w, "paper", [("Monet", None)], contexts="a dog by {}: a dog", **GRID, **kept)
    assert method.replay.predictions == 0
    memory = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape), leaf.dtype), method.memory((8, 8, 4)))
    keys = jax.random.split(jax.random.key(1), 2)
    draws = method.draw(0, keys[0], keys, (8, 8, 4), inputs)._replace(concept=jnp.array([0, 1]))
    memory, _ = jax.jit(method.recall)(Models(w.student, w.teacher), draws, memory, 0, inputs)
    eps = esd_oracle.guided(w.models, w.models.teacher, ["Monet", "a dog by Monet"], 3.0)
    scheduler = in_pipeline(diffusers.DDIMScheduler(**esd_oracle.SD14))
    scheduler.set_timesteps(5)
    x = to_nchw(draws.noise)
    for point, t in enumerate(scheduler.timesteps):
        assert np.abs(np.asarray(memory.x[:, 0, point]) - to_nhwc(x)).max() <= 1e-3
        x = scheduler.step(eps(x, int(t)), t, x).prev_sample


@pytest.mark.parametrize("preset, indices", [("paper", range(30, 50)), ("esd2025", range(20)), ("alt", range(1, 20))])
def test_a_window_draws_the_noisiest_points(preset, indices):
    whole, part = (esd.make_trajectory(settings(preset, window=w), SCHEDULE) for w in (1.0, 0.4))
    # The code of 2023 counts from the clean end: 50 - k updates lead to k.
    assert part.support.tolist() == [i for i in indices if whole.num_updates[i] < 20]
    assert len(part.support) in (19, 20) and part.most_updates == 19
    assert part.mean_updates < whole.mean_updates


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"window": 0.0}, ["window=0.0", "above 0"]),
        ({"window": 1.5}, ["window=1.5", "at most 1"]),
        ({"contexts": CONTEXTS, "anchor": "null"}, ["contexts", "anchor='auto'", "'null'"]),
    ],
)
def test_settings_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        esd.ESD(**fields)


def test_a_window_without_a_point_is_refused():
    with pytest.raises(ValueError, match=one_line("window=0.01", "50 sampler steps")):
        esd.make_trajectory(esd.ESD(window=0.01), SCHEDULE)


def test_a_concept_that_is_erased_in_one_place_has_no_contexts():
    with pytest.raises(ValueError, match=one_line("glasses", "from_")):
        make(world("toy", "float32"), "paper", [("glasses", "a person with glasses")], contexts=CONTEXTS, **GRID)


def test_recipes_without_them_leave_them_unsaid():
    assert not {"contexts", "context_eta", "window"} & recipe.make(concept="Monet").flat().keys()
    assert recipe.make(concept="Monet", contexts=CONTEXTS).flat()["contexts"] == CONTEXTS
