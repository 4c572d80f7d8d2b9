"""The command `qvl`: ask, chat, eval, pack, bench, info.

Nothing heavy is imported at the top: `qvl --help` answers at once, and `qvl ask` looks at the images before it loads a
model. An error is one line on stderr and exit code 1; with QVL_DEBUG=1 it is a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .options import (
    AttentionOption,
    CacheOption,
    DeviceOption,
    ImagesOption,
    MemoryOption,
    MinPOption,
    ModelOption,
    PenaltyOption,
    PrecisionOption,
    SeedOption,
    TemperatureOption,
    ThreadsOption,
    TokensOption,
    TopKOption,
    TopPOption,
    VideosOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from .model import Qwen3VL

SHIPPED_MODEL = Path(__file__).parent / "assets" / "digits"
BENCHMARK_NAME = "benchmark.tsv"
_EXPECTED_ERRORS = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError, NotImplementedError)


class _OneLineErrors(TyperGroup):
    """Reports every error, of usage or of work, as one line on stderr and exit code 1."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except BrokenPipeError:
            # The reader (`qvl ask ... | head`) has seen enough; keep the interpreter's own flush at exit quiet too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except Exception as error:
            if os.environ.get("QVL_DEBUG") == "1":
                raise
            print(f"qvl: {one_line(error)}", file=sys.stderr)
            code = 1
        sys.exit(code if isinstance(code, int) else 0)


def one_line(error: BaseException) -> str:
    """The message of an error for people who did not write this program."""
    if hasattr(error, "format_message"):  # a mistake in the arguments
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "qvl"
        text = f"{error.format_message()} (see {command} --help)"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, _EXPECTED_ERRORS):
        text = str(error) or type(error).__name__
    else:
        text = f"unexpected {type(error).__name__}: {error} (QVL_DEBUG=1 shows where)"
    return " ".join(text.split())


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Qwen3-VL on CPUs and older GPUs.

    `qvl ask --image scene.png "Which digits are these?"` answers with the small model that ships;
    `--model Qwen/Qwen3-VL-2B-Instruct`, or a folder, takes another one. `qvl COMMAND --help` explains each command.

    Environment: `QVL_DEBUG=1` shows tracebacks, `QVL_BACKEND=reference` (or another name of `qvl info`) forces one
    kernel backend.
    """
    if version:
        from .info import version as installed

        typer.echo(f"qvl {installed('qvl')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@dataclass(frozen=True)
class Choice:
    """Which model to load, and how."""

    model: str | None
    weights: str
    device: str
    threads: int | None
    attention: list[str] | None
    max_memory: str | None = None
    precision: str = "medium"

    def load(self, with_processor: bool = True) -> Qwen3VL:
        import torch

        from .generation import processor_of
        from .model import Qwen3VL

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        weights = self.weights
        if self.model is None and weights == "auto":
            # Its bf16 is for the download's sake; at its size fp32 is as fast on every CPU and on most much faster.
            weights = "fp32"
        attention = self.attention[0] if self.attention and len(self.attention) == 1 else self.attention
        source = self.model or SHIPPED_MODEL
        where = {"device": self.device, "max_memory": self.max_memory, "precision": self.precision}
        model = Qwen3VL.from_pretrained(source, weights=weights, attention=attention, **where)
        if with_processor:
            processor_of(model)
        return model


def _generation(
    max_new_tokens: int, temperature: float, seed: int | None, cache: str | None, **filters: Any
) -> dict[str, Any]:
    """The options of `generate`, checked before a model is loaded."""
    from .generation import GenerationOptions
    from .sampling import SamplingOptions

    penalty = filters.pop("repetition_penalty")
    given = {name: value for name, value in filters.items() if value is not None}
    if temperature == 0 and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} needs --temperature above 0: without it the most probable token is taken")
    sampling: dict[str, Any] = {"repetition_penalty": penalty}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "seed": seed, **given}
    GenerationOptions(max_new_tokens, SamplingOptions(**sampling), cache=cache)
    return {"max_new_tokens": max_new_tokens, "cache": cache, **sampling}


def _media(images: list[str] | None, videos: list[str] | None) -> tuple[list[Any], list[str]]:
    """Decoded images and the paths of videos that exist: a wrong name is told before a model is loaded."""
    from .preprocess import load_image, local_file

    return [load_image(image) for image in images or ()], [str(local_file(video)) for video in videos or ()]


def _print_stream(pieces: Iterator[str]) -> str:
    """Prints pieces as they come, up to Ctrl-C, and a line's end; returns what was printed."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    finally:
        typer.echo()
    return text


