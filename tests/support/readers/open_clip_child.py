"""Loads a single file's text model into open_clip's own: `python open_clip_child.py JOB.json RESULT.npz`.

JOB has {"file": ..., "prefix": of its keys, "text": open_clip's config of the text model, "projection": its width}.
open_clip imports torchvision for the image half, which is not built here: empty modules stand in for it.
"""

import json
import sys
from unittest.mock import MagicMock

import transformers  # noqa: F401  (it would ask what torchvision is)

for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
    sys.modules.setdefault(f"torchvision{name}", MagicMock())

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import safetensors.torch  # noqa: E402


def main(job_file, result_file):
    job = json.load(open(job_file))
    vision = {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 8}
    model = open_clip.model.CLIP(job["projection"], vision, job["text"])
    del model.visual
    prefix = job["prefix"]
    file = safetensors.torch.load_file(job["file"])
    tensors = {key.removeprefix(prefix): value for key, value in file.items() if key.startswith(prefix)}
    loaded = model.load_state_dict(tensors, strict=False)
    report = {"missing": loaded.missing_keys, "unexpected": loaded.unexpected_keys, "tensors": len(tensors)}
    np.savez(result_file, report=json.dumps({**report, "version": open_clip.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
