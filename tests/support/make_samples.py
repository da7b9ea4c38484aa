"""Makes tests/data/written_by_0_1: a small sample of everything that version 0.1 writes, for test_written_before.py.

    python tests/support/make_samples.py

Version 0.1.0 made these samples, with the packages that full/run.json names, and they stay as they are: the test is of
later versions. What a later version writes goes into a folder of its own. Run again, the script makes the same tensors,
up to rounding on another machine; orbax's names of files and times, and the seconds in logs, differ.

    base        what was erased from: SD 1 with a few thousand weights, in float16, and its tokenizer of 20 merges
    full        a run of ESD over all weights of cross-attention, by full.py, which ended early, after 2 of 4 updates;
                with its model, delta, previews, all exports, evidence and report
    lora        a run of rank 2 by lora.py, which keeps trajectories; SIGTERM stopped it after 2 of 4 updates
    sdd, uce    runs with a moving average, and in closed form with two concepts, one of which has a ";" in it
    sdxl        a delta and a LoRA of kohya's keys of an SDXL, of which the configs alone are kept
    everything  evidence in which nothing is missing
    tune        the trials of a search
    gallery     an image of the embedded model
    expected    what the test compares: see there
"""

import contextlib
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import diffusers
import factories
import numpy as np
import safetensors.numpy
import torch
from samples import (
    ATTACK,
    ENDED,
    SAMPLES,
    SEARCH,
    checksum,
    evaluated,
    goal,
    in_a_row,
    is_exact,
    open_sample,
    shapes,
    tensors,
    with_zeros,
)

import esd_jax
from esd_jax import dossier, exports, search
from esd_jax.demo import gallery
from esd_jax.demo.groups import Shot
from esd_jax.evaluation import store
from esd_jax.evaluation.evidence import Curve, Evidence, Finding, Heat, Moment, Pair, Plot, Table
from esd_jax.metrics.intervals import Estimate, rate
from esd_jax.training.loop import Stopped

CONCEPT = "cat style"
CONFIGS = ("full.py", "lora.py")  # lie among the samples, and are not made
PROMPTS = "prompt,evaluation_seed,group\na photo of the cat,5,cats\na dog,6,dogs\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for name in CONFIGS:
            shutil.copy(SAMPLES / name, place)
        with contextlib.chdir(place):
            factories.WIDTH = 8
            make_base(Path("base"))
            full()
            others()
            sdxl()
            everything()
            tune()
            drawn = gallery.Gallery(Path("gallery"))
            gallery.draw(esd_jax.load("emoji"), [Shot("a cat in ink style", 1)], drawn)
            tidy(Path.cwd())
            expect()
        shutil.rmtree(SAMPLES)
        shutil.copytree(place, SAMPLES, copy_function=shutil.copyfile)


