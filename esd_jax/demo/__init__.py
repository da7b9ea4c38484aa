"""The embedded model: a small Stable Diffusion of emoji, what it knows, and a classifier of its images.

`MODEL` is its diffusers folder (`esd_jax.load("emoji")` loads it), with a model card in its README.md. 44 objects in 8
styles, 64 x 64 px, trained by `launch/pretrain_demo.py` on the artwork in `artwork.png`.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
