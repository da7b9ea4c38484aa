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
# # Quickstart: a model forgets a style
#
# The package carries a small Stable Diffusion that draws 44 emoji in eight styles. Here it forgets one of them, on a
# laptop's CPU, in about two minutes. A real checkpoint goes the same way: give its folder or hub id in place of
# "emoji".

# %% tags=["parameters"]
concept = "neon style"
steps = 300  # of training
images = 24  # of each group that is measured

# %%
import tempfile
from pathlib import Path

import esd_jax

folder = Path(tempfile.mkdtemp())
base = esd_jax.load("emoji")

# %% [markdown]
# ## What it draws
#
# An image depends on its prompt and its seed alone.

# %%
prompts = ["a cat in neon style", "a rocket in neon style", "a cat in ink style", "a house in clay style", "a pizza"]
how = {"seed": [0] * len(prompts), "steps": 20, "guidance_scale": 3.0}
before = esd_jax.sample(base, prompts, **how)
esd_jax.grid({"base": before}, captions=prompts)

# %% [markdown]
# ## Erase
#
# `erase` takes any field of a recipe: `method=`, `subset=`, `learning_rate=`, `eta=`, ... With `output_dir` the run is
# kept: log, checkpoints, previews, the erased model as a diffusers folder, and a small file with what changed.

# %%
erased = esd_jax.erase(
    base, concept, steps=steps, output_dir=folder / "run", preview_every=max(1, steps // 4), log_every=steps
)

# %%
after = esd_jax.sample(erased, prompts, **how)
esd_jax.grid({"base": before, "erased": after}, captions=prompts)

# %% [markdown]
# In these pictures the style is gone, while the objects and the other styles stay. And in others? The package carries a
# classifier that tells what such pictures show, and when they show nothing it knows.
#
# ## Measure
#
# Both models draw the same prompts from the same noise. In brackets: 95% intervals.

# %%
esd_jax.evaluate(base, erased, "quick", output_dir=folder / "run" / "evidence", images=images)

# %% [markdown]
# ## Take it along
#
# `export` writes what diffusers opens: only the tensors that were trained differ from the base, all others are the same
# bytes. The report puts all that is known on one page.

# %%
esd_jax.export(erased, folder / "emoji-without-neon")
print("report:", esd_jax.report(folder / "run").name)
print(*sorted(path.name for path in (folder / "emoji-without-neon").iterdir()), sep="\n")
