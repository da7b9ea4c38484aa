"""Each trained method along a rectified flow, on the toy network: five updates in float64 against torch."""

import copy
from typing import Any

import flow_methods_oracle as flow
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ablating_world import CAT, OBJECT, ROBOT, Studio, recorded, rows_of, small
from distilled import assert_same_change, noise_of
from esd_oracle import Models as Torch
from esd_world import SHAPE, as_ours, tools, world
from flow_methods_oracle import grid, guided, noised, precise, says, told
from messages import one_line
from puppet import RATE, Puppet, Scripted
from torch_oracle import error, exactly, to_nchw

from esd_jax.diffusion.flow import CLASS, FlowSchedule
from esd_jax.erasing import trajectories
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Models
from esd_jax.erasing.retention import Retention, retaining
from esd_jax.methods import ablating, esd
from esd_jax.methods.ablating import Ablating
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.methods.esd import ESD
from esd_jax.methods.sdd import SDD
from esd_jax.training.step import Optimizer, averaging, init_state, make_step

SCHEDULE = FlowSchedule.from_config({"_class_name": CLASS, "shift": flow.SHIFT})
STEPS, SCALE, ETA = 4, 3.0, 0.75
CONCEPTS = (Concept("a cat", replace_with=("a dog",)), Concept("Van Gogh"))
TEXTS, NOTHING, ANCHORS = [c.text for c in CONCEPTS], ["", ""], ["a dog", ""]
DRAWN = (2, 0, 3, 1, 2)  # sampler steps before the point of each update


def toy() -> Any:
    w = world("toy", "float64")
    return w._replace(network=precise(w.network))


def points(k: int) -> trajectories.Draws:
    """Draws by hand: example i erases concept i."""
    return trajectories.Draws(jnp.int32(k), jnp.float32(told(grid(STEPS)[k])), jnp.arange(2), noise_of(k, "float64"))


def assert_five_updates(w: Any, method: Any, inputs: Any, drawn: list[Any], loss_of: Any, ema: float | None = None):
    """The losses, and what five steps of Adam change. loss_of: (draws, the torch models, the average) -> loss."""
    student, average = copy.deepcopy(w.models.teacher).requires_grad_(True), copy.deepcopy(w.models.teacher)
    models = Torch(student, w.models.teacher, w.models.encode)
    adam = torch.optim.Adam(student.parameters(), lr=RATE)
    tx = averaging(Optimizer(optimizer="adam", learning_rate=RATE).transformation(), ema)
    step = make_step(Puppet(method), tx, compute_dtype=jnp.float64, shape=SHAPE, batch_size=len(drawn[0].concept))
    state = init_state(w.teacher, tx, seed=0)
    for draws in drawn:
        state, metrics = step(state, w.teacher, {}, Scripted(inputs, draws))
        adam.zero_grad()
        loss = loss_of(draws, models, average)
        loss.backward()
        adam.step()
        assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-9)
        if ema is not None:
            with torch.no_grad():
                for mean, value in zip(average.parameters(), student.parameters(), strict=True):
                    mean.copy_(ema * mean + (1 - ema) * value)
    assert step._cache_size() == 1
    assert_same_change(w, state.theta, {}, student, 0.1 * RATE)
    if ema is not None:
        assert_same_change(w, state.opt.average, {}, average, 0.05 * RATE)


def esd_target(models: Any, draws: Any) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """x_t, what the network is told there, and the target."""
    k, teacher = int(draws.index), models.teacher
    t = told(grid(STEPS)[k])
    x = flow.sampled(guided(teacher, models, TEXTS, SCALE), to_nchw(draws.noise), k, STEPS)
    with torch.no_grad():
        anchor, own, null = (says(teacher, models, x, t, texts) for texts in (ANCHORS, TEXTS, NOTHING))
    return x, t, anchor - ETA * (own - null)


ESD_FLOW = {
    "sample_with": "teacher", "sampler": "flow_euler", "timestep_mode": "grid", "sampling_steps": STEPS,
    "sampling_guidance": SCALE, "eta": ETA,
}  # fmt: skip


def test_esd():
    """x_t, its noise level, the target, the loss and its gradient at every point; then five updates."""
    w = toy()
    with exactly("float64"):
        method, inputs = ESD(**ESD_FLOW).make(tools(w, schedule=SCHEDULE), CONCEPTS)
        drawn = [esd.Draws(*points(k), image=jnp.zeros(2, jnp.int32)) for k in DRAWN]
        prepare, gradient_of = jax.jit(method.prepare), jax.jit(jax.value_and_grad(method.loss))
        student = w.models.student.requires_grad_(True)
        for draws in drawn[:4]:
            x, t, target = esd_target(w.models, draws)
            batch = prepare(Models(w.student, w.teacher), draws, inputs)
            assert batch.t == t and error(batch.x, x.permute(0, 2, 3, 1)) <= 1e-10
            assert error(batch.target, target.permute(0, 2, 3, 1)) <= 1e-10
            loss = torch.mean((says(student, w.models, x, t, TEXTS) - target) ** 2)
            names, values = zip(*student.named_parameters(), strict=True)
            ours, grads = gradient_of(w.student, batch)
            assert float(ours) == pytest.approx(loss.item(), rel=1e-10)
            for name, theirs in zip(names, torch.autograd.grad(loss, values), strict=True):
                assert error(grads[f"unet/{name}"], as_ours(w, name, theirs)) <= 1e-9
        student.requires_grad_(False)

        def loss_of(draws, models, average):
            x, t, target = esd_target(models, draws)
            return torch.mean((says(models.student, models, x, t, TEXTS) - target) ** 2)

        assert_five_updates(w, method, inputs, drawn, loss_of)


