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
# # Quickstart: erase a style
#
# The package contains a small Stable Diffusion that generates 44 emoji in eight styles. This notebook erases one of the
# styles on a laptop's CPU in about two minutes. A real checkpoint works the same way: give its folder or hub id instead
# of "emoji".

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
# ## What it generates
#
# An image depends only on its prompt and its seed.

# %%
prompts = ["a cat in neon style", "a rocket in neon style", "a cat in ink style", "a house in clay style", "a pizza"]
how = {"seed": [0] * len(prompts), "steps": 20, "guidance_scale": 3.0}
before = esd_jax.sample(base, prompts, **how)
esd_jax.grid({"base": before}, captions=prompts)

# %% [markdown]
# ## Erase
#
# `erase` takes any field of a recipe: `method=`, `subset=`, `learning_rate=`, `eta=`, ... With `output_dir` it writes
# the run to a folder: log, checkpoints, previews, the erased model as a diffusers folder, and a small file of the
# changed tensors.

# %%
erased = esd_jax.erase(
    base, concept, steps=steps, output_dir=folder / "run", preview_every=max(1, steps // 4), log_every=steps
)

# %%
after = esd_jax.sample(erased, prompts, **how)
esd_jax.grid({"base": before, "erased": after}, captions=prompts)

# %% [markdown]
# In these images the style is gone, while the objects and the other styles are preserved. What about other images? The
# package contains a classifier that recognises the object and the style of an image, and images that show neither.
#
# ## Measure
#
# Both models generate the same prompts from the same noise. Brackets hold 95% intervals.

# %%
esd_jax.evaluate(base, erased, "quick", output_dir=folder / "run" / "evidence", images=images)

# %% [markdown]
# ## Export
#
# `export` writes a folder that diffusers opens: only the trained tensors differ from the base, all others are the same
# bytes. The report puts images and measurements on one page.

# %%
esd_jax.export(erased, folder / "emoji-without-neon")
print("report:", esd_jax.report(folder / "run").name)
print(*sorted(path.name for path in (folder / "emoji-without-neon").iterdir()), sep="\n")
