"""Images to patches: equal, bit for bit, to transformers' Pillow image processor."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import image_oracle
from PIL import Image
from tiny_tokenizer import write_checkpoint_files
from transformers.image_utils import load_image as oracle_load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as oracle_smart_resize

from qvl_model.preprocess import (
    ImagePreprocessor,
    PatchConfig,
    flatten_patches,
    load_image,
    normalization_table,
    smart_resize,
)

SIZES = [  # (width, height)
    (224, 224),
    (32, 32),
    (2, 2),
    (2, 400),
    (400, 2),
    (31, 33),
    (48, 80),  # halves of 32: Python rounds half to even
    (640, 480),
    (481, 639),
    (1000, 5),
    (255, 257),
    (1280, 33),
]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_checkpoint_files(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Other numbers than the released ones in every place."""
    return write_checkpoint_files(
        tmp_path_factory.mktemp("small"),
        size={"shortest_edge": 1000, "longest_edge": 60000},
        patch_size=8,
        temporal_patch_size=3,
        merge_size=3,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )


def ours(folder):
    file = folder / "preprocessor_config.json"
    return ImagePreprocessor(PatchConfig.from_dict(json.loads(file.read_text()), str(file)))


def assert_equal_to_oracle(folder, images, oracle_images=None):
    expected = image_oracle(folder)(images if oracle_images is None else oracle_images, return_tensors="pt")
    pixel_values, grid = ours(folder)(images)
    assert grid.tolist() == expected["image_grid_thw"].tolist()
    assert grid.dtype == torch.int64
    assert pixel_values.dtype == torch.float32
    assert torch.equal(pixel_values, expected["pixel_values"])


