"""Files of adapters of other kinds than LoRA, and what each kind means."""

import numpy as np
import safetensors.numpy
import safetensors.torch

from esd_jax.io import safetensors as st
from esd_jax.io.diffusers import read_exact


def of_torch(pipeline, name):
    """A UNet tensor at full precision, in torch layout."""
    value = np.asarray(read_exact(pipeline, [f"unet/{name}"])[f"unet/{name}"])
    return st.to_file(value, pipeline.network("unet").layouts[name])


def loha(factors):
    product = (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    return 2 / 4 * product


CONV, MATRIX = "mid_block.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"


def arrays(**shapes):
    rng = np.random.default_rng(0)
    return {name: (rng.normal(size=shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def core(a, b, t):
    """LyCORIS's `rebuild_tucker`, in words of its own: out[o, i, ...] = sum_mn t[m, n, ...] a[m, o] b[n, i]."""
    return np.tensordot(a, np.tensordot(t, b, ([1], [0])), ([0], [0])).transpose(0, 3, 1, 2)


def save(tmp_path, module, factors, alpha=2.0, prefix="lora_unet_"):
    key = prefix + module.replace(".", "_")
    file = {f"{key}.{name}": value for name, value in factors.items()}
    if alpha is not None:
        file[f"{key}.alpha"] = np.asarray(alpha, np.float32)
    safetensors.numpy.save_file(file, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


CONVOLUTIONS = {
    "LoRA with a core": (
        {"lora_up.weight": (64, 4, 1, 1), "lora_down.weight": (4, 64, 1, 1), "lora_mid.weight": (4, 4, 3, 3)},
        lambda f: 2 / 4 * core(f["lora_up.weight"][..., 0, 0].T, f["lora_down.weight"][..., 0, 0],
                               f["lora_mid.weight"]),
    ),
    "LoHa": (
        {"hada_w1_a": (64, 4), "hada_w1_b": (4, 576), "hada_w2_a": (64, 4), "hada_w2_b": (4, 576)},
        lambda f: loha(f).reshape(64, 64, 3, 3),
    ),
    "LoHa with cores": (
        {"hada_w1_a": (4, 64), "hada_w1_b": (4, 64), "hada_w2_a": (4, 64), "hada_w2_b": (4, 64),
         "hada_t1": (4, 4, 3, 3), "hada_t2": (4, 4, 3, 3)},
        lambda f: 2 / 4 * core(f["hada_w1_a"], f["hada_w1_b"], f["hada_t1"])
        * core(f["hada_w2_a"], f["hada_w2_b"], f["hada_t2"]),
    ),
    "LoKr": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 144)},
        lambda f: 2 / 2 * np.kron(f["lokr_w1"][:, :, None, None],
                                  (f["lokr_w2_a"] @ f["lokr_w2_b"]).reshape(16, 16, 3, 3)),
    ),
    "LoKr with a core": (
        {"lokr_w1_a": (8, 1), "lokr_w1_b": (1, 8), "lokr_w2_a": (1, 8), "lokr_w2_b": (1, 8), "lokr_t2": (1, 1, 3, 3)},
        lambda f: 2 / 1 * np.kron((f["lokr_w1_a"] @ f["lokr_w1_b"])[:, :, None, None],
                                  core(f["lokr_w2_a"], f["lokr_w2_b"], f["lokr_t2"])),
    ),
    "a whole difference": ({"diff": (64, 64, 3, 3)}, lambda f: f["diff"]),
}  # fmt: skip
