"""The command: what it prints, what it refuses, and that a real process of it starts, streams and ends."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from PIL import Image
from typer.testing import CliRunner

from qvl_model import Qwen3VL
from qvl_model.cli import SHIPPED_MODEL, app, one_line
from qvl_model.generation import user_message

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, seed=3)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(path / "scene.png")
    return path


@pytest.fixture(scope="module")
def loaded(folder) -> Qwen3VL:
    return Qwen3VL.from_pretrained(folder)


def run(*arguments: object, text: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text, prog_name="qvl")


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that fails."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(r"qvl: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.removeprefix("qvl: ").rstrip()


def test_ask_prints_the_models_answer(folder, loaded):
    scene = folder / "scene.png"
    result = run("ask", "--model", folder, "--image", scene, "-i", scene, "--max-new-tokens", 12, "What?")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == loaded.chat("What?", images=[scene, scene], max_new_tokens=12) + "\n"
    assert result.stderr == ""


def test_ask_draws_with_a_seed(folder, loaded):
    options = ["--model", folder, "--max-new-tokens", 12, "--temperature", 2, "--top-k", 50, "--seed"]
    result = run("ask", *options, 3, "What?")
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 50, "seed": 3}
    assert result.stdout == loaded.chat("What?", max_new_tokens=12, **sampling) + "\n"
    assert run("ask", *options, 4, "What?").stdout != result.stdout


def test_ask_about_a_video(folder, tmp_path):
    import av

    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for shade in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 30 * shade, np.uint8))
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    result = run("ask", "--model", folder, "--video", file, "--max-new-tokens", 4, "What happens?")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()


def test_a_conversation(folder, loaded):
    scene = folder / "scene.png"
    lines = [
        "Hello",
        f"/image {scene}",
        "/image nowhere.png",
        "/image",
        "/frob",
        "And now?",
        "And then?",
        "/help",
        "/reset",
        "Hello",
    ]
    result = run("chat", "--model", folder, "--max-new-tokens", 8, text="\n".join([*lines, "/quit", "never asked"]))
    assert result.exit_code == 0, result.stderr
    options = {"max_new_tokens": 8}
    first = loaded.chat("Hello", **options)
    turns = [user_message("Hello"), {"role": "assistant", "content": first}, user_message("And now?", [scene])]
    second = loaded.chat(turns, **options)
    turns += [{"role": "assistant", "content": second}, user_message("And then?")]
    third = loaded.chat(turns, **options)
    shown = f"{first}\n{scene} goes with the next question\n{second}\n{third}\n/image FILE "
    assert result.stdout.startswith(shown)
    assert result.stdout.endswith(f"\na new conversation\n{first}\n")
    assert result.stderr.splitlines() == [
        "qvl: nowhere.png: no such file",
        "qvl: /image needs the name of a file",
        "qvl: /frob: no such command; /help lists them",
    ]


def test_an_interrupted_answer_counts_as_far_as_it_came(loaded):
    from qvl_model.interactive import Conversation

    shown = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    conversation = Conversation(loaded, [], [], {"max_new_tokens": 30, "ignore_eos": True})
    conversation.ask("Hello", show)
    assert conversation.messages[1] == {"role": "assistant", "content": "".join(shown)}


def test_an_image_goes_with_one_question_only(folder, loaded):
    from qvl_model.interactive import Conversation

    conversation = Conversation(loaded, [], [], {"max_new_tokens": 4, "ignore_eos": True})
    conversation.command(f"/image {folder / 'scene.png'}")
    for question in ("And this?", "Why?"):
        conversation.ask(question, lambda piece: None)
    kinds = [[part["type"] for part in turn["content"]] for turn in conversation.messages[::2]]
    assert kinds == [["image", "text"], ["text"]]


def test_eval(folder, tmp_path, loaded):
    scene = base64.b64encode((folder / "scene.png").read_bytes()).decode()
    reply = loaded.chat("What?", images=[folder / "scene.png"], max_new_tokens=6)
    answer = " ".join(reply.split())
    tsv = tmp_path / "questions.tsv"
    rows = [("1", scene, "What?", answer, "easy"), ("2", "1", "Who?", "nobody at all", "hard")]
    lines = ["\t".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row) for row in rows]
    tsv.write_text("\n".join(["index\timage\tquestion\tanswer\tcategory", *lines]), encoding="utf-8")
    out = tmp_path / "out.json"
    options = ["eval", "--model", folder, "--tsv", tsv, "--max-new-tokens", 6]
    result = run(*options, "--json", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].split() == ["overall", "1", "/", "2", "50.00%"]
    content = json.loads(out.read_text())
    assert content["categories"]["easy"]["accuracy"] == 1
    assert content["records"][0]["reply"] == reply
    assert run(*options, "--limit", 1).stdout.splitlines()[-1].split() == ["overall", "1", "/", "1", "100.00%"]


def test_an_interrupted_eval_prints_what_it_has(folder, monkeypatch):
    def interrupted(batch):
        raise KeyboardInterrupt

    monkeypatch.setattr("qvl_model.evaluate.answer_questions", lambda model, **options: interrupted)
    result = run("eval", "--model", folder, "--limit", 3)
    assert result.stdout.splitlines()[-1] == "interrupted: 0 of 3 questions answered"
    assert result.exit_code == 130


def test_info(folder):
    result = run("info", "--model", folder)
    assert result.exit_code == 0, result.stderr
    for expected in (f"torch {torch.__version__}", torch.backends.cpu.get_cpu_capability(), "reference", "rms_norm"):
        assert expected in result.stdout
    count = sum(parameter.numel() for parameter in Qwen3VL.from_pretrained(folder).parameters())
    assert f"parameters  {count:,}" in result.stdout
    assert "3 layers, 4 query and 2 KV heads of 16" in result.stdout


def test_info_about_a_configuration_without_weights(tmp_path, folder):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert "the weights are not here" in run("info", "--model", tmp_path).stdout


@pytest.mark.parametrize("command", [[], ["ask"], ["chat"], ["eval"], ["bench"], ["info"]])
def test_help_explains_every_option_with_an_example(command):
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="qvl", env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    assert "qvl ask --image" in result.stdout if not command else f"qvl {command[0]}" in result.stdout
    for line in re.findall(r"│ +--.*│", result.stdout):
        assert re.search(r"  \S.*\S  ", line), f"no explanation: {line}"
    if not command:
        assert re.findall(r"^│ (\w+) ", result.stdout, re.MULTILINE) == ["ask", "chat", "eval", "pack", "bench", "info"]
        assert run().stdout == run("--help").stdout


def test_version():
    assert re.fullmatch(r"qvl \S.*\n", run("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "No such command 'frob'. (see qvl --help)"),
        (["ask"], "Missing argument 'question'. (see qvl ask --help)"),
        (["ask", "--frob", "x"], "No such option: --frob"),
        (["ask", "   "], "the question is empty"),
        (["ask", "x", "--image", "nowhere.png"], "nowhere.png: no such file"),
        (["ask", "x", "--image", __file__], f"{__file__}: not an image file that Pillow can read"),
        (["ask", "x", "--video", "nowhere.mp4"], "nowhere.mp4: no such file"),
        (["ask", "x", "--model", "./nowhere"], "./nowhere: no such folder"),
        (["ask", "x", "--top-p", "0.5"], "--top-p needs --temperature above 0"),
        (["ask", "x", "--temperature", "1", "--top-p", "7"], "sampling: top_p must lie in (0, 1], got 7.0"),
        (["ask", "x", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["ask", "x", "--weights", "int3"], "weights='int3' is no weight format; there are auto, fp32, bf16"),
        (["eval", "--tsv", "nowhere.tsv"], "nowhere.tsv: No such file or directory"),
        (["eval", "--json", "no/such/folder/out.json"], "no/such/folder/out.json: cannot be written"),
        (["info", "--model", "./nowhere"], "./nowhere: no such folder"),
    ],
)
def test_an_error_is_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert re.fullmatch(r"qvl: [^\n]+\n", result.stderr), result.stderr
    assert result.stderr.startswith(f"qvl: {message}"), result.stderr


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert refused("ask", "x", "--model", tmp_path).startswith(f"{file}: the header claims")


def test_an_unwritable_output_is_refused_before_the_work(folder, tmp_path):
    """Before even the questions are read: the TSV does not exist either."""
    assert refused("eval", "--model", folder, "--tsv", "nowhere.tsv", "--json", tmp_path).startswith(
        f"{tmp_path}: is a"
    )


def test_a_bug_says_so(monkeypatch):
    assert one_line(KeyError("x")) == "unexpected KeyError: 'x' (QVL_DEBUG=1 shows where)"
    assert one_line(ValueError("two\nlines")) == "two lines"
    assert one_line(PermissionError(13, "Permission denied", "out.json")) == "out.json: Permission denied"
    monkeypatch.setenv("QVL_DEBUG", "1")
    result = run("ask", "x", "--image", "nowhere.png")
    assert isinstance(result.exception, FileNotFoundError)


def start(*arguments: object, **options: object) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "qvl_model", *map(str, arguments)]
    # A shell's background jobs ignore Ctrl-C, and so do their children.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, preexec_fn=heed, **pipes, **options)


def test_a_real_process_streams_and_ctrl_c_ends_it(folder):
    """The first piece is read long before the last is made; then Ctrl-C: a line's end, no traceback, code 130."""
    process = start("ask", "--model", folder, "--max-new-tokens", 400, "--temperature", 5, "--seed", 1, "Go on")
    try:
        first = process.stdout.read(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert first
    assert rest.endswith(b"\n")
    assert errors.strip() == b""  # an older click ends the line
    assert process.returncode == 130


def test_a_real_process_reports_an_error_in_one_line():
    output, errors = start("ask", "--image", "nowhere.png", "x").communicate(timeout=60)
    assert (output, errors) == (b"", b"qvl: nowhere.png: no such file\n")


def test_the_shipped_model_is_the_default_and_answers_the_readmes_question():
    picture, question = ROOT / "examples" / "digits.png", "Read the digits from left to right."
    result = run("ask", "--image", picture, question)
    assert result.exit_code == 0, result.stderr
    loaded = Qwen3VL.from_pretrained(SHIPPED_MODEL, weights="fp32")
    assert result.stdout == loaded.chat(question, [picture]) + "\n"
    readme = (ROOT / "README.md").read_text()
    assert f'qvl ask --image examples/digits.png "{question}"' in readme
    assert f"it answers `{result.stdout.strip()}`" in readme


def test_info_describes_the_shipped_model():
    result = run("info")
    assert result.exit_code == 0, result.stderr
    assert "reference" in result.stdout


def test_pack_then_ask(folder, tmp_path):
    out = tmp_path / "packed"
    result = run("pack", folder, out, "--weights", "int8")
    assert result.exit_code == 0, result.stderr
    assert "packed as int8" in result.stdout
    assert "all " in run("pack", out, "--verify").stdout
    options = ["--max-new-tokens", 8, "What?"]
    assert (
        run("ask", "--model", out, *options).stdout
        == run("ask", "--model", folder, "--weights", "int8", *options).stdout
    )
    assert "give a checkpoint and the folder to write" in refused("pack", folder)
    assert "--weights must be one of bf16, int8, int4" in refused("pack", folder, out, "--weights", "fp32")


def test_attention_by_name(folder, loaded):
    options = ["ask", "--model", folder, "--max-new-tokens", 8, "What?"]
    exact = run(*options).stdout
    assert run(*options, "--attention", "sparse:sliding_window=500").stdout == exact
    layers = loaded.config.text.num_hidden_layers
    each = [word for _ in range(layers) for word in ("--attention", "linear:elu")]
    assert run(*options, *each).stdout != exact
    assert "attention must be one of fused" in refused(*options, "--attention", "magic")


def test_bench_measures_what_it_is_asked_to(folder, tmp_path):
    out = tmp_path / "bench.json"
    names = ["pp8", "tg3", "tg3 @ d20", "image 64"]
    arguments = [argument for name in names for argument in ("--test", name)]
    result = run("bench", "--model", folder, *arguments, "--repeat", "2", "--json", out)
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[-6:-1]] == ["load", *names]
    content = json.loads(out.read_text())
    assert [entry["test"] for entry in content["results"]] == names
    assert all(len(entry["values"]) == 2 and min(entry["values"]) > 0 for entry in content["results"])
    assert content["peak_bytes"] > 1 << 26
    assert refused("bench", "--test", "pp0").startswith(
        "there is no test 'pp0'; they are called 'image 448', 'image 1024'"
    )


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells of a program by itself in /proc")
def test_peak_memory_is_not_that_of_the_process_that_started_it():
    child = "from qvl_model.info import peak_memory; print(peak_memory())"
    parent = f"import subprocess, sys; held = b'x' * (1 << 30); subprocess.run([sys.executable, '-c', {child!r}])"
    told = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout
    assert 1 << 26 < int(told) < 1 << 30
