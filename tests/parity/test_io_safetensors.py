"""The safetensors reader and writer against the library's own, and tensor layouts against torch's operations."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from messages import one_line

from esd_jax.io import safetensors as st

RNG = np.random.default_rng(0)


def test_linear_layout_is_torchs():
    x, kernel = RNG.normal(size=(3, 4)), RNG.normal(size=(4, 5))
    weight = torch.from_numpy(np.ascontiguousarray(st.to_file(kernel, "linear")))
    expected = torch.nn.functional.linear(torch.from_numpy(x), weight)
    np.testing.assert_allclose(x @ kernel, expected.numpy(), rtol=1e-12)


def test_conv_layout_is_torchs():
    x = RNG.normal(size=(1, 6, 7, 4)).astype(np.float32)
    kernel = RNG.normal(size=(3, 2, 4, 5)).astype(np.float32)
    ours = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    weight = torch.from_numpy(np.ascontiguousarray(st.to_file(kernel, "conv")))
    theirs = torch.nn.functional.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), weight).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "shape"), [("linear", (2, 3)), ("conv", (2, 3, 4, 5)), ("embedding", (2, 3)), ("vector", (4,))]
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_layouts_there_and_back(layout, shape, dtype):
    array = RNG.normal(size=shape).astype(dtype)
    there = st.to_file(array, layout)
    assert there.shape == st.file_shape(shape, layout)
    if layout in ("embedding", "vector"):
        np.testing.assert_array_equal(there, array)
    np.testing.assert_array_equal(st.from_file(there, layout), array)


def test_save_is_read_by_the_library(tmp_path):
    wide = RNG.normal(size=(2, 3))
    tensors = {
        "transposed": wide.astype(np.float32).T,  # the library's own writer saves this silently wrong
        "strided": wide.astype(ml_dtypes.bfloat16)[:, ::2],
        "fortran": np.asfortranarray(wide),
        "half": wide.astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(1.5, np.float32),
        "größe": np.ones(3, np.float16),
    }
    path = tmp_path / "x.safetensors"
    st.save(path, tensors, {"note": "ü"})
    read, in_torch = safetensors.numpy.load_file(path), safetensors.torch.load_file(path)
    assert read.keys() == in_torch.keys() == tensors.keys()
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
        np.testing.assert_array_equal(in_torch[name].double().numpy(), array.astype(np.float64))
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}
    header = st.read_header(path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(st.read(header, name), array)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_reads_what_the_library_writes(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(4).bfloat16(), "position_ids": torch.arange(5)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = st.read_header(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(st.read(header, "b"), tensors["b"].numpy())
    np.testing.assert_array_equal(st.read(header, "a").astype(np.float32), tensors["a"].float().numpy())
    assert st.read_bytes(header, "position_ids").tobytes() == tensors["position_ids"].numpy().tobytes()
    with pytest.raises(ValueError, match=one_line("position_ids", "I64", "x.safetensors")):
        st.read(header, "position_ids")


def test_write_asks_for_one_tensor_at_a_time_in_order(tmp_path):
    asked = []

    def tensor(name):
        asked.append(name)
        return np.full((2, 2), len(asked), np.float32)

    entries = st.lay_out({"z": ("F32", (2, 2)), "a": ("F32", (2, 2))})
    st.write(tmp_path / "x.safetensors", entries, tensor)
    assert asked == ["z", "a"]
    assert list(st.read_header(tmp_path / "x.safetensors").entries) == ["z", "a"]
    assert safetensors.numpy.load_file(tmp_path / "x.safetensors")["a"][0, 0] == 2


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    st.save(path, {"a": np.ones(3, np.float32)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=one_line("a has 8 bytes, not 12")):
        st.write(path, st.lay_out({"a": ("F32", (3,))}), lambda name: np.ones(2, np.float32))
    with pytest.raises(ValueError, match=one_line("a has dtype int64", "F32")):
        st.save(path, {"a": np.arange(3)})
    with pytest.raises(ValueError, match=one_line(path, "'steps'")):  # no reader would open it
        st.save(path, {"a": np.ones(3, np.float32)}, {"steps": 3})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_writing_where_one_cannot(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=one_line("cannot write", tmp_path / "file" / "x.safetensors", "directory")):
        st.save(tmp_path / "file" / "x.safetensors", {"a": np.ones(3, np.float32)})


def damages() -> dict[str, bytes]:
    good = safetensors.numpy.save({"a": np.ones((4, 4), np.float32)})
    overlapping = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    overlapping["b"] = overlapping["a"]
    encoded = json.dumps(overlapping).encode()
    return {
        "empty": b"",
        "truncated data": good[:-5],
        "truncated header": good[:20],
        "trailing bytes": good + b"\0\0",
        "overlapping tensors": len(encoded).to_bytes(8, "little") + encoded + good[-64:],
        "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n",
        "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(damages()[damage])
    with pytest.raises(ValueError, match=one_line(path, "damaged or incomplete", "download it again")):
        st.read_header(path)


def test_missing_files_and_pickles_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=one_line(tmp_path / "x.safetensors")):
        st.read_header(tmp_path / "x.safetensors")
    for name in ("m.bin", "m.pt", "m.pth", "m.ckpt", "m.CKPT"):
        with pytest.raises(ValueError, match=one_line(name, "pickle", "save_pretrained")):
            st.read_header(Path(name))


def test_cast_refuses_what_is_not_finite():
    array = np.array([1.0, 70000.0], np.float32)
    assert st.cast("x", array, "BF16").dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match=one_line("x reaches 7e+04", "float16")):
        st.cast("x", array, "F16")
    with pytest.raises(ValueError, match=one_line("x holds NaN")):
        st.cast("x", np.array([np.nan], np.float32), "F32")
