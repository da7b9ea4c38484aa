"""What a single-file checkpoint is, and where its tensors lie in it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from esd_jax.inputs import expanded
from esd_jax.io import corrections, flow_file, ldm, safetensors, tensors
from esd_jax.io.flow_names import TransformerConfig
from esd_jax.io.hub import resolve
from esd_jax.io.recognised import LOAD, described
from esd_jax.io.safetensors import Header
from esd_jax.models import architectures
from esd_jax.models.architectures import ARCHITECTURES
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.vae import VAEConfig
from esd_jax.pipeline import NetworkConfig, TensorFile, network

# Width of the text that the UNet's cross-attention reads -> the published architecture that has it.
WIDTHS = {768: "sd14", 1024: "sd21", 2048: "sdxl"}
# The step count of Stability's SD 2 base (512 px, which predicts eps), by which diffusers recognises it, too.
SD2_BASE_STEPS = 875000
# What ModelSpec calls the prediction type, ComfyUI's name for it and kohya's; and their words for its values.
PREDICTION, PREDICTIONS = "modelspec.prediction_type", {"epsilon": "epsilon", "v": "v_prediction"}
PREDICT_KEY, V_PARAMETERIZATION, ZERO_SNR = "modelspec.predict_key", "ss_v_parameterization", "ss_zero_terminal_snr"
WORDS = {**PREDICTIONS, "eps": "epsilon", "v_prediction": "v_prediction", "v_pred": "v_prediction"}
SWITCHES = {"true": True, "1": True, "false": False, "0": False, "none": False}


def is_single_file(source: str | Path) -> bool:
    """Whether a source names a single file, which may not exist."""
    path = expanded(source)
    return path.suffix.lower() == ".safetensors" and not path.is_dir()


def config_folder(header: Header, config: str | Path | None) -> Path:
    """The folder of config files that a single file needs.

    Args:
      header: of the file.
      config: a published architecture ("sd14", "sd21", "sd21-base", "sdxl", ...), or a diffusers folder or hub id of
        the same architecture; None determines it from the file's keys and shapes.

    Raises ValueError for a file that is no checkpoint, or of a family that is not implemented.
    """
    flow = flow_file.is_flow(header)
    if flow:
        flow_file.check(header)
    elif ldm.UNET + "input_blocks.0.0.weight" not in header.entries:
        raise ValueError(f"{header.path} is no Stable Diffusion checkpoint: {_instead(header)}")
    safetensors.check_weights(header, weights(header))
    name = (flow_file.name_of(header) if flow else _recognise(header)) if config is None else str(config)
    if flow and config is None and name not in ARCHITECTURES:
        raise ValueError(f"{header.path} has no configs: {flow_file.where_from(header.path, name)}")
    folder = architectures.folder(name) if name in ARCHITECTURES else resolve(config or name, weights=False)
    return folder.absolute()


def weights(header: Header) -> tuple[str, ...]:
    """How the keys of a file's weights begin; a transformer's may have no prefix."""
    return ("",) if flow_file.is_flow(header) else ldm.WEIGHTS


def scheduler_changes(header: Header, config: str | Path | None) -> dict[str, Any]:
    """A file's changes to the noise schedule of its architecture's `scheduler_config.json`.

    A `config` that is a folder, or one of the two SD 2, is right. Else, in this order: metadata (ModelSpec's
    `modelspec.prediction_type`, ComfyUI's `modelspec.predict_key`, kohya's `ss_v_parameterization`); the key `v_pred`,
    by which ComfyUI recognises an SDXL that predicts v. An SD 2 without any is taken to predict v, as diffusers takes
    it. The key `ztsnr`, or kohya's `ss_zero_terminal_snr`, marks a network that was trained from pure noise. A warning
    reports an SD 2 without any, an unknown value, and two that contradict each other.
    """
    if flow_file.is_flow(header):
        return {}
    name = _recognise(header) if config is None else str(config)
    if name not in ARCHITECTURES or (config is not None and name.startswith("sd21")):
        return {}
    changes: dict[str, Any] = {}
    if predictions := _predictions(header):
        (source, kind), *others = predictions.items()
        changes["prediction_type"] = kind
        if other := next((other for other in others if other[1] != kind), None):
            corrections.note(f"{header.path} says {kind} by {source} and {other[1]} by {other[0]}: {kind} is taken")
    elif name == "sd21" and _global_step(header) == SD2_BASE_STEPS:
        changes["prediction_type"] = "epsilon"
    elif name == "sd21":
        corrections.note(
            f"{header.path} does not say what it predicts: it is taken for v (768 px); if it predicts eps (512 px, "
            "base), load it with config='sd21-base'"
        )
    if "ztsnr" in header.entries or _switch(header, ZERO_SNR):
        changes["rescale_betas_zero_snr"] = True
        if name != "sdxl":  # whose class has no such option
            changes["_class_name"] = "DDIMScheduler"
        default = "v_prediction" if name == "sd21" else "epsilon"
        if changes.get("prediction_type", default) == "v_prediction":  # eps determines no x0 at pure noise
            changes["timestep_spacing"] = "trailing"
    return changes


def _predictions(header: Header) -> dict[str, str]:
    """The prediction types that a file declares: key -> prediction type, the most trusted first."""
    predictions = {}
    for key in (PREDICTION, PREDICT_KEY):
        if word := header.metadata.get(key):
            if kind := WORDS.get(word.strip().lower().replace("-", "_")):
                predictions[key] = kind
            else:
                corrections.note(f"{header.path} has {key}={word!r}, which is not known: it is passed over")
    if (predicts_v := _switch(header, V_PARAMETERIZATION)) is not None:
        predictions[V_PARAMETERIZATION] = "v_prediction" if predicts_v else "epsilon"
    if "v_pred" in header.entries:
        predictions["v_pred"] = "v_prediction"
    return predictions


def _switch(header: Header, key: str) -> bool | None:
    """A switch that kohya's scripts write into the metadata, as Python prints it."""
    if (word := header.metadata.get(key)) is None:
        return None
    if (value := SWITCHES.get(word.strip().lower())) is None:
        corrections.note(f"{header.path} has {key}={word!r}, which is neither True nor False: it is passed over")
    return value


