"""Runs layers with adapters by LyCORIS's own code, as it trains them: `python lycoris_child.py JOB.json RESULT.npz`.

JOB lists {"folder": of a checkpoint, "file": the adapter, "module": the layer, "input": an .npy of what it is given}.
(Merging is no measure: of LoHa and LoKr LyCORIS 4.1.3 then applies alpha / rank twice.)
"""

import json
import sys

import diffusers
import numpy as np
import torch
from lycoris import create_lycoris_from_weights


@torch.no_grad()
def main(job_file, result_file):
    outputs = {}
    for number, job in enumerate(json.load(open(job_file))):
        unet = diffusers.UNet2DConditionModel.from_pretrained(f"{job['folder']}/unet").eval()
        network, _ = create_lycoris_from_weights(1.0, job["file"], unet)
        network.apply_to()
        network.eval()
        layer = unet.get_submodule(job["module"])
        outputs[f"output_{number}"] = layer(torch.from_numpy(np.load(job["input"]))).numpy()
    np.savez(result_file, report=json.dumps({"layers": len(outputs)}), **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