@pytest.mark.parametrize("fix_k0", [True, False])
def test_sdd(fix_k0):
    """x_t by the average, and both sides of the loss by the student, at x_t's own noise level."""
    w = toy()
    with exactly("float64"):
        settings = SDD(sampling_steps=STEPS, ema=0.6, sample_prompt="concept", fix_k0=fix_k0)
        method, inputs = settings.make(tools(w, schedule=SCHEDULE), CONCEPTS)

        def loss_of(draws, models, average):
            k = int(draws.index)
            t, velocity = told(grid(STEPS)[k]), guided(average, models, TEXTS, SCALE)
            x = flow.sampled(velocity, to_nchw(draws.noise), STEPS if k == 0 and not fix_k0 else k, STEPS)
            with torch.no_grad():
                target = says(models.student, models, x, t, ANCHORS)
            return torch.mean((says(models.student, models, x, t, TEXTS) - target) ** 2)

        assert_five_updates(w, method, inputs, [points(k) for k in DRAWN], loss_of, ema=0.6)
    np.testing.assert_array_equal(method.trajectory.t_low, method.trajectory.t_high)
    np.testing.assert_array_equal(method.trajectory.t_low, 1000 * grid(STEPS)[:-1])


def test_all_but_one():
    """delta from step 1 on, of the pixels that the instructions act on most."""
    w, gamma, kappa, penalty = toy(), 4.5, 0.61, 2.0
    orders = {0: [("a cat", -7.5), ("a dog", 6.5)], 1: [("Van Gogh", -7.5)]}
    with exactly("float64"):
        settings = AllButOne(
            gamma_1=gamma, gamma_2=2.5, penalty=penalty, sampling_steps=STEPS, window_start=0.25, delta_warmup=1,
            kappa=kappa,
        )  # fmt: skip
        method, inputs = settings.make(tools(w, schedule=SCHEDULE), CONCEPTS)

        def guidance(models, x, t, step):
            null, own = (says(models.teacher, models, x, t, texts) for texts in (NOTHING, TEXTS))
            delta = torch.zeros_like(x)
            for i, order in orders.items() if step >= 1 else ():
                for text, g in order:
                    direction = says(models.teacher, models, x[i : i + 1], t, [text]) - null[i : i + 1]
                    delta[i] += g * flow.largest(direction, kappa)[0]
            return null, gamma * (own - null) + delta

        def loss_of(draws, models, average):
            k, sigma, x = int(draws.index), grid(STEPS), to_nchw(draws.noise)
            with torch.no_grad():
                for i in range(k):
                    x = x + (sigma[i + 1] - sigma[i]) * sum(guidance(models, x, told(sigma[i]), i))
                null, wanted = guidance(models, x, told(sigma[k]), k)
            u, v = (says(models.student, models, x, told(sigma[k]), texts) for texts in (NOTHING, TEXTS))
            concept = torch.mean((2.5 * (v - u.detach()) - wanted) ** 2)
            return concept + penalty * torch.mean((u - null) ** 2)

        assert_five_updates(w, method, inputs, [points(k) for k in DRAWN], loss_of)


@pytest.mark.parametrize("objective", ["model", "noise"])
def test_ablating(objective):
    """The noise-based target is the velocity n - x0, and t is drawn among the training noise levels."""
    w, weight = small("float64"), 0.25
    w, texts = recorded(w._replace(network=precise(w.network)))
    with exactly("float64"):
        studio = Studio("float64")
        checkpoint = tools(w, schedule=SCHEDULE, sample=studio.sample, to_latents=studio.to_latents)
        settings = Ablating(objective=objective, detach_bos=False, **OBJECT | {"prior_weight": weight})
        method, inputs = settings.make(checkpoint, (CAT, ROBOT))
        rows, keys = rows_of(texts, (CAT, ROBOT)), jax.random.split(jax.random.key(3), 10).reshape(5, 2)
        draw = jax.jit(method.draw, static_argnums=3)
        drawn = [draw(0, own[0], own, SHAPE, inputs) for own in keys]
        assert all(isinstance(draws, ablating.Draws) and draws.t.dtype == jnp.float32 for draws in drawn)
        levels = told(flow.TRAINED)
        assert all(np.isin(np.asarray(t), levels).all() for draws in drawn for t in (draws.t, draws.prior[1]))

        def term(concept, image, t, noise, captions):
            where = np.asarray(inputs.image)[concept, image]
            x0, mask = (to_nchw(np.asarray(a)[where]) for a in (inputs.latents, inputs.masks))
            noise = to_nchw(noise)
            return noised(x0, noise, t), t, [rows[int(i)] for i in captions], noise - x0, mask

        def masked(models, x, t, texts, target, mask):
            squares = mask * (says(models.student, models, x, t, texts) - target) ** 2
            return torch.mean(squares.sum([1, 2, 3]) / (4 * mask.sum([1, 2, 3])))

        def loss_of(draws, models, average):
            concept, image = np.asarray(draws.concept), np.asarray(draws.image)
            caption = np.asarray(inputs.target)[concept, image, np.asarray(draws.caption)]
            x, t, own, target, mask = term(concept, image, np.asarray(draws.t), draws.noise, caption)
            anchors = [rows[int(i)] for i in np.asarray(inputs.anchor)[concept, image]]
            if objective == "model":
                with torch.no_grad():
                    target = says(models.student, models, x, t, anchors)
            again, level, noise = map(np.asarray, draws.prior)
            captions = np.asarray(inputs.anchor)[concept, again]
            prior = masked(models, *term(concept, again, level, noise, captions))
            return masked(models, x, t, own, target, mask) + weight * prior

        assert_five_updates(w, method, inputs, drawn, loss_of)


