"""Features for distances between sets of images (FID, KID), and the CLIP score of images and their prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from esd_jax.evaluation.judges import networks
from esd_jax.evaluation.judges.weights import Identity, Images, as_images, optional, sha256


class Distances(NamedTuple):
    """What the distances between such features are called. Only those of Inception-v3 are FID and KID."""

    frechet: str
    kernel: str


NAMES = {
    "inception": Distances("FID", "KID"),
    "efficientnet-lite0": Distances(
        "Fréchet distance on EfficientNet-Lite0 features", "Kernel distance on EfficientNet-Lite0 features"
    ),
}


def features(
    images: Images, model: str = "inception", batch_size: int = 32, device: str = "cpu"
) -> Float[np.ndarray, "n d"]:
    """Pooled features of each image, which may be of any size, for the distances of `esd_jax.metrics.distance`.

    Args:
      images: uint8 RGB.
      model: "inception", 2,048 features with the weights and the resizing of FID; or "efficientnet-lite0", 1,280. What
        the distances are called then is in `NAMES`.
      batch_size: images at a time.
      device: torch's name of it.

    Raises:
      ValueError: bad images or arguments, or the library or its weights are missing.
    """
    return networks.run(_extractor(model, device), "features", images, batch_size)


def features_identity(model: str = "inception") -> Identity:
    """Which network's features they are. Raises ValueError: the library or its weights are missing."""
    identity = _extractor(model, "cpu").identity
    return dataclasses.replace(identity, name=f"features of {identity.name}")


def _extractor(model: str, device: str) -> networks.Network:
    if model not in NAMES:
        raise ValueError(f"model={model!r} gives no features here: choose one of {', '.join(NAMES)}")
    return networks.load(model, device)


def clip_score(
    images: Images,
    prompts: Sequence[str],
    model: str | Path,
    revision: str | None = None,
    batch_size: int = 32,
    device: str = "cpu",
) -> Float[np.ndarray, " n"]:
    """The cosine of each image's and its prompt's embedding (Hessel et al. 2021, without the factor of 2.5).

    Papers print it on several scales: 100 times the cosine, 2.5 times, and ones that nobody explained. This is the
    cosine itself, about 0.3 for a good image by OpenAI's ViT-B/32. It depends on the network, which is to be named.

    Args:
      images: uint8 RGB, of any size.
      prompts: one for each image. Of those that are longer than the network reads (77 tokens), the rest is cut off.
      model: a folder that transformers' CLIPModel and CLIPProcessor were saved in, or its id on the Hugging Face hub.
        Its weights are read from `model.safetensors`.
      revision: a branch, tag or commit of the hub's repository.
      batch_size: images at a time.
      device: torch's name of it.

    Raises:
      ValueError: bad images or arguments, or the model cannot be loaded.
    """
    images = as_images(images)
    if len(images) != len(prompts):
        raise ValueError(f"there are {len(images)} images, but {len(prompts)} prompts: give one for each")
    if not images:
        raise ValueError("the CLIP score: there are no images")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    clip = _clip(str(model), revision, device)
    import torch

    scores = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        pixels = clip.processor([Image.fromarray(image) for image in images[part]], return_tensors="pt")
        text = clip.tokenizer(
            list(prompts[part]), padding=True, truncation=True, max_length=clip.tokens, return_tensors="pt"
        )
        with torch.inference_mode():
            out = clip.network(
                input_ids=text["input_ids"].to(device),
                attention_mask=text["attention_mask"].to(device),
                pixel_values=pixels["pixel_values"].to(device),
            )
        scores.append((out.image_embeds * out.text_embeds).sum(dim=-1).cpu().numpy())  # both are of length 1
    return np.concatenate(scores).astype(np.float64)


def clip_identity(model: str | Path, revision: str | None = None) -> Identity:
    """Which network's score it is: by the name of its folder or its id, and the hash of its weights.

    Raises ValueError: the model cannot be loaded.
    """
    return _clip(str(model), revision, "cpu").identity


class _Clip(NamedTuple):
    identity: Identity
    network: Any
    processor: Any
    tokenizer: Any
    tokens: int


@lru_cache
def _clip(model: str, revision: str | None, device: str) -> _Clip:
    with optional("the CLIP score"):
        import torch
        import transformers
        from transformers.utils.hub import cached_file

        try:
            # The same values whether torchvision is there or not.
            from transformers import CLIPImageProcessorPil as Processor
        except ImportError:
            from transformers import CLIPImageProcessor as Processor  # before transformers 5
    try:
        weights = Path(cached_file(model, "model.safetensors", revision=revision) or "")
        load: Callable[..., Any] = transformers.CLIPModel.from_pretrained
        network, report = load(model, revision=revision, use_safetensors=True, output_loading_info=True)
        processor = Processor.from_pretrained(model, revision=revision or "main")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(model, revision=revision or "main")
        if report["missing_keys"]:  # transformers would leave them random
            raise ValueError(f"its weights lack {len(report['missing_keys'])} tensors, so it is no whole CLIPModel")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load a CLIP model with model.safetensors from {model!r} ({reason}): give a folder that "
            "transformers' CLIPModel and CLIPProcessor were saved in, or its id on the hub"
        ) from error
    local = Path(model).is_dir()
    name = Path(model).resolve().name if local else model
    libraries = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if not local and weights.parent.parent.name == "snapshots":  # the hub's cache, by commit
        libraries += f", revision {weights.parent.name}"
    identity = Identity(f"CLIP score (cosine) by {name}", libraries, sha256(weights))
    tokens = network.config.text_config.max_position_embeddings
    return _Clip(identity, network.eval().float().to(device), processor, tokenizer, tokens)
