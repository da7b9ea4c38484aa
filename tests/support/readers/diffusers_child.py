"""Opens checkpoints and LoRAs in whichever diffusers and transformers are on the path, and says what it saw.

Run by `other_programs.run` as `python diffusers_child.py JOB.json RESULT.npz`; JOB lists what to open, in turn:
{"folder": ..., "file": a single file or null, "lora": ... or null, "prompts": [...], "latents": an .npy}.
"""

import json
import logging
import sys
import warnings

import diffusers
import numpy as np
import torch
import transformers

warnings.simplefilter("ignore")
torch.set_num_threads(1)
said: list[str] = []  # what the libraries warned of


class Kept(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_warning()
    logging.getLogger(library.__name__).addHandler(Kept(logging.WARNING))
diffusers.utils.logging.disable_progress_bar()


def names(component, info):
    """What a component lacks, and what its file has beside it. A buffer of positions is no weight."""
    problems = [*info["missing_keys"], *info["unexpected_keys"]]
    return [f"{component}: {name}" for name in problems if not name.endswith("position_ids")]


def opened(job):
    """(the pipeline, tensors missing from or unexpected in its files)."""
    folder, faults = job["folder"], []
    index = json.load(open(f"{folder}/model_index.json"))
    kind = getattr(diffusers, index["_class_name"])
    if job.get("file"):
        pipe = kind.from_single_file(job["file"], config=folder, local_files_only=True)
        whole = kind.from_pretrained(folder)
        for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
            if hasattr(pipe, component):
                ours, theirs = (getattr(p, component).state_dict() for p in (pipe, whole))
                wrong = [k for k in theirs if k not in ours or not torch.equal(ours[k].float(), theirs[k].float())]
                faults += [f"{component}: {name}" for name in wrong if not name.endswith("position_ids")]
        return pipe, faults
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if index.get(component):
            library, name = index[component]
            one = getattr(diffusers if library == "diffusers" else transformers, name)
            _, info = one.from_pretrained(f"{folder}/{component}", output_loading_info=True)
            faults += names(component, info)
    return kind.from_pretrained(folder), faults


def sampled(pipe, job):
    """Images of four DDIM steps from given latents: float32 [n, height, width, 3] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    latents = torch.from_numpy(np.load(job["latents"]))
    pipe.to(torch.float32)
    with torch.no_grad():
        images = pipe(
            job["prompts"], latents=latents, num_inference_steps=4, guidance_scale=3.0, output_type="np"
        ).images
    return np.asarray(images, np.float32)


def main(job_file, result_file):
    results, reports = {}, []
    for number, job in enumerate(json.load(open(job_file))):
        said.clear()
        pipe, faults = opened(job)
        if job.get("lora"):
            folder, _, name = job["lora"].rpartition("/")
            pipe.load_lora_weights(folder, weight_name=name)
        results[f"images_{number}"] = sampled(pipe, job)
        lost = [text for text in said if "LoRA" in text or "adapter" in text or "not initialized" in text]
        reports.append({"faults": faults, "said": lost})
    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    np.savez(result_file, report=json.dumps({"versions": versions, "jobs": reports}), **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