def with_channels(header: Header, configs: Mapping[str, NetworkConfig]) -> dict[str, NetworkConfig]:
    """The configs with as many channels of the UNet's input as the file has: 9 in an inpainting model."""
    if flow_file.is_flow(header):
        return dict(configs)
    shape = header.entries[ldm.UNET + "input_blocks.0.0.weight"].shape
    return {**configs, "unet": replace(configs["unet"], in_channels=shape[1])} if len(shape) == 4 else dict(configs)


def locate(header: Header, configs: Mapping[str, NetworkConfig], *, ema: bool = False) -> dict[str, TensorFile]:
    """Where every tensor of the networks lies in a single file: "unet/NAME" -> its place.

    Keys that no network needs (`model_ema.*`, `alphas_cumprod`, SD 2's last text layer, ...) are left alone. A file of
    FLUX or SD3 may lack any network but the transformer.

    Args:
      header: of the file.
      configs: component -> config.
      ema: take the UNet from its moving average, `model_ema.*`.

    Raises ValueError, in one line, if a network is missing or of another shape.
    """
    path, entries, sources, prefix = header.path, header.entries, {}, flow_file.prefix_of(header)
    all_places = ldm.places(configs, prefix=prefix)
    for component, config in configs.items():
        places = {name: place for name, place in all_places.items() if name.startswith(f"{component}/")}
        if component == "unet" and ema:
            places = {name: tensors.Place(ldm.ema_key(place.key)) for name, place in places.items()}
        shapes = tensors.torch_shapes(network(config, "float32"))
        for name, place in places.items():
            key = next((key for key in _spellings(place.key) if key in entries), None)
            if key is None and place.transposed and f"{place.key}.weight" in entries:  # a linear layer's, of converters
                key, place = f"{place.key}.weight", replace(place, transposed=False)
            if key is not None:
                sources[name] = place.within(path, key)
        missing = [name for name in places if name not in sources]
        if len(missing) == len(places):
            if prefix is not None and component != "transformer":
                continue
            raise ValueError(f"{path} holds no {_what(config, ema)}: give a complete checkpoint")
        for name in [name for name in missing if places[name].or_identity]:
            like = next(source.key for other, source in sources.items() if other.startswith(f"{component}/"))
            sources[name] = TensorFile(path, like, identity=True)
            missing.remove(name)
        if missing:
            raise _mismatch(path, component, f"{len(missing)} tensors are missing, first {places[missing[0]].key!r}")
        for name, place in places.items():
            if sources[name].identity:
                continue
            shape, needed = entries[sources[name].key].shape, place.whole_shape(shapes[name.partition("/")[2]])
            if not tensors.fits(shape, needed):
                raise _mismatch(path, component, f"{sources[name].key!r} has shape {shape}, not {needed}")
    used = {source.key for source in sources.values()}
    start = ldm.UNET if prefix is None else prefix
    others = flow_file.OTHERS if start == "" else ()
    unknown = (k for k in entries if k.startswith(start) and not k.startswith(others) and k not in used)
    if not ema and (first := next(unknown, None)):
        raise _mismatch(path, "unet" if prefix is None else "transformer", f"{first!r} is unknown")
    return sources


