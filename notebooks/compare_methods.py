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
# There are many ways to take a concept out of a model. Here some of them take the same style out of the embedded model,
# draw the same prompts from the same noise, and are judged by the same classifier. It takes a few minutes on a CPU.

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
# concept $c$, what the unmodified network $\epsilon^*$ would predict if it were guided *away* from it:
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
# It is solved in closed form. [RECE](https://arxiv.org/abs/2407.12383) repeats it: it looks for the vectors that the
# edited weights still take for the concept, and edits these away, too.
#
# **Guiding.** The weights stay. A negative prompt puts the concept $c$ in the place of $\varnothing$ in classifier-free
# guidance with the prompt $p$. [Safe Latent Diffusion](https://arxiv.org/abs/2211.05105) (SLD) adds a term
# $\gamma \approx \mu\,[\epsilon(x_t, c) - \epsilon(x_t, \varnothing)]$, with $\mu$ above 0 only where the image is
# heading for the concept:
#
# $$\epsilon = \epsilon(x_t, \varnothing) + s\,\bigl[\epsilon(x_t, p) - \epsilon(x_t, \varnothing) - \gamma\bigr]$$
#
# Guidance needs no time beforehand, but SLD evaluates the network half as often again while it draws; and who has the
# weights can leave it out.

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
# ## Draw and judge
#
# Two groups of prompts: the concept's own, which name it beside every object, and others, which have nothing to do with
# it. The row "seed" is the base again, from other noise: it shows what chance does. The pictures are the first four of
# each group, the concept's own on the left, whatever came out.

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
# - *target seen*: how often the classifier sees the style where a prompt asks for it. It should fall.
# - *others kept*: how often other prompts still give what they ask for; of object and style, what suffers more.
# - *unrecognisable*: how often the concept's own prompts give nothing that the classifier knows. An erasure may reach a
#   low target rate this way, too.
# - *SSIM*: how alike the images of other prompts are to the base's from the same noise; 1 is equal.


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
# Brackets and bars hold 95% intervals. With so few images, differences of some points mean nothing.

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
# - A negative prompt barely touches the style, though it is the first thing that one would try. It draws by
#   $\epsilon(x_t, c) + s\,[\epsilon(x_t, p) - \epsilon(x_t, c)]$: of a prompt $p$ that asks for the style, the
#   difference holds the rest, and the first term the style. SLD at medium strength waits for ten steps, which is half
#   of them here, and by then the picture is settled. At its highest strength it works, and changes other pictures most.
# - The three that edit weights take the style out of most of its pictures and leave the others close to what they
#   were. They differ in what comes in its place. UCE and RECE were told: a drawing, of any style. ESD was not, and a
#   part of its pictures shows nothing that the classifier knows.
# - UCE and RECE need seconds where training needs a minute or more. Whether what they removed is out of reach is
#   another question: see the notebook `attack_and_defend`.
#
# All this is one style of one small model, and the order may change with another: try `concept = "pop art style"`.
# Larger tables, with objects, lists of concepts and controls, come from
# `python -m launch.experiments.compare_methods`.
