"""diffusers' pipelines with guidance rules, and their names of the settings."""

import diffusers

SAFE, SEMANTIC = diffusers.StableDiffusionPipelineSafe, diffusers.SemanticStableDiffusionPipeline
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
SCALE = 7.5
NAMES = {
    "warmup": "sld_warmup_steps",
    "scale": "sld_guidance_scale",
    "threshold": "sld_threshold",
    "momentum_scale": "sld_momentum_scale",
    "momentum_beta": "sld_mom_beta",
}  # ours -> diffusers'
