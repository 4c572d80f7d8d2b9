"""Filters equal transformers' logits processors; draws follow the filtered distribution and the row's own seed."""

from __future__ import annotations

import math

import pytest
import torch

from qvl_model.sampling import (
    Sampler,
    SamplingOptions,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)


def logits(rows: int = 5, vocabulary: int = 97) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("k", [1, 2, 17, 97, 1000])
def test_top_k(k):
    from transformers import TopKLogitsWarper

    assert torch.equal(keep_top_k(logits(), k), TopKLogitsWarper(k)(None, logits()))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(p):
    from transformers import TopPLogitsWarper

    assert torch.equal(keep_top_p(logits(), p), TopPLogitsWarper(p)(None, logits()))


def test_top_p_stops_where_the_mass_is_reached():
    assert keep_top_p(torch.zeros(1, 4), 0.5).isfinite().sum() == 2


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 0.95, 0.9999])
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(p, scale):
    """A nucleus of one token, of hundreds, and (almost) all of 20,000: the search widens until it has the mass. In
    float64 no rounding decides where it ends."""
    x = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    x[1] *= 2  # rows whose nuclei differ in size
    ordered, index = x.sort(dim=-1, descending=True)
    mass = ordered.softmax(-1)
    outside = mass.cumsum(-1) - mass >= p
    kept = keep_top_p(x, p).isfinite()
    if scale == 0:  # all equal: any of them
        assert ((kept.sum(-1) - (~outside).sum(-1)).abs() <= 1).all()
    else:
        assert torch.equal(kept, torch.zeros_like(kept).scatter(-1, index, ~outside))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 1.0])
def test_min_p(p):
    from transformers import MinPLogitsWarper

    assert torch.equal(keep_min_p(logits(), p), MinPLogitsWarper(p)(None, logits()))


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = torch.randint(0, 97, (5, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 97, dtype=torch.bool).scatter(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits())
    assert torch.equal(penalize_repetition(logits(), seen, penalty), theirs)


def test_all_together_in_their_order():
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    theirs = LogitsProcessorList(
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]
    )
    options = SamplingOptions(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05)
    assert torch.equal(filter_logits(logits(), options), theirs(None, logits()))


def sampler(options: SamplingOptions, rows: int) -> Sampler:
    return Sampler(options, [torch.tensor([1, 2])] * rows, 97, torch.device("cpu"))


def test_draws_follow_the_distribution():
    """Chi-squared of 20,000 draws from 8 kept tokens stays below its 1e-6 quantile for 7 degrees of freedom (40.5)."""
    options = SamplingOptions(do_sample=True, temperature=1.5, top_k=8, seed=0)
    row = logits(1)
    draw = sampler(options, 1)
    counts = torch.bincount(torch.cat([draw(row) for _ in range(20_000)]), minlength=97)
    expected = filter_logits(row, options).softmax(-1)[0] * 20_000
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert kept.sum() == 8
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 40.5


def test_a_row_draws_what_it_draws_alone():
    options = SamplingOptions(do_sample=True, seed=11)
    together = sampler(options, 4)
    drawn = torch.stack([together(logits(4)) for _ in range(6)])
    for row in range(4):
        alone = sampler(SamplingOptions(do_sample=True, seed=[11 + row]), 1)
        assert drawn[:, row].tolist() == [int(alone(logits(4)[row : row + 1])) for _ in range(6)]
    assert len({tuple(column) for column in drawn.T.tolist()}) > 1


def test_greedy_with_a_penalty_remembers_what_it_said():
    from transformers import RepetitionPenaltyLogitsProcessor

    draw = sampler(SamplingOptions(repetition_penalty=5.0), 2)
    ids = torch.tensor([[1, 2]] * 2)
    for _ in range(10):
        expected = RepetitionPenaltyLogitsProcessor(5.0)(ids, logits(2)).argmax(-1)
        assert torch.equal(draw(logits(2)), expected)
        ids = torch.cat((ids, expected[:, None]), 1)
    assert len(ids[0].unique()) > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be a number above 0, got nan"),
        ({"top_k": -1}, "top_k must be a whole number >= 0, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\], got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0, got 0.0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def test_one_seed_per_row():
    with pytest.raises(ValueError, match=r"seed must be one number or one per row \(3\), got 2"):
        sampler(SamplingOptions(do_sample=True, seed=[1, 2]), 3)


def test_nan_is_an_error_and_not_a_token():
    bad = logits(2)
    bad[1, 5] = math.nan
    with pytest.raises(FloatingPointError, match="logits of row 1 are NaN"):
        sampler(SamplingOptions(), 2)(bad)
