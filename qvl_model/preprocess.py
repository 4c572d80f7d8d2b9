"""Images to patches, as Qwen3-VL's vision encoder reads them.

    pixel_values[n, (c, t, y, x)] = (float32(scale * v) - mean[c]) / std[c],   v the uint8 of patch n

An image goes through: load -> upright (EXIF) -> RGB over white -> ``smart_resize`` (bicubic, Pillow) -> patches. The
result is equal bit for bit to the Pillow image processor of ``transformers`` (``Qwen2VLImageProcessorPil``), given the
same Pillow. Where we choose differently, and why:

* A file with transparency lies over white, as a PIL image does there. (Its file loader drops the alpha channel first,
  which uncovers whatever colour the transparent pixels happen to hold.)
* Refused here, accepted there: images with a side of one pixel, and modes with more than 8 bits per channel
  (``I``, ``I;16``, ``F``), which Pillow clips to 255, nearly always to plain white.
* EXIF orientation is applied to files and bytes, never to PIL images: both as there.

Shapes: ``P`` patch_size, ``T`` temporal_patch_size, ``C`` = 3 channels, ``N`` patches of all images together.
Source: Qwen2-VL (Wang et al., 2024), section 2.1, naive dynamic resolution; Qwen3-VL keeps it with 16-pixel patches.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageSource = str | os.PathLike | bytes | bytearray | Image.Image | np.ndarray | torch.Tensor

MAX_ASPECT_RATIO = 200
# Where Pillow itself refuses to go on (twice its MAX_IMAGE_PIXELS): 537 MB as RGB.
MAX_IMAGE_PIXELS = 178_956_970
_DEEP_MODES = ("I", "F")
# Patches converted at once: numpy widens each uint8 index to 8 bytes, so 1024 patches of 16x16x3 take 6 MB.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class PatchConfig:
    """The numbers of ``preprocessor_config.json``. ``min_pixels`` and ``max_pixels`` bound height * width of one image
    after resizing (for a video: frames * height * width). Defaults are the released checkpoints' for images."""

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 256 * 256
    max_pixels: int = 4096 * 4096
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)

    @property
    def factor(self) -> int:
        """Pixels per side of what becomes one token of the language model: patch_size * merge_size."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: str, **defaults: Any) -> PatchConfig:
        """Read a checkpoint's JSON. ``size.shortest_edge`` / ``size.longest_edge`` count pixels, in spite of the names;
        ``min_pixels`` / ``max_pixels`` at the top level win over them. Raises ValueError that names ``file``."""
        for flag in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if values.get(flag) is False:
                raise ValueError(f"{file}: {flag} = false is not supported")
        size = values.get("size") or {}
        known = {field.name for field in fields(cls)}
        found = {name: value for name, value in values.items() if name in known and value is not None}
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if edge in size:
                found.setdefault(name, size[edge])
        for name in ("image_mean", "image_std"):
            if name in found:
                found[name] = tuple(found[name])
        config = replace(cls(**defaults), **found)
        config.check(file)
        return config

    def check(self, file: str) -> None:
        """Raise ValueError, naming ``file``, unless every number can be used."""
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{file}: {name} must be a positive integer, got {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"{file}: min_pixels = {self.min_pixels} exceeds max_pixels = {self.max_pixels}")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{file}: {name} must have 3 numbers, got {list(getattr(self, name))}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that ``from_dict`` and ``transformers`` read."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["size"] = {"shortest_edge": values.pop("min_pixels"), "longest_edge": values.pop("max_pixels")}
        return values


def load_image(source: ImageSource, name: str = "image") -> Image.Image:
    """An upright RGB image from a path, a ``data:`` URL, the bytes of a file, a PIL image, or a uint8 array.

    Arrays and tensors: (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4; where both ends fit, channels come first.
    The size is read from the header and checked before anything is decoded.

    Raises FileNotFoundError, or ValueError with one sentence that begins with the file's name (``name`` if there is
    none): not an image, truncated, empty, too large, a side of one pixel, an unsupported mode or dtype.
    """
    if isinstance(source, torch.Tensor):
        source = source.numpy(force=True)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        _check_size(source.size, getattr(source, "filename", "") or name)
        return _decode(source, getattr(source, "filename", "") or name, upright=False)
    if isinstance(source, str) and source.startswith("data:"):
        source = _data_url_bytes(source, name)
    if isinstance(source, (bytes, bytearray)):
        if not source:
            raise ValueError(f"{name}: no bytes at all")
        return _open(io.BytesIO(source), name)
    if isinstance(source, (str, os.PathLike)):
        path = local_file(source)
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty")
        return _open(path, str(path))
    raise ValueError(f"{name}: expected a path, bytes, a PIL image or an array, got {type(source).__name__}")


def local_file(source: str | os.PathLike) -> Path:
    """The existing file that a path or ``file://`` address names. Raises FileNotFoundError or ValueError."""
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        raise ValueError(f"{text}: downloading is not supported; save the file and pass its path")
    path = Path(text.removeprefix("file://"))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    return path


def _data_url_bytes(url: str, name: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"{name}: a data: URL must be base64-encoded")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: the data: URL is not valid base64 ({error})") from None


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    too_large = f"{name}: the header claims more than {MAX_IMAGE_PIXELS} pixels, the limit for one image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
    except Image.DecompressionBombError:
        raise ValueError(too_large) from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image file that Pillow can read") from None
    # A damaged header surfaces as whatever its plugin trips over: SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        raise ValueError(f"{name}: cannot read the image header ({error})") from None
    with image:
        _check_size(image.size, name)
        return _decode(image, name, upright=True)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{name}: {width}x{height} is more than {MAX_IMAGE_PIXELS} pixels, the limit for one image")
    if min(width, height) < 2:
        raise ValueError(f"{name}: {width}x{height} is too small; each side needs at least 2 pixels")


