"""The file formats beside the diffusers folder, read and written: deltas, differences, LoRAs, embeddings, single files.

    from esd_jax import formats, load

    base = formats.merge_lora(load("stable-diffusion-v1-4"), "style.safetensors", strength=0.8)
    base = formats.add_embedding(base, "toy.safetensors", "<toy>")
    erased = formats.load_delta(base, "esd-Van_Gogh-from-Van_Gogh-esdx.safetensors")
    formats.export_all(formats.with_strength(erased, 0.7), "out", ["delta", "lora"], rank=4, verify=True)

`FORMATS` names what `esd_jax.export(..., format=)` writes; `opened` reads any of it.
"""

from esd_jax.api import opened
from esd_jax.exports import FORMATS, Format, Written, export_all
from esd_jax.io.delta import export_delta, load_delta
from esd_jax.io.difference import apply_difference, export_difference
from esd_jax.io.embeddings import add_embedding
from esd_jax.io.exact import with_strength
from esd_jax.io.lora import export_lora
from esd_jax.io.lora_merge import merge_lora
from esd_jax.io.merge import Conflicts, merge
from esd_jax.io.single_file import export_single

__all__ = [
    "FORMATS",
    "Conflicts",
    "Format",
    "Written",
    "add_embedding",
    "apply_difference",
    "export_all",
    "export_delta",
    "export_difference",
    "export_lora",
    "export_single",
    "load_delta",
    "merge",
    "merge_lora",
    "opened",
    "with_strength",
]
