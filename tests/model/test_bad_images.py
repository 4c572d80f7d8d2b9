"""Images that cannot be used: one sentence that names the file, and nothing decoded that its header gives away."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qvl_model import preprocess
from qvl_model.preprocess import ImagePreprocessor, load_image


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends right after its header and one empty data chunk."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def refusal(path) -> str:
    """The message that the preprocessor refuses ``path`` with."""
    with pytest.raises(ValueError) as caught:
        ImagePreprocessor()([path])
    message = str(caught.value)
    assert "\n" not in message
    return message


BAD_FILES = {
    "empty.png": (b"", "the file is empty"),
    "notes.jpg": (b"This is no image.\n" * 20, "not an image file that Pillow can read"),
    "cut.png": (encoded(photo(), "PNG")[:700], "cannot decode the image (image file is truncated"),
    "cut.jpg": (encoded(photo(200, 200), "JPEG")[:3000], "cannot decode the image (image file is truncated"),
    "bomb.png": (png_header(60_000, 60_000), "the header claims more than 178956970 pixels, the limit for one image"),
    "dot.png": (encoded(photo(1, 1), "PNG"), "1x1 is too small; each side needs at least 2 pixels"),
    "line.png": (encoded(photo(50, 1), "PNG"), "50x1 is too small; each side needs at least 2 pixels"),
    "strip.png": (encoded(photo(20_000, 10), "PNG"), "20000x10 has an aspect ratio of 2000; the limit is 200"),
    "deep.png": (
        encoded(Image.fromarray(np.zeros((9, 9), np.uint16)), "PNG"),
        "mode I;16 is not supported; convert it to 8 bits per channel first",
    ),
    "float.tiff": (
        encoded(Image.new("F", (9, 9)), "TIFF"),
        "mode F is not supported; convert it to 8 bits per channel first",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named(name, tmp_path):
    content, reason = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: {reason}")


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_bytes_are_numbered(name):
    content, reason = BAD_FILES[name]
    expected = "no bytes at all" if name == "empty.png" else reason
    with pytest.raises(ValueError) as caught:
        ImagePreprocessor()([photo(), content])
    assert str(caught.value).startswith(f"image 1: {expected}")


def test_missing_file(tmp_path):
    path = tmp_path / "gone.png"
    with pytest.raises(FileNotFoundError) as caught:
        load_image(path)
    assert str(caught.value) == f"{path}: no such file"


def test_folder(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: not a file"


def test_address():
    assert refusal("https://example.org/cat.png").startswith(
        "https://example.org/cat.png: downloading is not supported"
    )


def test_damaged_data_url():
    assert refusal("data:image/png;base64,@@@").startswith("image 0: the data: URL is not valid base64")
    assert refusal("data:image/svg+xml,<svg/>") == "image 0: a data: URL must be base64-encoded"


def test_bomb_is_refused_before_decoding(monkeypatch, tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(encoded(photo(40, 30), "PNG"))
    monkeypatch.setattr(preprocess, "MAX_IMAGE_PIXELS", 40 * 30 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert refusal(path) == f"{path}: 40x30 is more than 1199 pixels, the limit for one image"
    assert refusal(Image.open(path)) == f"{path}: 40x30 is more than 1199 pixels, the limit for one image"


def test_large_image_below_the_limit_brings_no_warning(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_header(10_000, 12_000))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert "more than" not in refusal(path)
    assert heard == []


def test_truncated_pil_image_is_named_by_its_file(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(BAD_FILES["cut.png"][0])
    assert refusal(Image.open(path)).startswith(f"{path}: cannot decode the image")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((9, 9, 3), np.float32), "image 0: an array must be uint8, got float32"),
        (np.zeros((9, 9, 5), np.uint8), "image 0: an array must be (H, W), (H, W, C) or (C, H, W), C in 1, 3, 4; got"),
        (np.zeros((0, 9, 3), np.uint8), "image 0: 9x0 is too small; each side needs at least 2 pixels"),
        (np.zeros(9, np.uint8), "image 0: an array must be (H, W), (H, W, C) or (C, H, W), C in 1, 3, 4; got (9,)"),
        (photo().convert("LA").convert("La"), "image 0: cannot decode the image (conversion from La"),
        (42, "image 0: expected a path, bytes, a PIL image or an array, got int"),
    ],
    ids=["float", "channels", "empty", "vector", "mode", "number"],
)
def test_bad_objects(source, message):
    assert refusal(source).startswith(message)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on the damage
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_files_never_raise_anything_else(format, data):
    content = bytearray(encoded(photo(), format))
    for position in data.draw(st.lists(st.integers(0, min(200, len(content) - 1)), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    with contextlib.suppress(ValueError):
        ImagePreprocessor()([bytes(content)])