def noise(width, height, mode="RGB", seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "RGBA":
        return Image.fromarray(array)
    return Image.fromarray(np.ascontiguousarray(array[..., :3])).convert(mode)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", ["released", "small"])
def test_pixels_equal_oracle_for_sizes(config, size, request):
    assert_equal_to_oracle(request.getfixturevalue(config), [noise(*size)])


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_pixels_equal_oracle_for_modes(mode, small):
    through = {"LA": "RGBA", "RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")
    assert_equal_to_oracle(small, [noise(60, 45, "RGBA").convert(through).convert(mode)])


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_equals_oracle(mode, small):
    image = noise(40, 40, mode)
    image.info["transparency"] = image.getpixel((3, 3))
    assert_equal_to_oracle(small, [image])


@pytest.mark.parametrize(
    "shape", [(50, 70, 3), (3, 50, 70), (50, 70, 1), (1, 50, 70), (50, 70, 4), (4, 50, 70), (3, 40, 3)], ids=str
)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays_equal_oracle(kind, shape, small):
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    assert_equal_to_oracle(small, [array if kind == "numpy" else torch.from_numpy(array)])


def test_grey_array_without_channels_is_its_grey_image(small):
    array = np.random.default_rng(1).integers(0, 256, (50, 70), dtype=np.uint8)
    preprocess = ours(small)
    assert torch.equal(preprocess([array])[0], preprocess([Image.fromarray(array)])[0])


def test_several_images_follow_each_other(released):
    assert_equal_to_oracle(released, [noise(64, 300), noise(300, 64, seed=1), noise(20, 20, seed=2)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_files_and_not_to_pil_images(orientation, small, tmp_path):
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(90, 41).save(path, exif=exif)
    assert_equal_to_oracle(small, [path], [oracle_load_image(str(path))])
    assert_equal_to_oracle(small, [Image.open(path)])


def test_transparent_file_lies_over_white(small, tmp_path):
    path = tmp_path / "logo.png"
    noise(50, 50, "RGBA").save(path)
    assert_equal_to_oracle(small, [path], [Image.open(path)])
    # The oracle's file loader drops the alpha channel instead: the difference that preprocess.py's docstring states.
    dropped = image_oracle(small)([oracle_load_image(str(path))], return_tensors="pt")["pixel_values"]
    assert not torch.equal(ours(small)([path])[0], dropped)


def test_every_kind_of_source_gives_the_same(small, tmp_path):
    path = tmp_path / "a picture.png"
    image = noise(70, 50)
    image.save(path)
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    preprocess = ours(small)
    expected = preprocess([image])[0]
    for source in (path, str(path), f"file://{path}", data, bytearray(data), url, np.asarray(image)):
        assert torch.equal(preprocess([source])[0], expected), source


def test_reading_an_image_leaves_it_as_it_was(small):
    image = noise(40, 40, "RGBA")
    before = image.copy()
    array = np.asarray(image).copy()
    ours(small)([image, array])
    assert image == before
    assert np.array_equal(array, np.asarray(before))


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([28, 32]),
    bounds=st.sampled_from([(65536, 16777216), (3136, 1003520), (1024, 4096)]),
)
@settings(max_examples=300, deadline=None)
def test_smart_resize_equals_oracle(height, width, factor, bounds):
    low, high = bounds
    try:
        expected = oracle_smart_resize(height, width, factor, low, high)
    except ValueError:
        expected = None
    if expected is None:
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
    else:
        assert smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high) == expected


def test_order_of_patches_in_the_2x2_merge():
    config = PatchConfig(patch_size=2, temporal_patch_size=1)
    raster = np.arange(16, dtype=np.uint8).reshape(4, 4)
    image = raster.repeat(2, 0).repeat(2, 1)[None, ..., None].repeat(3, -1)
    table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
    rows = flatten_patches(image, config, table)
    assert rows.shape == (16, 3 * 1 * 2 * 2)
    assert (rows == rows[:, :1]).all()
    # The drawing of flatten_patches read row by row: patch (0, 1) is row 1, patch (1, 0) is row 2, ...
    assert rows[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_order_within_a_patch_is_channel_time_y_x():
    config = PatchConfig(patch_size=2, temporal_patch_size=2, merge_size=1)
    frames = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3)  # (F, H, W, C)
    (row,) = flatten_patches(frames, config, np.tile(np.arange(256, dtype=np.float32), (3, 1)))
    assert row.tolist() == frames.transpose(3, 0, 1, 2).reshape(-1).tolist()


def test_table_covers_the_range():
    table = normalization_table(PatchConfig())
    assert table.shape == (3, 256)
    assert table[0, 0] == -1
    assert table[0, 255] == 1
    assert (np.diff(table) > 0).all()


def test_resized_is_what_the_encoder_sees():
    image = ImagePreprocessor().resized(noise(100, 70))
    assert image.mode == "RGB"
    assert image.width % 32 == image.height % 32 == 0


def test_config_top_level_bounds_win_over_size():
    values = {"min_pixels": 2048, "max_pixels": 4096, "size": {"shortest_edge": 1, "longest_edge": 2}}
    config = PatchConfig.from_dict(values, "preprocessor_config.json")
    assert (config.min_pixels, config.max_pixels) == (2048, 4096)


def test_config_survives_a_round_trip():
    config = PatchConfig(patch_size=14, min_pixels=5, max_pixels=7, image_mean=(0.1, 0.2, 0.3), rescale_factor=0.5)
    assert PatchConfig.from_dict(json.loads(json.dumps(config.to_dict())), "x.json") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 0}, "x.json: patch_size must be a positive integer, got 0"),
        ({"merge_size": "2"}, "x.json: merge_size must be a positive integer, got '2'"),
        ({"min_pixels": 9, "max_pixels": 8}, "x.json: min_pixels = 9 exceeds max_pixels = 8"),
        ({"image_std": [1.0]}, r"x.json: image_std must have 3 numbers, got \[1.0\]"),
        ({"do_resize": False}, "x.json: do_resize = false is not supported"),
    ],
)
def test_config_errors_name_the_file(values, message):
    with pytest.raises(ValueError, match=message):
        PatchConfig.from_dict(values, "x.json")


def test_load_image_is_upright_rgb():
    buffer = io.BytesIO()
    noise(8, 6, "L").save(buffer, "BMP")
    image = load_image(buffer.getvalue())
    assert (image.mode, image.size) == ("RGB", (8, 6))
