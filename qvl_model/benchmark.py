"""How fast a model is on this machine: what `qvl bench` measures, under the names that llama-bench uses.

    pp512          tokens a second of a prompt of 512 tokens
    tg128          tokens a second, one after the other, behind an empty prompt
    tg128 @ d4096  the same behind 4096 tokens
    image 448      seconds for a picture of 448 x 448 pixels, without its decoding and scaling

Weights and inputs do not change the time, so random ones do: a prompt is of random tokens, a cache behind which tokens
are generated is filled with random keys and values, a picture is noise.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch

from .decoding import Decoder
from .info import aligned, describe_machine, describe_versions, peak_memory, size
from .model import Qwen3VL
from .planning import CACHES
from .prefill import prefill

# Pictures first, as in a conversation: what is mapped of vision's weights stays in memory behind them.
TESTS = ("image 448", "image 1024", "pp512", "tg128", "tg128 @ d4096")
_NAME = re.compile(r"pp(?P<prompt>\d+)|tg(?P<tokens>\d+)(?: @ d(?P<depth>\d+))?|image (?P<side>\d+)")


@dataclass(frozen=True)
class Result:
    """`values` of the repetitions, in the unit "tokens/s" or "s"."""

    test: str
    unit: str
    values: tuple[float, ...]

    @property
    def value(self) -> float:
        return median(self.values)


def check_tests(tests: Sequence[str]) -> None:
    """Raises ValueError unless all names are such as in the table on top of this file, with any numbers above 0."""
    for test in tests:
        match = _NAME.fullmatch(test)
        if match is None or any(number == 0 for number in map(int, filter(None, match.groups()))):
            raise ValueError(f"there is no test {test!r}; they are called {', '.join(map(repr, TESTS))}")


@dataclass(frozen=True)
class Report:
    """What `qvl bench` prints and writes."""

    text: str
    json: str


def report(
    load: Callable[[], Qwen3VL],
    tests: Sequence[str] | None,
    *,
    repeat: int,
    cache: str | None,
    advance: Callable[[str], object],
) -> Report:
    """Loads a model and measures it; without `tests` those of `TESTS` that are not longer than its positions."""
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    results = measure(model, tests or fitting(TESTS, model), repeat=repeat, cache=cache, advance=advance)
    assert model.plan is not None
    peak, predicted = peak_memory(), model.plan.peak
    rows = [("weights", model.plan.weights), ("load", f"{seconds:.2f} s")]
    rows += [(result.test, f"{result.value:.4g} {result.unit}") for result in results]
    use = "predicted for 4096 tokens and a picture of 1024 x 1024"
    rows += [("peak memory", f"{size(peak)} ({use}: {size(predicted)})")]
    machine = describe_machine()
    content = {
        "machine": dict(machine),
        "weights": model.plan.weights,
        "load_s": seconds,
        "peak_bytes": peak,
        "predicted_bytes": predicted,
        "results": [asdict(result) | {"value": result.value} for result in results],
    }
    text = f"{describe_versions()}\n{aligned(machine)}\n\n{aligned(rows)}"
    return Report(text, json.dumps(content, indent=1))


def fitting(tests: Sequence[str], model: Qwen3VL) -> list[str]:
    """Those that are not longer than the model's positions."""
    limit = model.config.text.max_position_embeddings
    lengths = {test: sum(map(int, re.findall(r"\d+", test))) for test in tests if not test.startswith("image")}
    return [test for test in tests if lengths.get(test, 0) <= limit]


@torch.no_grad()
def measure(
    model: Qwen3VL,
    tests: Sequence[str] = TESTS,
    *,
    repeat: int = 3,
    cache: str | None = None,
    advance: Callable[[str], object] = lambda test: None,
) -> list[Result]:
    """One result for each test, each repeated after a short warm-up.

    Args:
        tests: names such as in `TESTS`.
        cache: format of keys and values; None is the model's choice.
        advance: is told the name of each test before it runs.

    Raises:
        ValueError: a name is unknown, or longer than the model's positions.
    """
    check_tests(tests)
    results = []
    for test in tests:
        advance(test)
        match = _NAME.fullmatch(test)
        assert match is not None
        number = {name: int(text) for name, text in match.groupdict(default="0").items()}
        if number["prompt"]:
            unit, run = "tokens/s", _prompt(model, number["prompt"], cache)
        elif number["tokens"]:
            unit, run = "tokens/s", _generation(model, number["tokens"], number["depth"], cache)
        else:
            unit, run = "s", _picture(model, number["side"])
        results.append(Result(test, unit, tuple(run() for _ in range(repeat))))
        del run  # and its cache, before the next test makes one
    return results


def _prompt(model: Qwen3VL, tokens: int, cache: str | None) -> Callable[[], float]:
    def run(count: int = tokens) -> float:
        ids = torch.randint(model.config.text.vocab_size, (1, count), device=model.device)
        ids[(ids == model.config.image_token_id) | (ids == model.config.video_token_id)] = 0
        memory = model.new_cache(1, count, CACHES[cache] if cache else None)
        start = time.perf_counter()
        model.lm_head(prefill(model, model.embed_inputs(ids), memory, model.prefill_chunk))
        return count / (time.perf_counter() - start)

    run(min(tokens, 32))
    return run


def _generation(model: Qwen3VL, tokens: int, depth: int, cache: str | None) -> Callable[[], float]:
    memory = model.new_cache(1, depth + tokens + 1, CACHES[cache] if cache else None)
    limit = model.config.text.max_position_embeddings
    if depth + tokens > limit:
        raise ValueError(f"{tokens} tokens behind {depth} are more than the model's {limit} positions")
    memory.fill(depth)
    decoder = Decoder(model, memory)

    def run() -> float:
        memory.truncate(torch.tensor([depth]))
        token = decoder(torch.tensor([1], device=model.device)).argmax(-1)  # its recording is not timed
        start = time.perf_counter()
        for _ in range(tokens):
            token = decoder(token).argmax(-1)
        return tokens / (time.perf_counter() - start)

    return run


def _picture(model: Qwen3VL, side: int) -> Callable[[], float]:
    vision = model.config.vision
    unit = vision.patch_size * vision.spatial_merge_size
    rows = max(1, side // unit) * vision.spatial_merge_size
    grid = torch.tensor([[1, rows, rows]], device=model.device)

    def run(grid: torch.Tensor = grid) -> float:
        pixels = torch.randn(int(grid.prod()), vision.patch_dim, device=model.device)
        start = time.perf_counter()
        model.model.visual(pixels, grid)
        return time.perf_counter() - start

    run(torch.tensor([[1, vision.spatial_merge_size, vision.spatial_merge_size]], device=model.device))
    return run
