"""Videos to patches and timestamps, as Qwen3-VL reads them.

    frames sampled at ``fps`` (2 per second) -> one size for all -> pairs of frames (T = 2) -> patches
    prompt: <t seconds><|vision_start|>(H/P * W/P / 4 placeholders)<|vision_end|> per pair, t the pair's mean time

An odd number of frames is completed by repeating the last one, in the patches and in the timestamps alike. Frames are
resized by torch's uint8 bicubic with antialiasing, the kernel that ``transformers`` reaches through torchvision, and
normalised in its order, (v - 255 mean) / (255 std) in float32. A video of one frame is taken too (there: an error).

Source: Qwen3-VL technical report (2025), section 2 (text-based time alignment); the constants are those of the
released ``video_preprocessor_config.json``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .preprocess import ImageSource, PatchConfig, flatten_patches, load_image, local_file, smart_resize

VideoSource = str | os.PathLike | np.ndarray | torch.Tensor | Sequence[ImageSource]

# What transformers assumes of frames that come without a rate.
ASSUMED_SOURCE_FPS = 24.0
MIN_VIDEO_PIXELS = 4096
MAX_VIDEO_PIXELS = 25_165_824


@dataclass(frozen=True)
class Video:
    """A video and how to sample it. Anything else given as a video is read as ``Video(source)``.

    ``source``: a file that FFmpeg reads, an array (F, H, W, C) or (F, C, H, W) of uint8, or a list of F images.
    ``source_fps``: frames per second of given frames (24 where unknown); a file knows its own.
    ``fps`` or ``num_frames``: how many to take, evenly spread (default: the preprocessor's fps).
    ``sample=False``: take every frame as given.
    """

    source: VideoSource
    source_fps: float | None = None
    fps: float | None = None
    num_frames: int | None = None
    sample: bool = True


@dataclass(frozen=True)
class SamplingConfig:
    """``fps``, ``min_frames`` and ``max_frames`` of ``video_preprocessor_config.json``."""

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplingConfig:
        return cls(**{name: values[name] for name in ("fps", "min_frames", "max_frames") if values.get(name)})


@dataclass(frozen=True)
class ProcessedVideo:
    """``pixel_values`` (N, C*T*P*P) float32, ``grid`` (F/T, H/P, W/P), ``timestamps`` in seconds, one per F/T."""

    pixel_values: torch.Tensor
    grid: tuple[int, int, int]
    timestamps: list[float]


def sample_indices(total: int, source_fps: float, video: Video, sampling: SamplingConfig) -> list[int]:
    """Which of ``total`` frames to take: n = floor(total / source_fps * fps), kept within [min_frames, max_frames] and
    ``total``, at round(linspace(0, total - 1, n))."""
    if video.fps is not None and video.num_frames is not None:
        raise ValueError("a video takes fps or num_frames, not both")
    if not video.sample:
        return list(range(total))
    count = video.num_frames
    if count is None:
        count = int(total / source_fps * (video.fps or sampling.fps))
        count = min(max(count, sampling.min_frames), sampling.max_frames)
    if count < 1:
        raise ValueError(f"a video's num_frames must be at least 1, got {count}")
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def frame_timestamps(indices: Sequence[int], source_fps: float, temporal_patch_size: int) -> list[float]:
    """Seconds of each temporal patch: the mean of its first and its last frame's time."""
    times = [index / source_fps for index in indices]
    times += times[-1:] * (-len(times) % temporal_patch_size)
    return [
        (times[first] + times[first + temporal_patch_size - 1]) / 2
        for first in range(0, len(times), temporal_patch_size)
    ]


class VideoPreprocessor:
    """``preprocessor(video) -> ProcessedVideo``."""

    def __init__(self, config: PatchConfig | None = None, sampling: SamplingConfig | None = None) -> None:
        self.config = config or PatchConfig(min_pixels=MIN_VIDEO_PIXELS, max_pixels=MAX_VIDEO_PIXELS)
        self.sampling = sampling or SamplingConfig()
        values = torch.arange(256, dtype=torch.float32)
        inverse = 1.0 / self.config.rescale_factor
        mean, std = (torch.tensor(v)[:, None] * inverse for v in (self.config.image_mean, self.config.image_std))
        self._table = ((values - mean) / std).numpy()

    def __call__(self, video: VideoSource | Video, name: str = "video") -> ProcessedVideo:
        """Raises FileNotFoundError or ValueError that names the file (``name`` where there is none)."""
        video = video if isinstance(video, Video) else Video(video)
        if isinstance(video.source, (str, os.PathLike)):
            name = os.fspath(video.source)
        try:
            frames, indices, source_fps = self._frames(video, name)
        except ValueError as error:
            message = str(error)
            raise ValueError(message if message.startswith(name) else f"{name}: {message}") from None
        config = self.config
        frames = torch.cat([frames, frames[-1:].expand(-len(frames) % config.temporal_patch_size, -1, -1, -1)])
        patches = flatten_patches(frames.permute(0, 2, 3, 1).numpy(), config, self._table)
        grid = (
            len(frames) // config.temporal_patch_size,
            frames.shape[2] // config.patch_size,
            frames.shape[3] // config.patch_size,
        )
        times = frame_timestamps(indices, source_fps, config.temporal_patch_size)
        return ProcessedVideo(torch.from_numpy(patches), grid, times)

    def _frames(self, video: Video, name: str) -> tuple[torch.Tensor, list[int], float]:
        """The sampled and resized frames, their indices, and the frame rate that the indices count in."""
        source = video.source
        if isinstance(source, (str, os.PathLike)):
            return self._file_frames(local_file(source), video)
        if len(source) == 0:
            raise ValueError("the video has no frames")
        source_fps = video.source_fps or ASSUMED_SOURCE_FPS
        indices = sample_indices(len(source), source_fps, video, self.sampling)
        images = (np.array(load_image(source[i], f"{name}, frame {i}")) for i in indices)
        return self._resized(images, len(indices)), indices, source_fps

    def _file_frames(self, path: Path, video: Video) -> tuple[torch.Tensor, list[int], float]:
        import av

        try:
            total, fps = _probe(path)
            indices = sample_indices(total, fps, video, self.sampling)
            frames = self._resized(_decode(path, indices), len(indices))
            if len(frames) < len(indices):
                # The container promised more frames than its stream holds.
                total = sum(1 for _ in _decode(path, range(total)))
                indices = sample_indices(total, fps, video, self.sampling)
                frames = self._resized(_decode(path, indices), len(indices))
        except (av.error.FFmpegError, IndexError) as error:
            raise ValueError(f"{path}: not a video file that FFmpeg can read ({error})") from None
        return frames, indices, fps

    def _resized(self, images: Iterable[np.ndarray], count: int) -> torch.Tensor:
        """``images`` (H, W, 3), of which ``count`` are expected -> (F, 3, H', W') uint8. Each is resized as it comes:
        768 frames of 1920x1080 would take 4.8 GB together."""
        frames: list[torch.Tensor] = []
        first, size = (0, 0), (0, 0)
        for image in images:
            shape: tuple[int, int] = (image.shape[0], image.shape[1])
            if not frames:
                first, size = shape, self._size(shape[0], shape[1], count)
            elif shape != first:
                raise ValueError(f"frames must have one size, got {first[1]}x{first[0]} and {shape[1]}x{shape[0]}")
            frame = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
            if shape != size:
                frame = F.interpolate(frame, size=size, mode="bicubic", align_corners=False, antialias=True)
            frames.append(frame)
        if not frames:
            raise ValueError("the video has no frames that can be decoded")
        return torch.cat(frames)

    def _size(self, height: int, width: int, count: int) -> tuple[int, int]:
        config = self.config
        if min(height, width) < config.factor:
            grow = max(config.factor / height, config.factor / width)
            height, width = int(height * grow), int(width * grow)
        return smart_resize(
            height,
            width,
            factor=config.factor,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
            # One frame is completed to two later, and counts as two here.
            frames=max(count, config.temporal_patch_size),
            temporal_factor=config.temporal_patch_size,
        )


def _probe(path: Path) -> tuple[int, float]:
    """Frames and frames per second. Containers such as WebM do not say how many; then the packets are counted."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"{path}: the file has no video stream")
        stream = container.streams.video[0]
        fps = float(stream.average_rate or ASSUMED_SOURCE_FPS)
        total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if total == 0:
        raise ValueError(f"{path}: the video has no frames")
    return total, fps


def _decode(path: Path, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames at ``indices`` (ascending) as (H, W, 3) RGB; fewer where the stream ends early."""
    import av

    wanted = set(indices)
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                yield frame.to_ndarray(format="rgb24")
            if index >= indices[-1]:
                return
