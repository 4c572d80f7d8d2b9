"""Writes measured figures between markers, of whole models in README.md and of operations in BENCHMARKS.md, and draws
bench/generation.png and bench/attention.png.

python bench/report.py bench_native.json bench_avx2.json             of `pytest bench --qvl-json FILE`
python bench/report.py --models models_native.json models_avx2.json  of `bench_generate.py --json FILE`
"""

import json
import sys
from pathlib import Path
from statistics import median

from bench_generate import generation_table
from timing import Row, density_table, table, write_in


def section(path: str) -> str:
    """One machine's table with the line that says what it was measured on."""
    content = json.loads(Path(path).read_text())
    facts = content["machine"]
    head = (
        f"{facts['cpu']}, {facts['threads']} threads, {facts['capability']}, torch {facts['torch']}, "
        f"commit {facts['commit']}; roofs in the same run: {facts['read_gbytes']} GB/s read, "
        f"{facts['fma_gflops']} GFLOP/s float32, {facts['int8_gops']} Gop/s int8"
        + (f", {facts['bf16_gflops']} GFLOP/s bfloat16." if facts.get("bf16_gflops") else ".")
    )
    rows = [Row(**row) for row in content["rows"]]
    return "\n\n".join(part for part in (head, table(rows), density_table(rows)) if part)


def plot(paths: list[str], series: str, to: Path) -> None:
    """Speed over length of one series: ours, torch's and the FMA peak measured beside them, a panel for each file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(paths), figsize=(5.2 * len(paths), 3.6), sharey=True, squeeze=False)
    for axes, path in zip(panels[0], paths):
        content = json.loads(Path(path).read_text())
        rows = sorted((Row(**row) for row in content["rows"] if row["series"] == series), key=lambda row: row.length)
        lengths = [row.length for row in rows]
        axes.plot(lengths, [row.fma_gflops for row in rows], "--", color="0.5", label="FMA peak")
        axes.plot(lengths, [row.gflops for row in rows], "o-", label="qvl_kernels")
        axes.plot(lengths, [row.flops / row.torch_us / 1e3 for row in rows], "s-", label="torch")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(xlabel="tokens", title=f"{series}, {content['machine']['capability']}")
        axes.grid(alpha=0.3)
    panels[0][0].set(ylabel="GFLOP/s", ylim=(0, None))
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(to, dpi=110, metadata={"Software": None})


def models_section(path: str) -> str:
    """The table of `bench_generate.py` with the roofs that our own processes measured."""
    results = json.loads(Path(path).read_text())
    ours = [found for engine, found in results.items() if engine.startswith("qvl")]
    fma, read = (median(found[roof] for found in ours) for roof in ("fma_gflops", "read_gbytes"))
    where = f"{ours[0]['cpu']}, {ours[0]['capability']}, {ours[0]['threads']} threads, commit {ours[0]['commit']}"
    head = (
        f"{where}; roofs in the same processes: {read:.1f} GB/s read, {fma:.0f} GFLOP/s float32. At the read roof the "
        "weights of a token's text allow: "
    )
    limits = [
        f"{engine[4:]} {read * 1e9 / found['text_bytes']:.1f} tokens/s"
        for engine, found in results.items()
        if engine.startswith("qvl")
    ]
    return f"{head}{', '.join(limits)}.\n\n{generation_table(results)}"


def plot_models(paths: list[str], to: Path) -> None:
    """Tokens a second of every engine: a prompt, generation, and generation behind 4096 tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(paths), 3, figsize=(12, 3.4 * len(paths)), squeeze=False)
    for row, path in zip(panels, paths):
        results = json.loads(Path(path).read_text())
        names = list(results)[::-1]
        capability = next(found["capability"] for found in results.values() if "capability" in found)
        for axes, test in zip(row, ("pp512", "tg32", "tg32 @ d4096")):
            values = [results[name].get(test, 0.0) for name in names]
            colors = ["tab:blue" if name.startswith("qvl") else "0.7" for name in names]
            axes.bar_label(axes.barh(names, values, color=colors), fmt="%.1f", padding=2, fontsize=8)
            axes.set(title=f"{test}, {capability}", xlabel="tokens/s", xlim=(0, 1.15 * max(values)))
            axes.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    figure.savefig(to, dpi=100, metadata={"Software": None})


def main(paths: list[str]) -> None:
    if paths[0] == "--models":
        plot_models(paths[1:], Path(__file__).with_name("generation.png"))
        write_in("README.md", "models", "\n\n".join(map(models_section, paths[1:])))
        return
    plot(paths, "causal 16/8 x 128, fp32", Path(__file__).with_name("attention.png"))
    write_in("BENCHMARKS.md", "bench", "\n\n".join(map(section, paths)))


if __name__ == "__main__":
    main(sys.argv[1:])
