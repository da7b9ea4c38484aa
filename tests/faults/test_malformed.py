"""Two hundred damaged inputs: each ends in one line, quickly, in little memory, and leaves nothing behind."""

import json
import random
import shutil
import tracemalloc
from pathlib import Path

import factories
import pytest

import esd_jax
from esd_jax import api, exports

UNET = "unet/diffusion_pytorch_model.safetensors"
SAFETENSORS = (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
CONFIGS = (
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)  # fmt: skip
MEMORY = 64 * 2**20  # bytes above what a sound load takes
BASE = "base"


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edited(path: Path, rng: random.Random, change) -> None:
    """Rewrites a weight file with one tensor's entry changed."""
    header, data = header_of(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    change(header, name)
    write(path, header, data)


def cut(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def cut_in_header(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(200)])


def huge_header(path, rng):
    path.write_bytes(rng.choice([2**63, 2**40, 2**32, 10**9]).to_bytes(8, "little") + path.read_bytes()[8:])


def another_dtype(path, rng):
    other = rng.choice(["I8", "U8", "I64", "BOOL", "F8_E4M3", "F16", "F64", "X9", 3, None])
    edited(path, rng, lambda header, name: header[name].update(dtype=other))


def another_shape(path, rng):
    other = rng.choice([[], [2**62, 2**62], [-1], [10**9], "x", [0], [1.5], None])
    edited(path, rng, lambda header, name: header[name].update(shape=other))


def other_offsets(path, rng):
    other = rng.choice([[0, 2**60], [-8, 8], [8, 0], [0], [2**63, 2**64], "x", [1, 2, 3]])
    edited(path, rng, lambda header, name: header[name].update(data_offsets=other))


def another_name(path, rng):
    other = rng.choice(["x", "../../x", "", "a\nb", "conv_in.weight.weight", "\u0000"])
    edited(path, rng, lambda header, name: header.update({other: header.pop(name)}))


def no_entry(path, rng):
    edited(path, rng, lambda header, name: header.pop(name))


def header_no_object(path, rng):
    _, data = header_of(path)
    write(path, rng.choice([b"[]", b"3", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000]), data)


def nan(path, rng):
    header, data = header_of(path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    at = entry["data_offsets"][0]
    bits = rng.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"])  # NaN, and both infinities
    write(path, header, data[:at] + bits + data[at + 4 :])


def nothing(path, rng):
    path.unlink()


def empty(path, rng):
    path.write_bytes(b"")


def noise(path, rng):
    path.write_bytes(rng.randbytes(rng.randrange(1, 5000)))


def link(path, rng):
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/nowhere/at/all", path.name, "..", "/proc/self/mem", "/dev/full"]))


def a_folder(path, rng):
    path.unlink()
    path.mkdir()


def no_object(path, rng):
    path.write_text(rng.choice(["[]", "3", "null", "{", '"x"', "[" * 100_000, '{"a":' * 50_000, "\x00", "{'a': 1}"]))


def another_value(path, rng):
    """A field that shapes the networks, or names their classes, with a value that cannot be."""
    config = json.loads(path.read_text())
    fields = {
        "block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim", "in_channels",
        "cross_attention_dim", "latent_channels", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "vocab_size", "intermediate_size", "down_block_types", "num_train_timesteps",
        "beta_start", "beta_schedule", "_class_name", "unet", "vae", "text_encoder",
    }  # fmt: skip
    if path.name not in ("model_index.json", "scheduler_config.json"):
        fields.remove("_class_name")  # of a network, model_index.json says it
    name = rng.choice(sorted(fields & config.keys()))
    config[name] = rng.choice(["x", -1, [], {}, [[]], "../../../etc", ["../x", "y"], [None, None]])
    path.write_text(json.dumps(config))


def a_way_out(path, rng):
    """A shard index whose shards lie elsewhere, or do not exist."""
    names = list(header_of(path)[0])
    path.unlink()
    shard = rng.choice(
        ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "a/../../x", "gone.safetensors", 7]
    )
    weight_map = rng.choice([dict.fromkeys(names, shard), [], {}, None, {"x": [shard]}])
    path.with_name(path.name + ".index.json").write_text(json.dumps({"weight_map": weight_map}))


OF_WEIGHTS = (
    cut, cut_in_header, huge_header, another_dtype, another_shape, other_offsets, another_name, no_entry,
    header_no_object, nan, nothing, empty, noise, link, a_folder, a_way_out,
)  # fmt: skip
OF_JSON = (cut_in_header, nothing, empty, noise, link, a_folder, no_object, another_value)
OF_FILES = tuple(change for change in OF_WEIGHTS if change not in (nothing, a_way_out, no_entry))


FILES = {f"{format}.safetensors": format for format in ("delta", "difference", "lora", "kohya", "single")}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a checkpoint, and every single file that one can be read from or changed by."""
    folder = tmp_path_factory.mktemp("sound")
    factories.make_sd1(folder / BASE)
    base = esd_jax.load(folder / BASE)
    erased = esd_jax.erase(base, "cat", method="uce", config="uce", dtype="float32")
    for name, format in FILES.items():
        exports.export(erased, folder / name, format, **({} if format == "single" else {"dtype": "float32"}))
        api.opened(base, folder / name)
    return folder, base


def cases():
    """(file, mutation, seed) of each of the 200."""
    rng, cases = random.Random(0), []
    kinds = [(SAFETENSORS, OF_WEIGHTS), (CONFIGS, OF_JSON), (tuple(FILES), OF_FILES)]
    for number in range(200):
        names, changes = kinds[number % 3]
        cases.append((names[(number // 3) % len(names)], changes[(number // 3) % len(changes)], rng.randrange(2**32)))
    return cases


@pytest.mark.slow
def test_two_hundred_damaged_inputs(sound, tmp_path):
    folder, base = sound
    tracemalloc.start()
    esd_jax.load(folder / BASE)
    most, wrong = tracemalloc.get_traced_memory()[1], []
    for number, (name, change, seed) in enumerate(cases()):
        where = tmp_path / str(number)
        if name in FILES:
            where.mkdir()
            shutil.copyfile(folder / name, where / name)
            path, read = where / name, lambda where=where, name=name: api.opened(base, where / name)
        else:
            shutil.copytree(folder / BASE, where)
            path, read = where / name, lambda where=where: esd_jax.load(where)
        change(path, random.Random(seed))
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        tracemalloc.reset_peak()
        label = f"{number}: {name}, {change.__name__}, seed {seed}"
        try:
            read()
            wrong.append(f"{label}: no error")
        except (ValueError, OSError) as error:
            if "\n" in str(error) or len(str(error)) > 600 or not str(error):
                wrong.append(f"{label}: {type(error).__name__}: {str(error)[:300]!r}")
        except Exception as error:  # what the test is for
            wrong.append(f"{label}: {type(error).__name__}: {str(error)[:300]!r}")
        if (peak := tracemalloc.get_traced_memory()[1]) > most + MEMORY:
            wrong.append(f"{label}: {peak / 2**20:.0f} MiB")
        if sorted(str(p) for p in tmp_path.rglob("*")) != before:
            wrong.append(f"{label}: something was written")
        shutil.rmtree(where)
    tracemalloc.stop()
    assert not wrong, "\n".join([f"{len(wrong)} of 200", *wrong])
