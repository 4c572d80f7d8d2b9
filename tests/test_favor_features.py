"""The feature maps: what the projection is, and the statistics of FAVOR+ that its paper states."""

from __future__ import annotations

import math

import pytest
import torch

from qvl_kernels import EluFeatures, FavorFeatures


@pytest.mark.parametrize(("dim", "features"), [(8, 8), (8, 5), (8, 20), (1, 3), (64, 256)])
def test_blocks_of_rows_are_orthogonal(dim, features):
    w = FavorFeatures(dim, features, seed=1).projection.double()
    assert w.shape == (features, dim)
    for block in w.split(dim):
        unit = block / block.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(block)).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_rows_are_gaussian(orthogonal):
    """Squared lengths are chi-squared with D degrees (mean D, variance 2 D); every entry has mean 0 and variance 1."""
    dim, features = 16, 16 * 400
    w = FavorFeatures(dim, features, seed=5, orthogonal=orthogonal).projection.double()
    squares = w.square().sum(-1)
    assert abs(squares.mean() - dim) < 4 * math.sqrt(2 * dim / features)
    assert abs(squares.var() / (2 * dim) - 1) < 4 * math.sqrt((2 + 12 / dim) / features)
    assert w.mean(0).abs().max() < 5 / math.sqrt(features)
    assert (w.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / features)


def test_the_seed_is_all_there_is():
    a, b = FavorFeatures(8, 12, seed=3), FavorFeatures(8, 12, seed=3)
    torch.manual_seed(99)
    assert torch.equal(a.projection, b.projection)
    b.redraw(4)
    assert not torch.equal(a.projection, b.projection)
    assert list(a.state_dict()) == ["projection"]
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.projection, b.projection)
    assert not list(a.parameters())
    a.train()(torch.randn(3, 8))
    assert torch.equal(a.projection, b.projection), "never redrawn implicitly"


def pairs(dim: int, squared: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian q and k, as far apart as they fall, scaled together so that |q' + k'|^2 is `squared`."""
    generator = torch.Generator().manual_seed(10**6)  # not a seed of a projection: they would be the same numbers
    q, k = torch.randn(2, count, dim, dtype=torch.float64, generator=generator)
    scale = math.sqrt(squared) * dim**0.25 / (q + k).norm(dim=-1, keepdim=True)
    return q * scale, k * scale


@pytest.mark.parametrize("features", [64, 256, 1024])
@pytest.mark.parametrize("squared", [0.5, 1.0, 2.0, 4.0])
def test_the_error_is_what_the_theory_predicts(squared, features):
    """Root mean square of phi(q) . phi(k) / exp(q . k / sqrt(D)) - 1 over projections and pairs, against
    sqrt((exp(|q' + k'|^2) - 1) / M) (Choromanski et al., lemma 2); orthogonal rows may only lower it. The square of a
    log-normal variable has a long tail: its mean needs exp(4 |q' + k'|^2) samples to settle."""
    dim, total, draws = 64, 0.0, 40
    samples = 2e6 if squared <= 1 else 2e7
    q, k = (x.float() for x in pairs(dim, squared, int(samples / draws / features)))
    exact = torch.exp((q * k).sum(-1) / math.sqrt(dim))
    for seed in range(draws):
        favor = FavorFeatures(dim, features, seed=seed)
        total += (((favor(q) * favor(k)).sum(-1) / exact - 1) ** 2).mean().item()
    measured, predicted = math.sqrt(total / draws), math.sqrt((math.exp(squared) - 1) / features)
    assert predicted / 1.5 <= measured <= 1.5 * predicted, (measured, predicted)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_unbiased_over_redraws(orthogonal):
    favor = FavorFeatures(32, 64, seed=0, orthogonal=orthogonal)
    q, k = pairs(32, 1.0, 20)
    exact = torch.exp((q * k).sum(-1) / math.sqrt(32))
    estimates = []
    for seed in range(200):
        favor.redraw(seed)
        estimates.append((favor(q) * favor(k)).sum(-1) / exact)
    estimates = torch.stack(estimates)
    # One pair's mean lies beyond three standard errors once in 370; all pairs share the projections, so the mean of
    # them is one estimate, and no pair of 20 is beyond four.
    whole = estimates.mean(-1)
    assert abs(whole.mean() - 1) <= 3 * whole.std() / math.sqrt(200)
    error = (estimates.mean(0) - 1).abs() / (estimates.std(0) / math.sqrt(200))
    assert error.max() <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_elu(dtype):
    x = torch.tensor([-200.0, -1.5, -0.0, 0.0, 2.0], dtype=dtype)
    phi = EluFeatures()(x)
    assert phi.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        phi.double(), torch.where(x > 0, x.double() + 1, x.double().exp()), atol=1e-12, rtol=1e-6
    )


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_sizes_must_be_positive_integers(size):
    with pytest.raises(ValueError, match="FavorFeatures: head_dim must be a positive integer, got"):
        FavorFeatures(size, 8, seed=0)
    with pytest.raises(ValueError, match="FavorFeatures: num_features must be a positive integer, got"):
        FavorFeatures(8, size, seed=0)


def test_a_wrong_head_dim_is_named():
    with pytest.raises(ValueError, match=r"FavorFeatures: x must have shape \(..., D\) = \(..., 8\), got \(3, 4\)"):
        FavorFeatures(8, 4, seed=0)(torch.randn(3, 4))
