"""Linear attention in plain PyTorch (Katharopoulos et al., 2020, section 3; Choromanski et al., 2021, section 3).

Features are kept as phi(x) 2^shift with whole shifts, so that no exponential overflows and rescaling is exact. A state
(S, z, top) stands for the sums 2^top S of phi(k) v^T and 2^top z of phi(k).
"""

import math

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]
_CHUNK = 128


def features(x: Tensor, kind: str, projection: Tensor | None) -> tuple[Tensor, Tensor]:
    """phi (B, H, L, M) and shift (B, H, L): "favor": phi 2^shift = exp(W x' - |x'|^2 / 2) / sqrt(M), x' = x / D^(1/4);
    "elu": elu(x) + 1; "features": x itself."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "favor" and projection is not None:
        x = x / x.shape[-1] ** 0.25
        logs = x @ projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        logs = logs / math.log(2) - math.log2(projection.shape[0]) / 2
        shift = logs.detach().amax(-1, keepdim=True).ceil()
        return torch.exp2(logs - shift), shift.squeeze(-1)
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp()) if kind == "elu" else x, x.new_zeros(x.shape[:-1])


def add_keys(phi: Tensor, shift: Tensor, value: Tensor, state: State) -> State:
    """The state with these keys added: S + sum of phi v^T, z + sum of phi, both brought to the larger shift."""
    S, z, old = state
    top = torch.maximum(old, shift.amax(-1)) if shift.shape[-1] else old
    phi, kept = phi * _factor(shift, top.unsqueeze(-1)).unsqueeze(-1), _factor(old, top).unsqueeze(-1)
    return S * kept.unsqueeze(-1) + phi.transpose(-1, -2) @ value, z * kept + phi.sum(-2), top


def _factor(shift: Tensor, top: Tensor) -> Tensor:
    return torch.exp2(shift - top.masked_fill(top == -torch.inf, 0.0))


def within(phi_q: Tensor, phi_k: Tensor, shift: Tensor, value: Tensor, state: State, offset: int) -> Tensor:
    """phi(q) (S + sum of phi(k) v^T) / phi(q) (z + sum of phi(k)) over the state and the keys j <= offset + i.

    phi_q (B, Hkv, G, Lq, M). Each row is relative to the largest shift that it sees: no later key moves its rounding.
    """
    S, z, top = (x.unsqueeze(2) for x in state)
    phi_k, value, shift = phi_k.unsqueeze(2), value.unsqueeze(2), shift.unsqueeze(2)
    position = offset + torch.arange(phi_q.shape[3], device=shift.device)
    run = torch.cat([top.unsqueeze(-1), shift], -1).cummax(-1).values[..., position + 1].unsqueeze(-1)
    hidden = torch.arange(shift.shape[-1], device=shift.device) > position.unsqueeze(-1)
    scale = _factor(shift.unsqueeze(-2), run).masked_fill(hidden, 0.0)  # a later key's may be infinite
    weights = ((phi_q @ phi_k.transpose(-1, -2)) * scale).masked_fill(hidden, 0.0)
    earlier = phi_q * _factor(top[..., None, None], run)
    total = (earlier @ z.unsqueeze(-1)) + weights.sum(-1, keepdim=True)
    return _divide(earlier @ S + weights @ value, total)


def _divide(sums: Tensor, total: Tensor) -> Tensor:
    none = total.abs() < torch.finfo(total.dtype).tiny
    return (sums / total.masked_fill(none, 1.0)).masked_fill(none, 0.0)


def forward(phi_q: Tensor, keys: tuple[Tensor, Tensor], value: Tensor, causal: bool, state: State) -> tuple:
    """phi(q) (S + sum of phi(k) v^T) / phi(q) (z + sum of phi(k)), (B, Hq, Lq, Dv), and the state after all keys; keys
    are phi and shift, the causal mask is aligned bottom-right, chunk after chunk."""
    phi_k, shift = keys
    grouped, value = phi_q.unflatten(1, (phi_k.shape[1], -1)), value.to(phi_k.dtype)
    if not causal:
        S, z, _ = state = add_keys(phi_k, shift, value, state)
        return _divide(grouped @ S[:, :, None], grouped @ z[:, :, None, :, None]).flatten(1, 2), state
    offset = phi_k.shape[2] - phi_q.shape[2]
    S, z, _ = state
    first = grouped[:, :, :, : max(0, -offset)]  # what comes before the first key sees the state alone
    outs = [_divide(first @ S[:, :, None], first @ z[:, :, None, :, None])]
    for k0 in range(0, phi_k.shape[2], _CHUNK):
        k1 = min(k0 + _CHUNK, phi_k.shape[2])
        q0, q1 = max(0, k0 - offset), max(0, k1 - offset)
        chunk = phi_k[:, :, k0:k1], shift[:, :, k0:k1], value[:, :, k0:k1]
        outs.append(within(grouped[:, :, :, q0:q1], *chunk, state, q0 + offset - k0))
        state = add_keys(*chunk, state)
    return torch.cat(outs, 3).flatten(1, 2), state