# The parameters of a command are its options, hence more than six.
@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask, in quotes.")],
    image: ImagesOption = None,
    video: VideosOption = None,
    model: ModelOption = None,
    weights: WeightsOption = "auto",
    attention: AttentionOption = None,
    cache: CacheOption = None,
    max_memory: MemoryOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
) -> None:
    """Answer one question, about images and videos or about nothing but text.

    Examples:

    `qvl ask --image scene.png "Which digits are these?"`

    `qvl ask -i before.png -i after.png --model ./Qwen3-VL-2B-Instruct "What has changed?"`

    `qvl ask --video street.mp4 --model Qwen/Qwen3-VL-2B-Instruct --temperature 0.7 --top-p 0.8 "What happens?"`
    """
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    generation = _generation(max_new_tokens, temperature, seed, cache, **filters)
    if not question.strip():
        raise ValueError("the question is empty")
    images, videos = _media(image, video)
    loaded = Choice(model, weights, device, threads, attention, max_memory).load()
    _print_stream(loaded.chat(question, images, videos, stream=True, **generation))  # type: ignore[arg-type]


@app.command()
def chat(
    image: ImagesOption = None,
    video: VideosOption = None,
    model: ModelOption = None,
    weights: WeightsOption = "auto",
    attention: AttentionOption = None,
    cache: CacheOption = None,
    max_memory: MemoryOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
) -> None:
    """Talk in several turns; `/image FILE` on a line of its own adds a picture on the way.

    `/image FILE` and `/video FILE` go with the next question, `/reset` begins a new conversation, `/quit` (or Ctrl-D)
    leaves. Ctrl-C stops an answer.

    Example: `qvl chat --image scene.png`
    """
    from .interactive import converse

    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    generation = _generation(max_new_tokens, temperature, seed, cache, **filters)
    images, videos = _media(image, video)
    loaded = Choice(model, weights, device, threads, attention, max_memory).load()
    converse(loaded, images, videos, generation)


@app.command("eval")
def evaluate(
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions.")] = None,
    tsv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Questions as VLMEvalKit writes them: tab-separated index, image (base64), question, answer, "
            "optionally category, hint, A, B, C, D. Default: the benchmark that ships.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write every answer and the accuracies here.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 16,
    model: ModelOption = None,
    weights: WeightsOption = "auto",
    attention: AttentionOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_new_tokens: TokensOption = 32,
    precision: PrecisionOption = "medium",
) -> None:
    """Accuracy on image questions, per category and overall.

    An answer is right if it equals the expected one but for case, spaces and a final full stop; for multiple choice it
    may be the letter or the option's text. Ctrl-C prints the result so far.

    Examples:

    `qvl eval --limit 200`

    `qvl eval --model ./Qwen3-VL-2B-Instruct --tsv MMBench_DEV_EN.tsv --json result.json`
    """
    from .evaluate import answer_questions, read_tsv, run_benchmark
    from .files import check_writable, write_then_rename

    if json_file is not None:
        check_writable(json_file)
    questions = read_tsv(tsv or SHIPPED_MODEL / BENCHMARK_NAME, limit)
    loaded = Choice(model, weights, device, threads, attention, precision=precision).load()
    answer = answer_questions(loaded, max_new_tokens=max_new_tokens)
    report = run_benchmark(answer, questions, batch_size=batch_size)
    typer.echo(report.table())
    if json_file is not None:
        write_then_rename(json_file, lambda file: file.write_text(report.to_json(), encoding="utf-8"))
    if len(report.records) < report.asked:
        raise typer.Exit(130)


