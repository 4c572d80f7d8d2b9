"""The checkpoint that ships: its files, its benchmark, its accuracy, and the script that trains it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qvl_model import Processor, Qwen3VL, Qwen3VLConfig
from qvl_model.evaluate import answer_questions, read_tsv, run_benchmark
from qvl_model.generation import user_message
from qvl_model.preprocess import load_image

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "qvl_model" / "assets" / "digits"
EXAMPLE = ROOT / "examples" / "digits"
MAX_BYTES = 8_000_000

sys.path.insert(0, str(EXAMPLE))
import benchmark  # noqa: E402
import scenes  # noqa: E402
import train  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Qwen3VL:
    return Qwen3VL.from_pretrained(ASSETS, weights="fp32")


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def questions():
    return read_tsv(ASSETS / "benchmark.tsv")


def test_the_folder_is_small_and_of_the_released_format():
    sizes = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert sum(sizes.values()) <= MAX_BYTES
    assert {"config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"} <= sizes.keys()
    assert Qwen3VLConfig.from_json(ASSETS).vision == Qwen3VLConfig.digits().vision


@pytest.mark.parametrize("text", ["Is there a 3?", "naïve 漢字 🙂\n\ttabs", "<|im_start|>user\nHi<|im_end|>\n"])
def test_any_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer.encode(text)
    assert processor.decode(ids, skip_special_tokens=False) == text


def test_no_scan_is_in_both_splits():
    labels = scenes.load_scans().labels
    training, testing = scenes.split_scans(labels)
    assert not set(training) & set(testing)
    assert sorted([*training, *testing]) == list(range(1797))
    assert np.bincount(labels[testing]).min() >= 30
    assert not np.array_equal(testing, scenes.split_scans(labels, seed=1)[1])


def test_training_draws_only_training_scans(processor, monkeypatch):
    training, testing = scenes.split_scans(scenes.load_scans().labels)
    drawn = []
    draw_scene = train.draw_scene
    monkeypatch.setattr(train, "draw_scene", lambda *args: drawn.append(draw_scene(*args)) or drawn[-1])
    options = train.argparse.Namespace(small=2, looking=2, asking=4, round=100, batch=6, turns=2, seed=0)
    batches = train.Scenes(processor, training, options, stages=(2, 4))
    for step in range(8):
        assert torch.isfinite(batches[step]["pixel_values"]).all()
    used = {digit.scan for scene in drawn for digit in scene.digits}
    assert len(drawn) == 2 * 24 + 6 * 6
    assert len(used) > 50
    assert not used & set(testing)


def test_the_benchmark_is_what_its_script_draws_from_test_scans(questions):
    testing = set(scenes.split_scans(scenes.load_scans().labels)[1])
    assert len(questions) >= 2000
    position = 0
    for scene, asked in benchmark.benchmark_scenes(scenes.load_scans(), pictures=24):
        assert {digit.scan for digit in scene.digits} <= testing
        for question in asked:
            line = questions[position]
            assert (line.question, line.answer, line.category) == (question.text, question.answer, question.kind)
            # Another Pillow may round the resampling otherwise.
            image = np.asarray(load_image(line.image), dtype=int)
            assert abs(image - scene.image).max() <= 2
            position += 1


def test_scenes_have_one_right_answer():
    scans, rng = scenes.load_scans(), np.random.default_rng(0)
    for number in range(80):
        scene = scenes.draw_scene(rng, scans, np.arange(1797), 1 + number % 4)
        xs = [digit.x for digit in scene.digits]
        assert np.all(np.diff(xs) >= scenes.MIN_CENTRE_GAP)
        read = scenes.ask(rng, scene, "read")
        assert read.answer == " ".join(str(scans.labels[digit.scan]) for digit in scene.digits)
        assert scenes.ask(rng, scene, "count").answer == str(1 + number % 4)
        largest = scenes.ask(rng, scene, "largest")
        if largest is not None:
            heights = sorted(digit.height for digit in scene.digits)
            assert len(heights) == 1 or heights[-1] >= scenes.LARGEST_RATIO * heights[-2]


def test_training_sees_the_tokens_and_pixels_of_inference(processor):
    scans = scenes.load_scans()
    scene = scenes.draw_scene(np.random.default_rng(0), scans, np.arange(9), 3)
    options = train.argparse.Namespace(small=0, looking=0, asking=1, round=100, batch=1, turns=1, seed=0)
    batches = train.Scenes(processor, np.arange(9), options, (0, 0))
    question = scenes.ask(np.random.default_rng(0), scene, "read")
    tokens = scenes.SIDE**2 // (train.PATCH * train.MERGE) ** 2
    ids, labels = batches._conversation([question], tokens)
    asked = processor.encode_chat([user_message(question.text, [scene.image])])
    prompt = asked.input_ids[0].tolist()
    assert ids[: len(prompt)] == prompt
    answer = [token for token in labels if token != train.IGNORED]
    assert answer == processor.tokenizer.encode(f"{question.answer}<|im_end|>")
    assert labels[len(prompt) : len(prompt) + len(answer)] == answer
    assert torch.equal(batches._seen([scene])["pixel_values"], asked.pixel_values)


def test_the_shipped_model_answers_the_benchmark(model, questions):
    subset = questions[:: len(questions) // 200][:200]
    report = run_benchmark(answer_questions(model, max_new_tokens=12), subset, batch_size=50, progress=False)
    assert report.accuracy >= 0.90, report.table()


def test_transformers_reads_the_folder_and_answers_the_same(model, processor, questions):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(ASSETS, dtype=torch.float32).eval()
    for question in questions[:: len(questions) // 12][:12]:
        asked = processor.encode_chat([user_message(question.question, [load_image(question.image)])])
        types = (asked.input_ids == processor.image_token_id).long()
        expected = theirs.generate(**asked, mm_token_type_ids=types, max_new_tokens=10, do_sample=False)
        ours = model.generate(**asked, max_new_tokens=10)
        length = min(ours.shape[1], expected.shape[1])
        assert torch.equal(ours[:, :length], expected[:, :length])
        assert processor.decode(ours[0]) == processor.decode(expected[0])


def test_the_example_picture_is_read_as_the_readme_says(model):
    picture = ROOT / "examples" / "digits.png"
    assert model.chat("Read the digits from left to right.", images=[picture]) == "3 7 1"


def test_the_training_script_writes_a_checkpoint_that_loads(tmp_path):
    steps = ["--small", "1", "--looking", "1", "--asking", "2", "--round", "21"]
    options = [*steps, "--exam", "16", "--batch", "4", "--workers", "0", "--no-compile"]
    process = subprocess.run(
        [sys.executable, str(EXAMPLE / "train.py"), *options, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert process.returncode == 0, process.stderr
    assert "right read" in process.stderr + process.stdout, "the exam that decides what is asked next"
    trained = Qwen3VL.from_pretrained(tmp_path)
    assert trained.lm_head.weight.dtype == torch.bfloat16
    picture = ROOT / "examples" / "digits.png"
    assert isinstance(trained.chat("How many digits?", images=[picture], max_new_tokens=3), str)
    assert Processor.from_pretrained(tmp_path).tokenizer.encode("3 7") == Processor.from_pretrained(
        ASSETS
    ).tokenizer.encode("3 7")