def test_preserved_prompts_and_images():
    """Beside ESD: trajectories of the base in one run, noised images and the empty prompt in another."""
    w, concepts = toy(), [Concept("a cat", preserve=("a dog", "a horse"))]
    kept = concepts[0].preserve
    with exactly("float64"):
        studio = Studio("float64")
        checkpoint = tools(w, schedule=SCHEDULE, sample=studio.sample, to_latents=studio.to_latents)
        for settings in (Retention(0.25), Retention(0.25, images=1, empty=0.5)):
            alone = ESD(**ESD_FLOW).make(checkpoint, concepts)
            method, inputs = retaining(*alone, checkpoint, concepts, settings)
            keys = jax.random.split(jax.random.key(1), 4)
            draws = jax.jit(method.draw, static_argnums=3)(0, keys[0], keys, SHAPE, inputs)
            prepare = jax.jit(lambda method, draws, inputs: method.prepare(Models(w.student, w.teacher), draws, inputs),
                              static_argnums=0)  # fmt: skip
            actual = jax.jit(method.loss)(w.student, prepare(method, draws, inputs))
            own = prepare(alone[0], draws.inner, alone[1])
            expected = float(alone[0].loss(w.student, own))

            def distance(x, t, texts):
                with torch.no_grad():
                    student, teacher = (
                        says(network, w.models, x, t, texts) for network in (w.models.student, w.models.teacher)
                    )
                return float(torch.mean((student - teacher) ** 2))

            if settings.images:
                latents, (term,) = np.asarray(inputs.terms[0].images), draws.terms
                drawn, empty = term.at, np.asarray(term.empty)
                assert np.isin(np.asarray(drawn.t), told(flow.TRAINED)).all() and set(empty.tolist()) == {True, False}
                prompt, image = np.asarray(drawn.prompt), np.asarray(drawn.image)
                x = noised(to_nchw(latents[prompt, image]), to_nchw(drawn.noise), np.asarray(drawn.t))
                texts = ["" if none else kept[i] for none, i in zip(empty, prompt, strict=True)]
                expected += 0.75 * distance(x, drawn.t, texts)
            else:
                k, texts = int(draws.kept.index), [kept[int(i)] for i in draws.kept.concept]
                x = flow.sampled(guided(w.models.teacher, w.models, texts, 3.0), to_nchw(draws.kept.noise), k, 20)
                expected += 0.25 * distance(x, told(grid(20)[k]), texts)
            assert float(actual) == pytest.approx(expected, rel=1e-7)


def test_training_timesteps_are_noise_levels():
    """Under the static shift, and of a size's own shift on top; a plain schedule has its timesteps themselves."""
    index = jnp.asarray([0, 499, 999])
    np.testing.assert_array_equal(SCHEDULE.timestep(index), told(flow.TRAINED[[0, 499, 999]]))
    dynamic = FlowSchedule.from_config({"_class_name": CLASS, "use_dynamic_shifting": True}, even=True)
    np.testing.assert_array_equal(dynamic.timestep(index), np.float32([1, 500, 1000]))  # the size is not known
    shift = np.exp(1.15)
    sized = 1000 * shift * 0.5 / (1 + (shift - 1) * 0.5)
    np.testing.assert_allclose(dynamic.at(4096).timestep(index)[1], sized, rtol=1e-6)
    plain = tools(world("toy", "float32")).schedule
    assert plain.timestep(index) is index


def test_samplers_of_another_path_are_refused():
    w = world("toy", "float32")
    for settings in (ESD(timestep_mode="grid"), ESD(**ESD_FLOW | {"timestep_mode": "compvis"})):
        with pytest.raises(ValueError, match=one_line("flow_euler")):
            settings.make(tools(w, schedule=SCHEDULE), CONCEPTS)
