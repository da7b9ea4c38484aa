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
# # Methods side by side
#
# This notebook erases the same style from the embedded model by several methods. All of them generate the same prompts
# from the same noise, and the same classifier evaluates the images. It takes a few minutes on a CPU.

# %% tags=["parameters"]
concept = "neon style"
# Also: "emoji_all_but_one", "emoji_sdd", "emoji_ablating", "emoji_forget_me_not". For an object, add "_object" to each.
methods = ["emoji", "emoji_uce", "emoji_rece"]
guidance = ["negative prompt", "SLD medium", "SLD max"]  # of the base, without training
steps = None  # of training; None leaves each method its own
images = 40  # of each group that is measured

# %% [markdown]
# ## What they do
#
# **Training.** [ESD](https://arxiv.org/abs/2303.07345) teaches the network $\epsilon_\theta$ to predict, for the
# concept $c$, what the unmodified network $\epsilon^*$ would predict if it were guided *away* from $c$:
#
# $$\epsilon_\theta(x_t, c) \;\leftarrow\; \epsilon^*(x_t, \varnothing) -
# \eta\,\bigl[\epsilon^*(x_t, c) - \epsilon^*(x_t, \varnothing)\bigr]$$
#
# **Solving.** [UCE](https://arxiv.org/abs/2308.14761) edits only the keys and values $W$ of cross-attention, so that
# the concept's token vectors $c_i$ give what another text's vectors $c_i^*$ gave, here those of "a drawing":
#
# $$W = \arg\min_W \sum_i \lVert W c_i - W_0 c_i^* \rVert^2 + \lambda \lVert W - W_0 \rVert^2
# + \text{(what is preserved)}$$
#
# It has a closed-form solution. [RECE](https://arxiv.org/abs/2407.12383) repeats it on the embeddings that still give
# the concept with the edited weights.
#
# **Guiding.** The weights stay the same. A negative prompt replaces $\varnothing$ by the concept $c$ in classifier-free
# guidance with the prompt $p$. [Safe Latent Diffusion](https://arxiv.org/abs/2211.05105) (SLD) adds a term
# $\gamma \approx \mu\,[\epsilon(x_t, c) - \epsilon(x_t, \varnothing)]$, with $\mu$ above 0 only where the image moves
# towards the concept:
#
# $$\epsilon = \epsilon(x_t, \varnothing) + s\,\bigl[\epsilon(x_t, p) - \epsilon(x_t, \varnothing) - \gamma\bigr]$$
#
# Guidance needs no preparation, but SLD evaluates the network half as often again during sampling; and whoever has the
# weights can switch it off.

# %%
import time

import matplotlib.pyplot as plt

import esd_jax
from esd_jax.demo import groups
from esd_jax.demo.measure import BASE, SEED, measure
from esd_jax.evaluation import Table, text
from esd_jax.guidance import SLD

LABELS = {
    "emoji": "ESD", "emoji_uce": "UCE", "emoji_rece": "RECE", "emoji_all_but_one": "All but One", "emoji_sdd": "SDD",
    "emoji_ablating": "Ablating", "emoji_forget_me_not": "Forget-Me-Not",
}  # fmt: skip
base = esd_jax.load("emoji")
target = groups.parse_target(concept)

models, options, seconds = {BASE: base}, {}, {}
for config in methods:
    name = LABELS.get(config.removesuffix("_object"), config)
    solved = config.startswith(("emoji_uce", "emoji_rece"))
    started = time.monotonic()
    models[name] = esd_jax.erase(base, concept, config=config, **({} if solved or steps is None else {"steps": steps}))
    seconds[name] = time.monotonic() - started
for name in guidance:
    models[name], seconds[name] = base, 0.0
    strength = name.removeprefix("SLD ")
    options[name] = {"negative_prompt": concept} if strength == name else {"rule": SLD.preset(strength, concept)}

# %% [markdown]
# ## Generate and evaluate
#
# There are two groups of prompts: target prompts, which name the concept next to every object, and unrelated prompts.
# The row "seed" is the base from other noise, which shows the effect of chance. The images are the first four of each
# group, not selected; target prompts are on the left.

