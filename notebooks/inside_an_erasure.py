# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside an erasure
#
# What does training change, and where? This notebook looks at the weights, at cross- and self-attention, and at the
# states and targets of the training itself. The model is the small one in the package.

# %% tags=["parameters"]
steps = 250  # of training, of each erasure

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import esd_jax
from esd_jax import sampling
from esd_jax.demo import groups, testbed
from esd_jax.diffusion import samplers, schedule
from esd_jax.evaluation import gather, layers
from esd_jax.models.attention import Attention

base = esd_jax.load("emoji")
recipe = {"config": "emoji_object", "steps": steps, "log_every": steps}
models = {
    "base": base,
    "ESD-x": esd_jax.erase(base, "a cat", subset="esd-x", learning_rate=2e-4, **recipe),
    "ESD-u": esd_jax.erase(base, "a cat", **recipe),
}

# %% [markdown]
# ## Two kinds of erasure
#
# Both learn the same target (*Erasing Concepts from Diffusion Models*, [2303.07345](https://arxiv.org/abs/2303.07345)):
# the network's prediction for the concept should become
#
# $$\epsilon_{null} - \eta\,(\epsilon_c - \epsilon_{null}),$$
#
# the base's predictions, guided away from the concept $c$. ESD-x trains the cross-attention, through which the prompt
# enters; ESD-u trains everything else, so that it also affects prompts that *imply* the concept without naming it.
# Below are a prompt that names a cat, one that implies it, and an unrelated one, from the same noise. Of forty images
# of "a pet" these are some in which the embedded classifier detects a cat.

# %%
named, implied, other = "a cat in cartoon style", "a pet in cartoon style", "a rose in cartoon style"
prompts = [named, implied, other]
pets = esd_jax.sample(base, [implied] * 40, seed=list(range(40)), steps=20, guidance_scale=3.0)
shows_cat = testbed.probed(groups.parse_target("a cat"))(pets)
seeds = [int(seed) for seed in np.flatnonzero(shows_cat)[:3]]
columns = [(prompt, seed) for prompt in prompts for seed in seeds]
how = {"seed": [seed for _, seed in columns], "steps": 20, "guidance_scale": 3.0}
drawn = {name: esd_jax.sample(model, [prompt for prompt, _ in columns], **how) for name, model in models.items()}
esd_jax.grid(drawn, captions=[f'"{prompt.split(" in ")[0]}"' for prompt, _ in columns])

# %% [markdown]
# The paper reports that ESD-x hardly changes prompts that only imply the concept. Is that so here? Below is the share
# of images with a cat, among the seeds that give one for "a pet" before, and the similarity of each prompt to the one
# that names the cat: the cosine of their text embeddings, after subtracting that of the empty prompt.

# %%
sees = testbed.probed(groups.parse_target("a cat"))
all_seeds = [int(seed) for seed in np.flatnonzero(shows_cat)]
told = np.asarray(base.encode_prompts(["", *prompts]).embeddings).reshape(4, -1)
told = told[1:] - told[0]
told /= np.linalg.norm(told, axis=1, keepdims=True)
print(f"{'':26}likeness  {'   '.join(models)}")
for prompt, likeness in zip(prompts[:2], told @ told[0], strict=False):
    options = {"seed": all_seeds, "steps": 20, "guidance_scale": 3.0}
    rates = [np.mean(sees(esd_jax.sample(m, [prompt] * len(all_seeds), **options))) for m in models.values()]
    print(f"{prompt:26}{likeness:8.2f}  {'    '.join(f'{rate:4.0%}' for rate in rates)}")
rose = told[2] @ told[0]
print(f"{other:26}{rose:8.2f}")

# %% [markdown]
# In this model the text embeddings of a pet and a cat are nearly the same, since its captions are few: what the
# cross-attention learns for one, it learns for the other. A text encoder trained on the web separates them better.
#
# ## What changed in the weights
#
# The change of each kind of layer, relative to the norm of its weights, from the input (down 0) to the output (up 2).
# The two erasures have no trained tensor in common.

