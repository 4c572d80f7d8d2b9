"""Videos to patches, timestamps and placeholders, against transformers (see ``oracle`` for what stands in)."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import processor_oracle
from PIL import Image
from tiny_tokenizer import write_checkpoint_files
from transformers.models.qwen3_vl import processing_qwen3_vl
from transformers.video_utils import VideoMetadata, read_video_pyav

from qvl_model.processor import Processor
from qvl_model.video import SamplingConfig, Video, VideoPreprocessor, _probe, frame_timestamps, sample_indices

PROMPT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What happens?<|im_end|>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint_files(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def ours(folder):
    return Processor.from_pretrained(folder)


@pytest.fixture
def oracle(folder, monkeypatch):
    return processor_oracle(folder, monkeypatch)


def noise(frames, height=64, width=96, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def assert_same(batch, expected):
    for name, tensor in batch.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(2, 64, 64), (9, 64, 64), (30, 100, 90), (100, 20, 300), (3, 240, 200), (48, 33, 31), (130, 40, 40)],
    ids=str,
)
def test_frames_equal_oracle(frames, height, width, ours, oracle):
    video = noise(frames, height, width)
    expected = oracle(text=[PROMPT], videos=[video], return_tensors="pt")
    assert_same(ours(PROMPT, videos=[video]), expected)


def test_two_videos_and_an_image_equal_oracle(ours, oracle):
    text = ["<|video_pad|> then <|vision_start|><|image_pad|><|vision_end|>", PROMPT]
    videos = [noise(40), noise(7, 50, 50, seed=1)]
    image = Image.fromarray(noise(1)[0])
    expected = oracle(text=text, images=[image], videos=videos, padding=True, padding_side="left", return_tensors="pt")
    assert_same(ours(text, [image], videos), expected)


def test_given_rate_and_every_frame_equal_oracle(ours, oracle):
    frames = noise(5)
    metadata = [VideoMetadata(total_num_frames=5, fps=4.0, frames_indices=list(range(5)))]
    expected = oracle(
        text=[PROMPT], videos=[frames], video_metadata=metadata, do_sample_frames=False, return_tensors="pt"
    )
    video = Video([Image.fromarray(frame) for frame in frames], source_fps=4.0, sample=False)
    batch = ours(PROMPT, videos=[video])
    assert_same(batch, expected)
    text = ours.decode(batch.input_ids[0], skip_special_tokens=False).replace("<|video_pad|>", "")
    # Frames at 0, 0.25, 0.5, 0.75, 1 s and the last one once more, in pairs.
    assert [part.split(" seconds>")[0] for part in text.split("<")[1:] if " seconds>" in part] == ["0.1", "0.6", "1.0"]
    assert "<|vision_start|><0.1 seconds><|vision_start|><|vision_end|><0.6 seconds><|vision_start|>" in text
    assert text.endswith("<|vision_end|><|vision_end|>What happens?<|im_end|>\n")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_file_equals_oracle_reading_it_with_pyav(suffix, ours, oracle, tmp_path):
    path = write_video(tmp_path / f"clip.{suffix}", noise(45, 64, 80) // 2 + 60, rate=15)
    sampler = oracle.video_processor.sample_frames
    if suffix == "mp4":
        frames, metadata = read_video_pyav(str(path), lambda metadata, **kwargs: sampler(metadata))
    else:
        assert _probe(path) == (45, 15.0)
        # Matroska does not say how many frames it has, and the oracle's reader then takes none: tell it.
        frames, metadata = read_video_pyav(
            str(path), lambda metadata, **kwargs: sampler(VideoMetadata(total_num_frames=45, fps=metadata.fps))
        )
    assert len(metadata.frames_indices) == 6  # 3 s at 2 per second
    expected = oracle(
        text=[PROMPT], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    assert_same(ours(PROMPT, videos=[path]), expected)
    message = {"role": "user", "content": [{"type": "video", "video": str(path)}, {"type": "text", "text": "Well?"}]}
    assert torch.equal(ours.encode_chat([message]).pixel_values_videos, expected["pixel_values_videos"])


def test_sampling_of_a_video_in_a_message(ours):
    part = {"type": "video", "video": noise(60), "source_fps": 30.0}
    for keys, expected in [
        ({"fps": 4.0}, Video(part["video"], source_fps=30.0, fps=4.0)),
        ({"num_frames": 6}, Video(part["video"], source_fps=30.0, num_frames=6)),
        ({"sample": False}, Video(part["video"], source_fps=30.0, sample=False)),
    ]:
        got = ours.encode_chat([{"role": "user", "content": [{**part, **keys}]}])
        wanted = ours.encode_chat([{"role": "user", "content": [{"type": "video"}]}], videos=[expected])
        frames = {"fps": 8, "num_frames": 6, "sample": 60}[next(iter(keys))]
        assert got.video_grid_thw.tolist() == [[frames // 2, 4, 6]]
        assert torch.equal(got.input_ids, wanted.input_ids)
        assert torch.equal(got.pixel_values_videos, wanted.pixel_values_videos)


def write_video(path, frames, rate):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@given(
    total=st.integers(1, 3000),
    source_fps=st.sampled_from([1.0, 12.5, 23.976, 24.0, 30.0, 60.0]),
    fps=st.sampled_from([None, 0.5, 2.0, 3.3]),
)
@settings(max_examples=200, deadline=None)
def test_sampling_equals_oracle(total, source_fps, fps):
    from importlib import import_module

    oracle = import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl").Qwen3VLVideoProcessor()
    expected = oracle.sample_frames(VideoMetadata(total_num_frames=total, fps=source_fps), fps=fps)
    assert sample_indices(total, source_fps, Video([], fps=fps), SamplingConfig()) == expected.tolist()


@given(
    indices=st.lists(st.integers(0, 1000), min_size=1, max_size=20).map(sorted),
    fps=st.sampled_from([23.976, 24.0, 30.0]),
    temporal=st.sampled_from([1, 2, 3, 4]),
)
def test_timestamps_equal_oracle(indices, fps, temporal):
    oracle = object.__new__(processing_qwen3_vl.Qwen3VLProcessor)
    assert frame_timestamps(indices, fps, temporal) == oracle._calculate_timestamps(list(indices), fps, temporal)


def test_num_frames_is_taken_evenly():
    assert sample_indices(11, 24.0, Video([], num_frames=3), SamplingConfig()) == [0, 5, 10]
    assert sample_indices(2, 24.0, Video([], num_frames=3), SamplingConfig()) == [0, 1]


def test_single_frame_is_completed_to_a_pair():
    video = VideoPreprocessor()(noise(1, 128, 160))
    assert video.grid == (1, 8, 10)
    assert video.timestamps == [0.0]
    patches = video.pixel_values.view(-1, 3, 2, 16, 16)
    assert torch.equal(patches[:, :, 0], patches[:, :, 1])


def test_container_that_promises_too_many_frames(monkeypatch, tmp_path):
    from qvl_model import video as module

    path = write_video(tmp_path / "clip.mp4", noise(20, 32, 32), rate=10)
    expected = VideoPreprocessor()(path)
    monkeypatch.setattr(module, "_probe", lambda path: (25, 10.0))
    got = VideoPreprocessor()(path)
    assert torch.equal(got.pixel_values, expected.pixel_values)
    assert got.timestamps == expected.timestamps


def broken(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def test_bad_videos_are_named(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", noise(20, 32, 32), rate=10).read_bytes()
    preprocess = VideoPreprocessor()
    for name, content in [("empty.mp4", b""), ("notes.mp4", b"no video" * 50), ("cut.mp4", clip[:300])]:
        path = broken(tmp_path, name, content)
        with pytest.raises(ValueError) as caught:
            preprocess(path)
        assert str(caught.value).startswith(f"{path}: not a video file that FFmpeg can read"), name
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4: no such file"):
        preprocess(tmp_path / "gone.mp4")


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "video 0: the video has no frames"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "video 0: frames must have one size, got 8x8"),
        (np.zeros((4, 8, 2000, 3), np.uint8), "video 0: 8000x32 has an aspect ratio of 250; the limit is 200"),
        (np.zeros((4, 8, 8, 3), np.float32), "video 0, frame 0: an array must be uint8, got float32"),
        (Video(np.zeros((4, 8, 8, 3), np.uint8), fps=1, num_frames=2), "video 0: a video takes fps or num_frames"),
        (Video(np.zeros((4, 8, 8, 3), np.uint8), num_frames=0), "video 0: a video's num_frames must be at least 1"),
    ],
    ids=["none", "sizes", "aspect", "dtype", "both", "zero"],
)
def test_bad_frames_are_named(video, message, ours):
    with pytest.raises(ValueError) as caught:
        ours(PROMPT, videos=[video])
    assert str(caught.value).startswith(message)
