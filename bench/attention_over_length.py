"""Time over length of exact, sparse and linear attention, and the lengths at which one passes another.

python bench/attention_over_length.py --json native.json [--lengths 256 512 ...]     measures (about two minutes)
ATEN_CPU_CAPABILITY=avx2 python bench/attention_over_length.py --json avx2.json
python bench/attention_over_length.py native.json avx2.json      writes BENCHMARKS.md's section and draws the figure

Forward, causal, batch 1, 8 heads of 128, float32. exact: `attention`. sparse: blocks of 64, the diagonal and as many
others, drawn at random below it, as make the density; density 1 is all that exact attention computes, too, and a line
begins where its blocks are more than the diagonal. linear: `linear_attention` with FAVOR+ features, another function.
Interleaved medians; a length whose round takes more than SECONDS_A_LENGTH has one, without a warm-up.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from timing import facts, seconds_of, write_in

from qvl_kernels import FavorFeatures, SparsePattern, attention, linear_attention, sparse_attention

HEADS, DIM, BLOCK = 8, 128, 64
LENGTHS = tuple(2**n for n in range(8, 16))
DENSITIES = (1, 2, 4, 8, 16)  # one in so many blocks
FEATURES = (64, 128, 256)
SECONDS_A_LENGTH, ROUNDS = 8.0, 15
FIGURE = Path(__file__).with_name("attention_over_length.png")


def density_name(one_in: int) -> str:
    return "sparse 1" if one_in == 1 else f"sparse 1/{one_in}"


METHODS = ["exact", *map(density_name, DENSITIES), *(f"linear M = {features}" for features in FEATURES)]
Times = dict[str, dict[int, float]]  # seconds by method and length


class Crossing(NamedTuple):
    """Where a method gets faster than exact attention: first measured length, or between two of them."""

    method: str
    length: float | None  # None: nowhere
    first: bool  # already at the first length it has


def random_blocks(length: int, one_in: int) -> SparsePattern | None:
    """1 / one_in of the blocks on and below the diagonal, the diagonal first; None where that is less than it."""
    rows = length // BLOCK
    pairs = rows * (rows + 1) // 2
    if pairs // one_in < rows:
        return None
    order = torch.rand(rows, rows, generator=torch.Generator().manual_seed(length)).tril_().fill_diagonal_(1.0)
    chosen = order.flatten().topk(pairs // one_in).indices
    return SparsePattern.from_layout(torch.zeros(rows * rows).scatter_(0, chosen, 1.0).view(rows, rows), BLOCK)


def methods(length: int) -> dict[str, Callable[[], object]]:
    q, k, v = torch.randn(3, 1, HEADS, length, DIM)
    runs: dict[str, Callable[[], object]] = {"exact": lambda: attention(q, k, v, causal=True)}
    for one_in in DENSITIES:
        if (pattern := random_blocks(length, one_in)) is not None:
            runs[density_name(one_in)] = lambda p=pattern: sparse_attention(q, k, v, p, causal=True)
    for features in FEATURES:
        favor = FavorFeatures(DIM, features, seed=0)
        runs[f"linear M = {features}"] = lambda f=favor: linear_attention(q, k, v, feature_map=f, causal=True)
    return runs


def measure(length: int) -> dict[str, float]:
    runs = methods(length)
    first = {name: seconds_of(run) for name, run in runs.items()}
    rounds = min(ROUNDS, int(SECONDS_A_LENGTH / sum(first.values())))
    times = [{name: seconds_of(run) for name, run in runs.items()} for _ in range(rounds)] or [first]
    return {name: median(one[name] for one in times) for name in runs}


def crossing(times: Times, method: str) -> Crossing:
    """The shortest length from which on the method is faster than exact at every length measured; between two lengths
    the logarithm of the ratio is taken to be straight over the logarithm of the length."""
    lengths = sorted(times[method])
    ratios = [math.log2(times["exact"][n] / times[method][n]) for n in lengths]
    slower = [i for i, ratio in enumerate(ratios) if ratio <= 0]
    if not slower:
        return Crossing(method, lengths[0], True)
    if (i := slower[-1]) == len(lengths) - 1:
        return Crossing(method, None, False)
    part = -ratios[i] / (ratios[i + 1] - ratios[i])
    return Crossing(method, lengths[i] * (lengths[i + 1] / lengths[i]) ** part, False)


def crossing_text(of: Crossing) -> str:
    if of.length is None:
        return "not up to the longest measured"
    return f"{of.length:.0f}, the first measured" if of.first else f"about {of.length:.0f}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def time_table(times: Times) -> str:
    lengths = sorted(times["exact"])
    lines = [
        "| time, ms | " + " | ".join(map(str, lengths)) + " | faster than exact from |",
        "| --- |" + " ---: |" * (len(lengths) + 1),
    ]
    for name, by_length in times.items():
        cells = [milliseconds(by_length[n]) if n in by_length else "-" for n in lengths]
        last = "" if name == "exact" else crossing_text(crossing(times, name))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {last} |")
    return "\n".join(lines)


def density_table(times: Times) -> str:
    """How many times faster than exact, and the share of 1 / density that this is."""
    lengths = [n for n in sorted(times["exact"]) if n >= 2048]
    lines = ["| times faster than exact (of 1 / density) | " + " | ".join(map(str, lengths)) + " |"]
    lines.append("| --- |" + " ---: |" * len(lengths))
    for one_in in DENSITIES:
        by_length = times.get(density_name(one_in), {})  # short lengths alone have no low densities
        ratios = [times["exact"][n] / by_length[n] if n in by_length else None for n in lengths]
        cells = ["-" if ratio is None else f"{ratio:.2f} ({100 * ratio / one_in:.0f} %)" for ratio in ratios]
        lines.append(f"| {density_name(one_in)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(content: dict) -> str:
    machine = content["machine"]
    head = f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}, commit {machine['commit']}:"
    times = read_times(content)
    return "\n\n".join((head, time_table(times), density_table(times)))


def read_times(content: dict) -> Times:
    return {name: {int(n): s for n, s in by_length.items()} for name, by_length in content["seconds"].items()}


def draw(contents: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shades = [plt.cm.Blues(x / 10) for x in (9, 8, 7, 5, 4)] + [plt.cm.Oranges(x / 10) for x in (4, 6, 9)]
    colors = dict(zip(METHODS, ["k", *shades]))
    figure, panels = plt.subplots(1, len(contents), figsize=(5.2 * len(contents), 4.2), sharey=True, squeeze=False)
    for axes, content in zip(panels[0], contents):
        times = read_times(content)
        for name, by_length in times.items():
            lengths = sorted(by_length)
            axes.plot(lengths, [1e3 * by_length[n] for n in lengths], ".-", color=colors[name], label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted(times["exact"])
        axes.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
        axes.set(xlabel="tokens", title=f"causal, {HEADS} x {DIM}, fp32, {content['machine']['capability']}")
        axes.grid(alpha=0.3)
    panels[0][0].set(ylabel="milliseconds")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="*", help="JSON files to write about, a panel and a table for each")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="multiples of 64")
    parser.add_argument("--json", metavar="OUT", help="where to write what is measured")
    arguments = parser.parse_args()
    if arguments.measured:
        contents = [json.loads(Path(path).read_text()) for path in arguments.measured]
        write_in("BENCHMARKS.md", "length", "\n\n".join(map(section, contents)))
        draw(contents)
        return
    torch.manual_seed(0)
    times: Times = {}
    with torch.no_grad():
        for length in sorted(arguments.lengths):
            for name, value in measure(length).items():
                times.setdefault(name, {})[length] = value
    content = {"machine": facts(), "seconds": {name: times[name] for name in METHODS if name in times}}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")
    print(section(content))


if __name__ == "__main__":
    main()