# %%
kinds = {"attn1": "self-attention", "attn2": "cross-attention", "ff": "feed-forward", "resnet": "resnet"}
blocks = [*(f"down {i}" for i in range(3)), "mid", *(f"up {i}" for i in range(3))]
shares = {}
for name in ("ESD-x", "ESD-u"):
    found = {}
    for tensor, change in gather.weight_changes(models[name]).items():
        where = layers.place(tensor)
        found.setdefault((where.family, where.block), []).append(100 * change)
    shares[name] = np.array([[np.mean(found.get((kind, block), [np.nan])) for block in blocks] for kind in kinds])
highest = max(np.nanmax(values) for values in shares.values())
figure, axes = plt.subplots(1, 2, figsize=(11, 2.6), sharey=True, layout="constrained")
for axis, (name, values) in zip(axes, shares.items(), strict=True):
    shown = axis.imshow(values, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value > 0.6 * highest else "black"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(blocks)), blocks, fontsize=8)
    axis.set_yticks(range(len(kinds)), list(kinds.values()))
    axis.set_title(name)
figure.colorbar(shown, ax=axes, label="mean change, %")
plt.show()

# %% [markdown]
# ## Attention to the words
#
# In cross-attention each pixel attends to each token of the prompt. These are the maps of the token that names the
# animal, at 8 x 8 pixels, averaged over heads, layers and sampling steps. They are read through the same interface
# through which methods edit them.

# %%
sampler = samplers.make_sampler(base.schedule, "ddim", 20)
unet = base.network("unet")
finest = [n.removesuffix(".to_q.weight") for n in unet.shapes if "_blocks.1." in n and n.endswith("to_q.weight")]
capture = tuple(sorted(finest))


@jax.jit
def look(params, x, t, told):
    """What the UNet says, and its maps."""
    return unet.apply(params, x, t, told, attention=Attention(capture=capture))


@partial(jax.jit, static_argnums=0)
def go_on(i, carry, guided):
    return sampler.step(carry, i, guided, None)


def told_of(model, prompt):
    """The empty prompt and a prompt, encoded."""
    return model.encode_prompts(["", prompt])


def draw(model, prompt, seed=seeds[0], scale=3.0):
    """An image, and of each step: x_t, and the maps of the prompt's half."""
    told, states, maps = told_of(model, prompt), [], []
    carry = sampler.init(sampling.initial_noise(model, sampling.example_keys([seed], 1), (64, 64)))
    for i, t in enumerate(sampler.timesteps):
        states.append(carry[0])
        (null, cond), found = look(model.params["unet"], jnp.concatenate([carry[0]] * 2), float(t), told)
        maps.append({name: np.asarray(value[1].mean(axis=0)) for name, value in found.items()})
        carry = go_on(i, carry, (null + scale * (cond - null))[None])
    return carry[0], states, maps


def picture(latents):
    """Latents as an image, 0 to 1."""
    return np.clip(np.asarray(base.decode(latents)[0]) / 2 + 0.5, 0, 1)


def mean_map(maps, kind):
    """The mean over steps and layers of one kind, [queries, keys]."""
    return np.mean([value for step in maps for name, value in step.items() if name.endswith(kind)], axis=0)


courses = {(name, prompt): draw(model, prompt) for name, model in models.items() for prompt in (named, implied)}

# %%
WORD = 2  # start, "a", and then the animal
words = {key: mean_map(maps, "attn2")[:, WORD].reshape(8, 8) for key, (_, _, maps) in courses.items()}
highest = max(value.max() for value in words.values())
figure, axes = plt.subplots(2, 6, figsize=(11, 4), layout="constrained")
for line, prompt in zip(axes, (named, implied), strict=True):
    for i, name in enumerate(models):
        image = picture(courses[name, prompt][0])
        line[2 * i].imshow(image)
        shown = line[2 * i + 1].imshow(words[name, prompt], cmap="magma", vmin=0, vmax=highest)
        line[2 * i].set_title(name, fontsize=10)
        line[2 * i + 1].set_title(f'"{prompt.split()[1]}"', fontsize=10)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, label="attention to the word")