@app.command()
def pack(
    checkpoint: Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="A released checkpoint: folder or hub id.")],
    out: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    weights: Annotated[str, typer.Option(help="bf16, int8 (half of it) or int4 (a third).")] = "int8",
    verify: Annotated[bool, typer.Option("--verify", help="Only compare a packed folder with its checksums.")] = False,
) -> None:
    """Write a checkpoint with packed weights, which load by mapping the file: nothing is read before it is used.

    One matrix at a time is in memory. A run that was cut off goes on where it stopped; only a complete file loads.

    Examples:

    `qvl pack Qwen/Qwen3-VL-2B-Instruct ./qwen-int8 --weights int8`

    `qvl pack ./qwen-int8 --verify`
    """
    from tqdm import tqdm

    from .pack_file import pack_checkpoint
    from .pack_file import verify as verify_checksums
    from .packing import FORMATS

    if verify == (out is not None):
        raise ValueError("give a checkpoint and the folder to write, or a packed folder and --verify")
    if weights not in FORMATS:
        raise ValueError(f"--weights must be one of {', '.join(FORMATS)}, got {weights!r}")
    with tqdm(unit="tensor", leave=False, delay=1.0, disable=None) as bar:
        if out is None:
            count = verify_checksums(checkpoint, lambda name: bar.update())
            typer.echo(f"{checkpoint}: all {count} tensors have their checksums")
        else:
            folder = pack_checkpoint(checkpoint, out, weights, lambda name: bar.update())
            nbytes = sum(file.stat().st_size for file in folder.iterdir())
            typer.echo(f"{folder}: {nbytes / 2**20:.1f} MiB, packed as {weights}")


@app.command()
def bench(
    test: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A test: pp512 (a prompt), tg128 (generation), 'tg128 @ d4096' (behind 4096 tokens), 'image 448', "
            "with any numbers; repeatable. Default: image 448, image 1024, pp512, tg128, tg128 @ d4096.",
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions; the median is shown.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the results here.")
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = "auto",
    attention: AttentionOption = None,
    cache: CacheOption = None,
    max_memory: MemoryOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    precision: PrecisionOption = "medium",
) -> None:
    """Speed of prompts, generation and pictures on this machine, time to load, and peak memory beside the predicted
    one.

    Example: `qvl bench --model ./Qwen3-VL-2B-Instruct --weights int8 --test pp512 --test tg128`
    """
    from .benchmark import TESTS, check_tests, report
    from .files import check_writable, write_then_rename

    check_tests(test or TESTS)
    if json_file is not None:
        check_writable(json_file)
    choice = Choice(model, weights, device, threads, attention, max_memory, precision)

    def told(name: str) -> None:
        typer.echo(f"{name} ...", err=True)

    found = report(lambda: choice.load(with_processor=False), test, repeat=repeat, cache=cache, advance=told)
    typer.echo(found.text)
    if json_file is not None:
        write_then_rename(json_file, lambda file: file.write_text(found.json + "\n", encoding="utf-8"))


@app.command()
def info(
    model: ModelOption = None,
    max_memory: MemoryOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer to plan for.")] = 4096,
    image_size: Annotated[int, typer.Option(min=0, help="Side in pixels of the largest picture to plan for.")] = 1024,
) -> None:
    """Versions, this machine, the kernel backends that run on it and why the others do not, and a model's sizes: what
    each weight format takes in memory, and which one fits.

    Examples:

    `qvl info --model ./Qwen3-VL-2B-Instruct`

    `qvl info --model ./Qwen3-VL-2B-Instruct --max-memory 4GB --tokens 16384`
    """
    import torch

    from .config import Qwen3VLConfig
    from .info import aligned, describe_kernels, describe_machine, describe_model, describe_plans, describe_versions
    from .memory import available_memory, parse_bytes
    from .planning import Use
    from .processor import PROCESSOR_FILES, find_folder
    from .weights import CONFIG_NAME

    typer.echo(f"{describe_versions()}\n")
    typer.echo(f"{aligned(describe_machine())}\n")
    typer.echo(f"{describe_kernels()}\n")
    # Of a hub repository only the small files are fetched: its weights are not needed to say how large they are.
    folder = find_folder(model, PROCESSOR_FILES) if model else SHIPPED_MODEL
    typer.echo(f"{aligned(describe_model(folder))}\n")
    side = image_size // Qwen3VLConfig.from_json(folder / CONFIG_NAME).vision.patch_size
    budget = available_memory(torch.device("cpu")) if max_memory is None else parse_bytes(max_memory)
    typer.echo(describe_plans(folder, budget, Use(tokens, side * side)))


def main() -> None:
    """The entry point of the command `qvl`."""
    app(prog_name="qvl")


if __name__ == "__main__":
    main()