# %%
wanted = [group for group in groups.groups(target) if group.name in ("own", "others")]
galleries = {}
own, others = measure(
    models,
    wanted,
    target,
    num_images=images,
    seed=1,
    control_share=0.5,
    galleries=galleries,
    options=options,
)

# %%
columns = [shot for group in wanted for _, shot in groups.shots(group, min(4, images), seed=1)]
shown = {name: [galleries[name][shot].image for shot in columns] for name in models}
esd_jax.grid(shown, captions=[shot.prompt for shot in columns])

# %% [markdown]
# ## In figures
#
# - *target seen*: the detection rate, the share of images of target prompts in which the classifier finds the style. It
#   should fall.
# - *others kept*: accuracy on unrelated prompts, of object or style, whichever is lower.
# - *unrecognisable*: the share of images of target prompts in which the classifier recognises nothing. An erasure may
#   also reach a low detection rate by damaging images.
# - *SSIM*: similarity of the images of unrelated prompts to the base's from the same noise; 1 is identical.


# %%
def kept(row):
    """Of object and style, what is seen less often."""
    return min((part for part in (row.subject, row.style) if part is not None), key=lambda part: part.value)


found = {row.model: (row.target, kept(other), row.unrecognised, other.ssim)
         for row, other in zip(own.rows, others.rows, strict=True)}  # fmt: skip
headings = ("target seen", "others kept", "unrecognisable", "SSIM", "seconds")
rows = tuple((name, (*values, round(seconds[name], 1) if name in seconds else None)) for name, values in found.items())
print(text.table(Table(f"Erasing {concept}: {images} images a group", headings, rows, percent=headings[:3])))

# %% [markdown]
# Brackets and bars are 95% intervals. With so few images, differences of a few points mean nothing.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharex=True)
colours = dict(zip(models, ["black", *plt.get_cmap("tab10").colors], strict=False))
markers = dict(zip(models, "soD^vPXphd<>", strict=False))


def percent(estimate):
    return 100 * estimate.value, [[100 * (estimate.value - estimate.low)], [100 * (estimate.high - estimate.value)]]


for axis, part, scale in ((axes[0], 1, 100), (axes[1], 3, 1)):
    for name in models:
        if (y := found[name][part]) is None:  # the base's likeness to itself
            continue
        x, x_error = percent(found[name][0])
        y_error = [[scale * (y.value - y.low)], [scale * (y.high - y.value)]]
        axis.errorbar(
            x, scale * y.value, xerr=x_error, yerr=y_error, color=colours[name], marker=markers[name], markersize=9,
            markeredgecolor="white", elinewidth=1, label=name, clip_on=False,
        )  # fmt: skip
    axis.set(xlabel="target seen, %", xlim=(0, 100))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set(ylabel="others kept, %", ylim=(None, 100), title="Does it still draw everything else?")
axes[0].yaxis.set_major_locator(plt.MultipleLocator(5))
chance = found[SEED][3].value
axes[1].set(ylabel="SSIM to the base", ylim=(chance - 0.05, 1), title="Does it still draw the same pictures?")
axes[1].axhline(chance, color="grey", linestyle="--", linewidth=1)
axes[1].text(50, chance, "the base from other noise", color="grey", ha="center", va="bottom", fontsize=9)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
figure.suptitle("The best place is the upper left corner", fontsize=12)
plt.show()

# %% [markdown]
# ## What to make of it
#
# - A negative prompt barely affects the style, although it is the first thing one would try. It samples with
#   $\epsilon(x_t, c) + s\,[\epsilon(x_t, p) - \epsilon(x_t, c)]$: for a prompt $p$ that asks for the style, the first
#   term still contains the style, and the difference only the rest. SLD at medium strength waits for ten steps, half of
#   all steps here, and by then the image is determined. At its highest strength it works, and changes other images
#   most.
# - The three methods that edit weights remove the style from most images of its prompts and leave the others close to
#   the base's. They differ in what replaces it. UCE and RECE have a replacement: a drawing, of any style. ESD has none,
#   and in some of its images the classifier recognises nothing.
# - UCE and RECE need seconds, training a minute or more. Whether the erased concept can be recovered is another
#   question: see the notebook `attack_and_defend`.
#
# All this is one style of one small model, and the order may change with another: try `concept = "pop art style"`.
# `python -m launch.experiments.compare_methods` measures larger tables, with objects, several concepts and controls.
