"""Feature maps of `linear_attention`: FAVOR+'s positive random features, and elu(x) + 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .reference import linear_attention as reference


class FavorFeatures(nn.Module):
    """phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(M) with x' = x / D^(1/4): E[phi(q) . phi(k)] = exp(q . k / sqrt(D)).

    W (M, D) is drawn once from `seed` and is a constant: a buffer in the `state_dict`, never redrawn but by `redraw`.
    Its rows are Gaussian; with `orthogonal` each D of them are orthogonal to each other, their lengths those of
    independent Gaussian vectors, which lowers the variance.

    The limit: the relative error of phi(q) . phi(k) is about sqrt((exp(|q' + k'|^2) - 1) / M). At |q' + k'|^2 = 1 and
    M = 256 that is 8 %, at 4 it is 46 %, at 16 no M helps. A model whose queries and keys are normalised to length
    sqrt(D) (Qwen3's are, |q' + k'|^2 is about 22) has to be fine-tuned with these features; they cannot stand in for
    its softmax.

    Inside `linear_attention` the exponent is shifted, for a query by its own largest, for keys by the largest so far,
    which cancels in the result and leaves nothing to overflow; calling the module gives phi(x) as above, unshifted.

    Args:
        head_dim: D.
        num_features: M.
        seed: of W.
        orthogonal: whether blocks of D rows are orthogonal.

    Raises:
        ValueError: a size is not positive; W has become non-finite (in use).

    Source: Choromanski et al., Rethinking attention with Performers, 2021, section 3 (positive features: lemma 1;
    orthogonal: section 3.2; the error: lemma 2).

    >>> favor = FavorFeatures(64, 256, seed=0)
    >>> favor(torch.randn(1, 4, 10, 64)).shape
    torch.Size([1, 4, 10, 256])
    """

    projection: Tensor

    def __init__(self, head_dim: int, num_features: int, *, seed: int, orthogonal: bool = True) -> None:
        super().__init__()
        for name, size in (("head_dim", head_dim), ("num_features", num_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"FavorFeatures: {name} must be a positive integer, got {size!r}")
        self.head_dim, self.num_features, self.orthogonal = head_dim, num_features, orthogonal
        self.register_buffer("projection", torch.empty(num_features, head_dim))
        self._checked: tuple[int, int] | None = None
        self.redraw(seed)

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Draws W anew, in place, from `seed`: the same seed gives the same W on every machine and device."""
        rows, dim = self.projection.shape
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
        if self.orthogonal:
            square = torch.randn(-(-rows // dim), dim, dim, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(square)
            q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else QR's own signs are in it
            lengths = q.flatten(0, 1)[:rows] * lengths.norm(dim=-1, keepdim=True)
        self.projection.copy_(lengths)

    def check(self) -> None:
        """Raises ValueError where W is not finite; looks at it again only after it has changed."""
        projection = self.projection
        if torch.compiler.is_compiling() or projection.is_meta or projection.is_inference():
            return
        seen = id(projection), projection._version
        if seen != self._checked:
            if not projection.isfinite().all():
                raise ValueError("FavorFeatures: projection must be finite, got inf or nan in it")
            self._checked = seen

    def forward(self, x: Tensor) -> Tensor:
        """phi(x), (..., M) in float32 or wider, of x (..., D)."""
        self.check()
        if x.ndim == 0 or x.shape[-1] != self.head_dim:
            raise ValueError(
                f"FavorFeatures: x must have shape (..., D) = (..., {self.head_dim}), got {tuple(x.shape)}"
            )
        phi, shift = reference.features(x, "favor", self.projection)
        return phi * torch.exp2(shift).unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, {self.num_features}, orthogonal={self.orthogonal}"


class EluFeatures(nn.Module):
    """phi(x) = elu(x) + 1: x + 1 for x > 0, else exp(x); M = D.

    Source: Katharopoulos et al., Transformers are RNNs, 2020, eq. 7.

    >>> EluFeatures()(torch.tensor([1.0, 0.0]))
    tensor([2., 1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """phi(x), x's shape, in float32 or wider."""
        return reference.features(x, "elu", None)[0]
