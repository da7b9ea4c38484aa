"""Reading a checkpoint of full size must not need the memory of its files beside that of its arrays."""

import os
import subprocess
import sys

import pytest

# The UNet of Stable Diffusion 1.4, 860 million scalars: 3.4 GB as float32, 1.7 GB as bfloat16.
CONFIG = "UNetConfig(sample_size=64, cross_attention_dim=768)"

WRITE = f"""
import sys
from pathlib import Path
import numpy as np
from esd_jax.io import safetensors as st
from esd_jax.models.unet_config import UNetConfig
from esd_jax.pipeline import network

net = network({CONFIG}, "bfloat16")
block = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
specs = {{name: ("F32", st.file_shape(s.shape, net.layouts[name])) for name, s in net.shapes.items()}}
entries = st.lay_out(specs)
folder = Path(sys.argv[1]) / "unet"
folder.mkdir()
st.write(
    folder / "diffusion_pytorch_model.safetensors", entries, lambda name: np.resize(block, entries[name].shape)
)
"""

READ = f"""
import sys, threading, time
from pathlib import Path
import jax
import jax.numpy as jnp

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.005)

start = resident()
threading.Thread(target=watch, daemon=True).start()
from esd_jax.io.diffusers import load_component
from esd_jax.models.unet_config import UNetConfig

began = time.time()
params, _, _ = load_component(Path(sys.argv[1]), "unet", {CONFIG}, dtype=jnp.bfloat16)
jax.block_until_ready(params)
seconds = time.time() - began
time.sleep(0.05)
size = sum(array.nbytes for array in params.values())
print(size, peak - start, seconds, params["conv_in.bias"][0])
"""


def run(script: str, folder) -> str:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads RssAnon from /proc")
def test_reading_a_unet_of_full_size(tmp_path):
    run(WRITE, tmp_path)
    size, peak, seconds, first = map(float, run(READ, tmp_path).split())
    assert size == 859_520_964 * 2 and first != 0
    print(f"peak {peak / 1e9:.2f} GB for {size / 1e9:.2f} GB of bfloat16 ({peak / size:.2f} x), {seconds:.1f} s")
    assert peak <= 1.3 * size, f"peak {peak / size:.2f} x the arrays' own size"
