"""Draws bench/favor_error.png: the relative error of FAVOR+'s phi(q) . phi(k), measured, over what its paper predicts.

python bench/favor_error.py

Each point is the root mean square over 40 projections and pairs of Gaussian directions, 2e7 features a point, as in
tests/test_favor_features.py; the line is sqrt((exp(|q' + k'|^2) - 1) / M) (Choromanski et al., 2021, lemma 2). Qwen3's
queries and keys have |q' + k'|^2 of about 22: far beyond the right edge.
"""

import math
from pathlib import Path

import torch

from qvl_kernels import FavorFeatures

DIM, DRAWS, SAMPLES = 64, 40, 2e7
FEATURES = (64, 256, 1024)
SQUARES = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)


def measured(squared: float, features: int) -> float:
    """Root mean square of phi(q) . phi(k) / exp(q . k / sqrt(D)) - 1."""
    generator = torch.Generator().manual_seed(10**6)
    q, k = torch.randn(2, int(SAMPLES / DRAWS / features), DIM, generator=generator)
    scale = math.sqrt(squared) * DIM**0.25 / (q + k).norm(dim=-1, keepdim=True)
    q, k = q * scale, k * scale
    exact, total = torch.exp((q * k).sum(-1) / math.sqrt(DIM)), 0.0
    for seed in range(DRAWS):
        favor = FavorFeatures(DIM, features, seed=seed)
        total += ((favor(q) * favor(k)).sum(-1) / exact - 1).square().mean().item()
    return math.sqrt(total / DRAWS)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    squares = torch.linspace(0.1, 6, 60)
    for features, color in zip(FEATURES, ("C0", "C1", "C2")):
        axes.plot(squares, (squares.exp().sub(1) / features).sqrt(), color=color, label=f"M = {features}, predicted")
        axes.plot(
            SQUARES, [measured(s, features) for s in SQUARES], "o", color=color, label=f"M = {features}, measured"
        )
    axes.set_yscale("log")
    axes.set(xlabel="|q' + k'|²", ylabel="relative error", title=f"FAVOR+ features, D = {DIM}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("favor_error.png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
