"""Merges adapters into a UNet by LyCORIS's own code: `python lycoris_child.py JOB.json RESULT.npz`.

JOB lists {"folder": of a checkpoint, "file": the adapter, "module": whose weight is given back}.
"""

import json
import sys

import diffusers
import numpy as np
import torch
from lycoris import create_lycoris_from_weights


@torch.no_grad()
def main(job_file, result_file):
    weights = {}
    for number, job in enumerate(json.load(open(job_file))):
        unet = diffusers.UNet2DConditionModel.from_pretrained(f"{job['folder']}/unet")
        network, _ = create_lycoris_from_weights(1.0, job["file"], unet)
        network.merge_to(1.0)
        weights[f"weight_{number}"] = unet.state_dict()[f"{job['module']}.weight"].numpy()
    np.savez(result_file, report=json.dumps({"merged": len(weights)}), **weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