def make_base(folder: Path) -> None:
    """SD 1 at one resolution, that of its images, 8 x 8 pixels."""
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionPipeline(
        vae=factories.make_vae(
            scaling_factor=0.18215,
            sample_size=8,
            block_out_channels=(4,),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
        ),
        text_encoder=factories.make_text_encoder(
            hidden_act="quick_gelu", eos_token_id=2, num_attention_heads=2, num_hidden_layers=1
        ),
        tokenizer=factories.make_tokenizer(),
        unet=factories.make_unet(
            attention_head_dim=2,
            cross_attention_dim=factories.WIDTH,
            block_out_channels=(4,),
            norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ),
        scheduler=diffusers.PNDMScheduler(
            **factories.NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    factories.save(pipe, folder, torch.float16, "files")


def full() -> None:
    """A run with all that may lie in its folder."""
    erased = esd_jax.erase("base", config="full.py", output_dir="full", stop_when=lambda _: True, stop_every=2)
    Path("prompts.csv").write_text(PROMPTS)
    base = esd_jax.load("base")
    evaluated(base, erased)
    dossier.attack(base, erased, output_dir="full/evidence", goal=goal(), **ATTACK)
    metric = lambda model: (rate([model is not erased, True]), Estimate(0.75, 0.5, 0.875, 8))  # noqa: E731
    dossier.front(erased, metric, [0.5, 1.0], output_dir="full/evidence")
    dossier.report("full")
    Path("full/report.html").unlink()  # for eyes alone: nothing reads it
    formats = [name for name in exports.FORMATS if name != "folder"]  # the run's model is one
    exports.export_all(erased, "full/exports", formats, verify=True, metadata=dossier.facts("full"), rank=2)


def others() -> None:
    """Runs with other states, and without what `full` has."""
    kill = lambda _: signal.raise_signal(signal.SIGTERM)  # noqa: E731
    with contextlib.suppress(Stopped):
        esd_jax.erase("base", config="lora.py", output_dir="lora", stop_when=kill, stop_every=1)
    short = {"sampling_steps": 2, "steps": 2, "learning_rate": 1e-3, "ema": 0.5, "seed": 5}
    keys = "regex:mid_block.*attn2.to_k"
    esd_jax.erase("base", CONCEPT, method="sdd", subset=keys, output_dir="sdd", **short)
    esd_jax.erase("base", ["cat; dog", "the photo"], method="uce", output_dir="uce")
    for name in ("sdd", "uce"):
        shutil.rmtree(Path(name, "model"))


def sdxl() -> None:
    factories.make_sdxl("sdxl/base", block_out_channels=(4, 8), norm_num_groups=2)
    erased = esd_jax.erase("sdxl/base", "cat", method="uce")
    for name in ("delta", "kohya"):
        exports.export(erased, f"sdxl/{name}.safetensors", name, **({"rank": 1} if name == "kohya" else {}))
    for path in (*Path("sdxl/base").glob("tokenizer*/*"), *Path("sdxl/base").rglob("*.safetensors")):
        path.unlink()


def everything() -> None:
    """Evidence of which every part has something, in a folder that is no run."""
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    pairs = {"a group": (Pair("a cat", image, 255 - image), Pair("a dog", image // 2, image))}
    share, curve = rate([True, True, False]), Curve("loss", (1.0, 2.0), (0.5, 0.25), ("a", "b"), (0.5, 1.5), (1.5, 2.5))
    table = Table("A table", ("n", "seen", "word"), (("a title", ()), ("base", (3, share, None))), "A note.", ("seen",))
    evidence = Evidence(
        CONCEPT,
        {"concepts": [{"text": CONCEPT}], "base": "base", "recipe": {"method": "esd"}},
        measured_with={"sampler": "ddim", "detectors": [{"name": "a detector", "threshold": 0.5}]},
        verdict=(
            Finding("erased", "seen", share, rate([False] * 3), share),
            Finding("kept", "likeness", None, Estimate(0.5, 0.25, 0.75, 3), percent=False),
            Finding("attack", "an attack", share, share, rate([False])),
        ),
        pictures=pairs,
        tables=(table,),
        attacks=(table,),
        attack_pictures=pairs,
        timeline=(Moment(0, np.stack([image] * 2)), Moment(2, np.stack([image // 3] * 2), 0.5, 0.25)),
        timeline_prompts=("a cat", "a dog"),
        heat=Heat("Heat", ("base", "erased"), ("cat", "dog"), ((1.0, 0.5), (None, 0.25)), ("cat",)),
        front=Plot("Front", "target seen", "others kept", (curve,), percent=True),
        weights={"unet/conv_in.weight": 0.125},
        training=Plot("Training", "update", "loss", (curve,)),
        caveats=("A caveat.",),
        command="esd-jax erase --config=esd_x",
    )
    store.save(evidence, Path("everything"), "evaluation-custom")


def tune() -> None:
    """The trials of a search; its run is made anew where more are wanted."""
    metric = lambda model: (rate([not model.edits, True]), Estimate(0.75, 0.5, 0.875, 8))  # noqa: E731
    search.search(esd_jax.load("base"), metric=metric, folder=Path("tune"), **SEARCH)
    shutil.rmtree("tune/run")


def tidy(place: Path) -> None:
    """Leaves what git keeps, and names no place on this machine, where orbax notes what it has written."""
    for file in place.rglob("commit_success.txt"):
        file.write_text(file.read_text().replace(f"{place}/", ""))
    for path in sorted(place.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        assert not path.is_file() or str(place).encode() not in path.read_bytes(), path


def expect() -> None:
    """Opens every sample, resumes what can be, and writes down what is there."""
    shutil.copytree("sdxl/base", "zeros")
    bases = esd_jax.load("base"), with_zeros("zeros")
    files = sorted([*Path("full/exports").iterdir(), *Path().glob("*/*.safetensors")])
    names = ["base", *map(str, files), "full/model", "full", "lora", "sdd", "uce"]
    contents = {name: tensors(open_sample(name, *bases)) for name in names}
    for name in ENDED:
        shutil.copytree(name, f"again/{name}")
        contents[f"{name} to its end"] = tensors(
            esd_jax.erase("base", config=f"{name}.py", output_dir=f"again/{name}", resume=True)
        )
    for name in ("zeros", "again"):
        shutil.rmtree(name)
    os.mkdir("expected")
    sums = {name: checksum(values if is_exact(name) else shapes(values)) for name, values in contents.items()}
    Path("expected/checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
    values = {name: in_a_row(values) for name, values in contents.items() if not is_exact(name)}
    safetensors.numpy.save_file(values, "expected/values.safetensors")


if __name__ == "__main__":
    main()
