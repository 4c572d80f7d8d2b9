"""Draws the patterns of sparse attention that the README shows.

python examples/sparse_patterns.py [FILE.png]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt

from qvl_kernels import SparsePattern

LENGTH, BLOCK = 1024, 32


def patterns() -> dict[str, SparsePattern]:
    """By the name of their constructor."""
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 1, LENGTH, 16, generator=generator) for _ in range(2))
    query[..., 0] += 3.0
    key[:, :, 256:288, 0] += 6.0  # a column that all look at
    size = {"len_q": LENGTH, "len_k": LENGTH, "block": BLOCK}
    return {
        "sliding_window, sinks": SparsePattern.sliding_window(**size, window=200, sinks=32),
        "strided": SparsePattern.strided(**size, stride=6, local=3),
        "big_bird": SparsePattern.big_bird(**size, random_blocks=3, seed=0),
        "vertical_slash": SparsePattern.vertical_slash(query, key, vertical=3, slash=4, block=BLOCK),
    }


def main(path: str) -> None:
    figure, panels = plt.subplots(1, 4, figsize=(11, 3.1), layout="constrained")
    for axes, (name, pattern) in zip(panels, patterns().items()):
        image = pattern.plot().axes[0].images[0]
        axes.imshow(image.get_array(), cmap=image.cmap, norm=image.norm, extent=image.get_extent())
        axes.set(title=f"{name}\ndensity {pattern.density():.2f}", xlabel="key", xticks=[0, 512, 1024])
        axes.set(yticks=[0, 512, 1024])
    panels[0].set(ylabel="query")
    figure.savefig(path, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_suffix(".png")))
