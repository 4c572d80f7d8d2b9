"""Writes the rows of `pytest bench --qvl-json FILE` into README.md, between its markers, and draws bench/attention.png.

python bench/report.py bench_native.json bench_avx2.json
"""

import json
import sys
from pathlib import Path

from timing import Row, density_table, table

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def section(path: str) -> str:
    """One machine's table with the line that says what it was measured on."""
    content = json.loads(Path(path).read_text())
    facts = content["machine"]
    head = (
        f"{facts['cpu']}, {facts['threads']} threads, {facts['capability']}, torch {facts['torch']}, "
        f"commit {facts['commit']}; roofs in the same run: {facts['read_gbytes']} GB/s read, "
        f"{facts['fma_gflops']} GFLOP/s float32."
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


def main(paths: list[str]) -> None:
    readme = Path(__file__).resolve().parent.parent / "README.md"
    text = readme.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    plot(paths, "causal 16/8 x 128, fp32", Path(__file__).with_name("attention.png"))
    readme.write_text(before + BEGIN + "\n" + "\n\n".join(map(section, paths)) + "\n" + END + after)


if __name__ == "__main__":
    main(sys.argv[1:])
