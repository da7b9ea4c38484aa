"""The named subsets of the true architectures, against the counts of tensors and scalars of the papers' own code."""

from functools import cache

import pytest

from esd_jax import selection
from esd_jax.models import architectures
from esd_jax.models.unet import UNet2DConditionModel
from esd_jax.models.unet_config import UNetConfig
from esd_jax.params import Network, functional

# subset -> (tensors, scalars), counted on diffusers' networks with the rules of each paper's own code.
SD14 = {
    "esd-x": (80, 43_962_560),
    "esd-x-strict": (32, 19_169_280),
    "esd-u": (388, 815_358_084),
    "esd-all": (468, 859_320_644),
    "esd-u-sdxl": (336, 787_459_200),
    "esd-all-sdxl": (416, 831_421_760),
    "xattn": (80, 43_962_560),
    "noxattn": (598, 813_495_680),
    "selfattn": (80, 49_574_080),
    "full": (686, 859_520_964),
    "notime": (678, 857_458_240),
    "xlayer": (10, 3_605_760),
    "selflayer": (10, 8_193_920),
    "sdd-noxattn": (600, 813_496_320),
    "sdd-notime": (680, 857_458_880),
    "values": (16, 9_584_640),
    "kv": (32, 19_169_280),
    "attn": (160, 93_536_640),
    "to_out": (64, 24_805_760),
}
SD2 = {
    "full": (686, 865_910_724),
    "esd-x": (80, 50_352_320),
    "esd-x-strict": (32, 25_559_040),
    "kv": (32, 25_559_040),
    "esd-u": (388, 815_358_084),
    "esd-all": (468, 865_710_404),
    "selfattn": (80, 49_574_080),
    "noxattn": (598, 813_495_680),
    "notime": (678, 863_848_000),
    "attn": (160, 99_926_400),
    "to_out": (64, 24_805_760),
}
SDXL = {
    "full": (1680, 2_567_463_684),
    "esd-x": (350, 545_670_400),
    "esd-x-strict": (140, 340_787_200),
    "kv": (140, 340_787_200),
    "esd-u": (818, 2_021_205_124),
    "esd-u-sdxl": (772, 1_996_259_200),
    "esd-all": (1168, 2_566_875_524),
    "esd-all-sdxl": (1122, 2_541_929_600),
    "selfattn": (350, 409_683_200),
    "noxattn": (1322, 2_019_730_560),
    "notime": (1672, 2_565_400_960),
    "attn": (700, 955_353_600),
    "to_out": (280, 204_966_400),
}
TABLES = {"sd14": SD14, "sd21": SD2, "sd21-base": SD2, "sdxl": SDXL}


@cache
def unet(architecture: str) -> Network:
    config = UNetConfig.from_dict(architectures.read(architecture)["unet"])
    return functional(lambda: UNet2DConditionModel(config))


@pytest.mark.parametrize(
    ("architecture", "subset"), [(architecture, subset) for architecture, table in TABLES.items() for subset in table]
)
def test_counts(architecture, subset):
    network = unet(architecture)
    names = selection.select(subset, network.layouts)
    assert (len(names), sum(network.shapes[name].size for name in names)) == TABLES[architecture][subset]
    assert len(set(names)) == len(names)


def test_every_subset_is_in_the_table_of_sd14():
    assert SD14.keys() == selection.SUBSETS.keys()


def test_what_one_block_trains():
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    layouts = unet("sd14").layouts

    def trained(subset):
        return {name.removeprefix(f"{block}.") for name in selection.select(subset, layouts) if name.startswith(block)}

    qkv = {f"{letter}.weight" for letter in ("to_q", "to_k", "to_v")}
    assert trained("esd-x") == {f"attn2.{name}" for name in qkv | {"to_out.0.weight", "to_out.0.bias"}}
    assert trained("kv") == {"attn2.to_k.weight", "attn2.to_v.weight"}
    assert {name for name in trained("noxattn") if name.startswith("norm")} == {
        f"norm{i}.{leaf}" for i in (1, 2, 3) for leaf in ("weight", "bias")
    }
    assert not any(name.startswith("norm") for name in trained("esd-u"))


def test_names_are_in_the_networks_order():
    layouts = unet("sd14").layouts
    assert selection.select("full", layouts) == tuple(layouts)


def test_regex_searches_names():
    layouts = unet("sd14").layouts
    assert selection.select(r"regex:^mid_block\..*attn2\.to_[kv]\.", layouts) == tuple(
        f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{letter}.weight" for letter in "kv"
    )


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ("esdx", r"unknown subset 'esdx': did you mean 'esd-x'"),
        ("", r"unknown subset ''.*esd-x, esd-x-strict.*regex:PATTERN"),
        ("zzzzz", r"unknown subset 'zzzzz': choose one of esd-x, .*to_out, or regex:PATTERN"),
        ("regex:(", r"'regex:\(' is not a regular expression"),
        ("regex:attn3", r"'regex:attn3' selects no tensor"),
    ],
)
def test_refusals(subset, message):
    with pytest.raises(ValueError, match=message):
        selection.select(subset, unet("sd14").layouts)


def test_layers_that_a_unet_lacks_are_refused():
    with pytest.raises(ValueError, match="'xlayer' selects no tensor"):
        selection.select("xlayer", unet("sdxl").layouts)


def test_describe_names_every_subset():
    lines = selection.describe().splitlines()
    assert [line.split()[0] for line in lines] == [*selection.SUBSETS, "regex:PATTERN"]
