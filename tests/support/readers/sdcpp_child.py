"""Samples with stable-diffusion.cpp, and says what it logged: `python sdcpp_child.py JOB.json RESULT.npz`.

JOB has {"file": ..., "loras": a folder, "jobs": [{"prompt": ..., "negative": ..., "seed": ..., "sigmas": [...],
"guidance": ..., "size": ...}, ...]}.
"""

import io
import json
import re
import sys

import numpy as np
from stable_diffusion_cpp import StableDiffusion


def main(job_file, result_file):
    job, log = json.load(open(job_file)), io.StringIO()
    sys.stderr, images, logs = log, {}, []
    model = StableDiffusion(
        model_path=job["file"], lora_model_dir=job["loras"], rng_type="cpu", sampler_rng_type="cpu", n_threads=2,
        wtype="f32", verbose=True,
    )  # fmt: skip
    for number, one in enumerate(job["jobs"]):
        start = log.tell()
        (image,) = model.generate_image(
            prompt=one["prompt"], negative_prompt=one["negative"], width=one["size"], height=one["size"],
            cfg_scale=one["guidance"], sample_method="euler", sample_steps=len(one["sigmas"]) - 1, seed=one["seed"],
            sigmas=",".join(f"{sigma:.9g}" for sigma in one["sigmas"]),
        )  # fmt: skip
        images[f"image_{number}"] = np.asarray(image.convert("RGB"), np.uint8)
        logs.append(log.getvalue()[start:])
    sys.stderr = sys.__stderr__
    report = {
        # Tensors that the network has and the file lacks, or the other way round.
        "faults": [line for line in log.getvalue().splitlines() if "unknown tensor" in line or "not in model" in line],
        # Of each image's LoRAs: how many of their tensors found a place.
        "applied": [
            [[int(a), int(b)] for a, b in re.findall(r"\((\d+) / (\d+)\) LoRA tensors", text)] for text in logs
        ],
    }
    np.savez(result_file, report=json.dumps(report), **images)


if __name__ == "__main__":
    main(*sys.argv[1:])