plt.show()

# %% [markdown]
# ## Attention between pixels
#
# Self-attention connects the parts of an image. The white circle marks a pixel in the middle; the brighter another
# pixel is, the more the first attends to it.

# %%
QUERY = (4, 4)
own = {key: mean_map(maps, "attn1")[QUERY[0] * 8 + QUERY[1]].reshape(8, 8) for key, (_, _, maps) in courses.items()}
highest = max(value.max() for value in own.values())
figure, axes = plt.subplots(1, 6, figsize=(11, 2.3), layout="constrained")
for i, name in enumerate(models):
    axes[2 * i].imshow(picture(courses[name, named][0]))
    shown = axes[2 * i + 1].imshow(own[name, named], cmap="magma", vmin=0, vmax=highest)
    axes[2 * i + 1].plot(QUERY[1], QUERY[0], "o", mfc="none", mec="white", ms=9)
    axes[2 * i].set_title(name, fontsize=10)
for axis in axes:
    axis.set(xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, label="attention")
plt.show()

# %% [markdown]
# ## What it is trained on
#
# A training step samples the concept part of the way, up to some $x_t$, and compares the student's prediction there
# with the target. Each picture below is the whole image that a prediction at $x_t$ implies,
# $\hat x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\epsilon) / \sqrt{\bar\alpha_t}$. Early, where noise dominates, the prompt
# determines the image; late, it has little influence.

# %%
eta = 2.0
at = [0, 2, 5, 9, 14, 18]  # steps of the 20
concept = "a cat"
_, states, _ = draw(base, concept)
says = jax.jit(unet.apply)


def implied_image(step, eps):
    """The image that a prediction implies."""
    alpha_bar = base.schedule.alpha_bar[int(sampler.timesteps[step])]
    return picture(schedule.to_x0_eps("epsilon", alpha_bar, states[step], eps)[0])


def of_concept(model, step):
    """What a model says of x_t: told nothing, and told of the concept."""
    x, t = jnp.concatenate([states[step]] * 2), float(sampler.timesteps[step])
    null, cond = says(model.params["unet"], x, t, told_of(model, concept))
    return null[None], cond[None]


rows = {"told nothing": [], 'told "a cat"': [], "target": []} | {name: [] for name in list(models)[1:]}
distance = {name: [] for name in models}
for step in range(20):
    null, cond = of_concept(base, step)
    target = null - eta * (cond - null)
    after = {name: of_concept(model, step)[1] for name, model in models.items()}
    for name, eps in after.items():
        distance[name].append(float(jnp.mean((eps - target) ** 2)))
    if step in at:
        parts = [null, cond, target, *(after[name] for name in list(models)[1:])]
        for images, eps in zip(rows.values(), parts, strict=True):
            images.append(implied_image(step, eps))
esd_jax.grid(rows, captions=[f"t = {int(sampler.timesteps[step])}" for step in at])

# %% [markdown]
# The distance of each model's prediction from the target: training reduces it at the timesteps where the concept
# emerges from noise. The base, at the top, shows the distance before training.

# %%
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
for (name, values), style in zip(distance.items(), ("k--", "C0-", "C1-"), strict=True):
    axis.plot(sampler.timesteps, values, style, marker="o", ms=3, label=name)
axis.set(xlabel="timestep t (noise on the right)", ylabel="mean squared distance", yscale="log")
axis.set_title('from the target, told "a cat"', fontsize=10)
axis.grid(alpha=0.2)
axis.legend(frameon=False)
plt.show()