def _decode(image: Image.Image, name: str, upright: bool) -> Image.Image:
    if image.mode.split(";")[0] in _DEEP_MODES:
        raise ValueError(f"{name}: mode {image.mode} is not supported; convert it to 8 bits per channel first")
    try:
        image.load()
        if upright:
            image = ImageOps.exif_transpose(image)
        return _over_white(image)
    except Exception as error:
        raise ValueError(f"{name}: cannot decode the image ({error})") from None


def _over_white(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(f"{name}: an array must be uint8, got {array.dtype}")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not {array.shape[0], array.shape[-1]} & {1, 3, 4}:
        raise ValueError(f"{name}: an array must be (H, W), (H, W, C) or (C, H, W), C in 1, 3, 4; got {array.shape}")
    if array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    _check_size((array.shape[1], array.shape[0]), name)
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    elif array.shape[-1] == 4:
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
    temporal_factor: int = 1,
) -> tuple[int, int]:
    """(height, width) to resize to: multiples of ``factor`` near the given ones, with the volume in bounds.

        t, h, w rounded to their factors;  if t h w > max:  floor(h / b), b = sqrt(frames height width / max)
                                           if t h w < min:  ceil(h b),    b = sqrt(min / (frames height width))

    Python's ``round`` (half to even) is part of the definition. Raises ValueError where the longer side exceeds the
    shorter more than 200 times.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(f"{width}x{height} has an aspect ratio of {ratio:g}; the limit is {MAX_ASPECT_RATIO}")
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    volume = round(frames / temporal_factor) * temporal_factor * new_height * new_width
    if volume > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return max(new_height, factor), max(new_width, factor)


def normalization_table(config: PatchConfig) -> np.ndarray:
    """(C, 256) float32: the normalised value of each uint8, with the roundings of ``transformers``' Pillow processor
    (product in float64, then float32). A table costs one load per value where the arithmetic costs three passes."""
    scaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean, std = (np.asarray(values, dtype=np.float32)[:, None] for values in (config.image_mean, config.image_std))
    return (scaled - mean) / std


def flatten_patches(frames: np.ndarray, config: PatchConfig, table: np.ndarray) -> np.ndarray:
    """(F, H, W, C) uint8 -> (F/T * H/P * W/P, C*T*P*P) float32, F a multiple of T or 1 (a still: repeated T times).

    Patches that the merger joins (2x2) follow each other, so that it can view 4 rows as one. For one time step of an
    image of 4 x 4 patches, the row of each patch in the output:

         0  1 |  4  5
         2  3 |  6  7
        ------+------
         8  9 | 12 13
        10 11 | 14 15

    Within a row: channel, then time, then y, then x (the order of the released Conv3d weight, so that the patch
    embedding is one matrix product).
    """
    patch, merge, temporal = config.patch_size, config.merge_size, config.temporal_patch_size
    count, height, width, channels = frames.shape
    depth = 1 if count == 1 else temporal
    rows, columns = height // config.factor, width // config.factor
    split = frames.reshape(count // depth, depth, rows, merge, patch, columns, merge, patch, channels)
    patches = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels, depth, patch, patch)
    out = np.empty((len(patches), channels, temporal, patch, patch), dtype=np.float32)
    for start in range(0, len(patches), _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        for channel in range(channels):
            out[start:stop, channel] = table[channel][patches[start:stop, channel]]
    return out.reshape(len(patches), -1)


class ImagePreprocessor:
    """``preprocessor(images) -> pixel_values (N, C*T*P*P) float32, image_grid_thw (n, 3) int64``."""

    def __init__(self, config: PatchConfig | None = None) -> None:
        self.config = config or PatchConfig()
        self._table = normalization_table(self.config)

    def __call__(self, images: Sequence[ImageSource]) -> tuple[torch.Tensor, torch.Tensor]:
        """``images``: n of anything that ``load_image`` reads. ``image_grid_thw`` holds (1, H/P, W/P) of each; their
        products sum to N. Raises what ``load_image`` raises, and ValueError for an aspect ratio above 200."""
        config = self.config
        patches, grids = [], []
        for index, source in enumerate(images):
            image = self.resized(source, f"image {index}")
            patches.append(flatten_patches(np.asarray(image)[None], config, self._table))
            grids.append((1, image.height // config.patch_size, image.width // config.patch_size))
        # One large image alone takes 400 MB as patches: no second copy of it.
        pixel_values = patches[0] if len(patches) == 1 else np.concatenate(patches)
        return torch.from_numpy(pixel_values), torch.tensor(grids, dtype=torch.int64)

    def resized(self, source: ImageSource, name: str = "image") -> Image.Image:
        """The RGB image that the encoder sees: loaded and resized to multiples of P * merge_size."""
        image = load_image(source, name)
        if isinstance(source, (str, os.PathLike)) and not os.fspath(source).startswith("data:"):
            name = os.fspath(source)
        config = self.config
        try:
            height, width = smart_resize(
                image.height,
                image.width,
                factor=config.factor,
                min_pixels=config.min_pixels,
                max_pixels=config.max_pixels,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return image.resize((width, height), Image.Resampling(config.resample))
