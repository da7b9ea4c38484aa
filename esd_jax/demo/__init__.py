"""The embedded models: a small Stable Diffusion of emoji, and a rectified flow; what they know, and a classifier.

`MODEL` is its diffusers folder (`esd_jax.load("emoji")` loads it), with a model card in its README.md. 44 objects in 8
styles, 64 x 64 px, trained by `launch/pretrain_demo.py` on the artwork in `artwork.png`.

`FLOW` is a folder of the layout of FLUX.1 (`esd_jax.load("emoji-flow")`), trained by `launch/pretrain_flow.py` on the
same artwork, with the VAE and CLIP of the first.
"""

from pathlib import Path

MODEL, FLOW = (Path(__file__).parent / name for name in ("model", "flow"))
NAMES = ("emoji", "emoji-flow")  # by which they are loaded