def _recognise(header: Header) -> str:
    """The published architecture whose UNet reads text of the file's width."""
    keys = header.entries
    to_k = next((key for key in keys if key.startswith(ldm.UNET) and key.endswith("attn2.to_k.weight")), None)
    width = keys[to_k].shape[-1] if to_k and keys[to_k].shape else 0
    edm = any(key.startswith(("edm_mean", "edm_vpred.")) for key in keys)  # Playground 2.5, CosXL
    if width not in WIDTHS or edm:
        known = ", ".join(f"{name} {width}" for width, name in WIDTHS.items())
        what = "it is trained in EDM's parametrisation" if edm else f"its text is {width} wide"
        raise ValueError(
            f"{header.path} is of an unknown family: {what} ({known}); give a diffusers folder of its architecture "
            "as config="
        )
    return WIDTHS[width]


def _instead(header: Header) -> str:
    keys = list(header.entries)
    lacks = f"it lacks {ldm.UNET}input_blocks.0.0.weight and begins with {keys[0]!r}" if keys else "it holds no tensors"
    known = described(keys)
    return lacks if known in ("", LOAD) else known


def _spellings(key: str) -> tuple[str, ...]:
    """A key, and what files have in its place: CLIP's as transformers before 4.0 named it, and 5 does; FLUX.1's norms
    and VAE as ComfyUI writes them, and others.
    """
    vae = {"vae.": "first_stage_model.", "first_stage_model.": "vae."}
    other = next((new + key.removeprefix(old) for old, new in vae.items() if key.startswith(old)), key)
    norm = f"{key.removesuffix('.scale')}.weight" if key.endswith("_norm.scale") else key
    return (key, key.replace(".transformer.text_model.", ".transformer."), norm, other)


def _what(config: NetworkConfig, ema: bool) -> str:
    if isinstance(config, VAEConfig):
        return f"VAE ({ldm.VAE}*)"
    if isinstance(config, TransformerConfig):
        return "transformer"
    if isinstance(config, CLIPTextConfig):
        return f"text encoder of this kind ({ldm.TEXT}* in SD 1 and SD 2, conditioner.* in SDXL)"
    return f"moving average of its UNet ({ldm.EMA}*), so it cannot be loaded with ema=True" if ema else "UNet"


def _mismatch(path: Path, component: str, mismatch: str) -> ValueError:
    return ValueError(
        f"{path} is of another architecture than its config: {component}: {mismatch}; give a diffusers folder of its "
        "architecture as config="
    )


def _global_step(header: Header) -> int | None:
    entry = header.entries.get("global_step")
    if entry is None or entry.dtype != "I64" or entry.shape not in ((), (1,)):
        return None
    return int(safetensors.read_bytes(header, "global_step").view(np.int64)[0])
