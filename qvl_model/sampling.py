"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty.

The filters act in the order in which other implementations apply them (penalty, temperature, top-k, top-p, min-p), so
the same numbers mean the same thing here as there. Letters: B rows (prompts), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A nucleus is first looked for among so many tokens: to sort a whole vocabulary of 151,936 takes 13 ms on two cores, to
# find its 1,024 most probable ones less than 1.
_NUCLEUS = 1024


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen from the logits of one position.

    do_sample: draw from the filtered distribution; False takes the most probable token (then only `repetition_penalty`
        has an effect).
    temperature: logits are divided by it; > 0.
    top_k: keep the k most probable tokens (ties with the k-th are kept); None or 0 keeps all.
    top_p: keep the smallest set of most probable tokens with mass >= top_p, in (0, 1]; None keeps all.
    min_p: keep tokens with p >= min_p * max p, in [0, 1]; None keeps all.
    repetition_penalty: logits of the tokens already in the row (prompt included) are divided by it where positive and
        multiplied where negative; 1 changes nothing.
    seed: row b draws from its own generator, seeded with `seed + b`, or with `seed[b]` if one seed per row is given; so
        a row in a batch draws what it draws alone with that seed. None seeds from the operating system.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"sampling: temperature must be a number above 0, got {self.temperature} "
                "(greedy decoding: do_sample=False)"
            )
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"sampling: top_k must be a whole number >= 0, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p must lie in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling: min_p must lie in [0, 1], got {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"sampling: repetition_penalty must be a number above 0, got {self.repetition_penalty}")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """x / penalty where x > 0, x * penalty where x < 0, for the tokens in `seen`.

    logits (B, V); seen (B, V) bool. Returns (B, V).

    Source: Keskar et al., CTRL, 2019, section 4.1.
    """
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for every logit (B, V) below the row's k-th largest (Fan et al. 2018, section 5.4)."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the nucleus, the fewest most probable tokens of (B, V) with mass >= p (Holtzman et al. 2020,
    section 3.1)."""
    probability = logits.softmax(dim=-1)
    vocabulary = logits.shape[-1]
    count = min(_NUCLEUS, vocabulary)
    while True:
        mass, index = probability.topk(count, dim=-1)
        # The mass of the tokens before this one, 0 for the first, which is therefore always kept.
        outside = mass.cumsum(dim=-1) - mass >= p
        if count == vocabulary or outside[..., -1].all():
            break
        count = min(8 * count, vocabulary)
    hidden = torch.ones_like(logits, dtype=torch.bool).scatter(-1, index, outside)
    return logits.masked_fill(hidden, -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf where softmax(logits) < p * max softmax(logits), logits (B, V) (Nguyen et al. 2024, section 3)."""
    probability = logits.softmax(dim=-1)
    return logits.masked_fill(probability < p * probability.amax(dim=-1, keepdim=True), -torch.inf)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """The logits (B, V) of the distribution that is drawn from: temperature, then top-k, top-p, min-p."""
    logits = logits / options.temperature
    if options.top_k:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p:
        logits = keep_min_p(logits, options.min_p)
    return logits


class Sampler:
    """Chooses one token per row and remembers what each row has said.

    prompts: one 1-D tensor of token ids per row, without padding (for the repetition penalty).
    """

    def __init__(
        self, options: SamplingOptions, prompts: Sequence[Tensor], vocab_size: int, device: torch.device
    ) -> None:
        self.options = options
        self.generators = _row_generators(options.seed, len(prompts), device) if options.do_sample else []
        self.seen: Tensor | None = None
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(self.seen, prompts):
                row[prompt] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (B, V) of the last position -> token ids (B,). Raises FloatingPointError where a row holds NaN."""
        logits = logits.float()
        bad = logits.isnan().any(dim=-1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise FloatingPointError(
                f"generate: the model's logits of row {row} are NaN; a wider dtype (weights='fp32') may help"
            )
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen, self.options.repetition_penalty)
        if self.options.do_sample:
            probability = filter_logits(logits, self.options).softmax(dim=-1)
            drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probability, self.generators)]
            token = torch.cat(drawn)
        else:
            token = logits.argmax(dim=-1)
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        return token

    def select(self, rows: list[int]) -> None:
        """Keeps these rows, in this order, with what they have said and drawn so far."""
        self.generators = [self.generators[row] for row in rows] if self.generators else []
        if self.seen is not None:
            self.seen = self.seen[rows]


def _row_generators(seed: int | Sequence[int] | None, rows: int, device: torch.device) -> list[torch.Generator]:
    if seed is None:
        seeds: Sequence[int] = [torch.Generator().seed() for _ in range(rows)]
    elif isinstance(seed, int):
        seeds = range(seed, seed + rows)
    elif len(seed) != rows:
        raise ValueError(f"sampling: seed must be one number or one per row ({rows}), got {len(seed)}")
    else:
        seeds = seed
    return [torch.Generator(device).manual_seed(int(s)) for s in seeds]
