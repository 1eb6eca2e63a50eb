"""How sharp attention is: the quantities of the paper's Figure 5, from what the op gets, for a sample of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rfkernels import checks
from rfkernels.joint_attention.reference import key_mask, prepared
from rfkernels.joint_attention.stream import Stream


class AttentionStatistics(NamedTuple):
    """Of one joint attention; fp32 scalars on its device, detached."""

    max_logit: Tensor
    """Largest score before the softmax, of the sampled rows."""
    bound: Tensor
    """Largest that any row's score can be, scale * |q_hat| * |k_hat|, over all rows and keys (Cauchy-Schwarz)."""
    entropy: Tensor
    """Mean entropy of the sampled rows' attention, in nats; log(number of keys) where it is uniform."""


@torch.no_grad()
def attention_statistics(
    streams: Sequence[Stream], *, rows: int = 32, scale: float | None = None, eps: float = 1e-6
) -> AttentionStatistics:
    """Maximum logit and entropy of a joint attention.

    Args:
        streams, scale, eps: as for `joint_attention`.
        rows: queries per stream that are looked at, evenly spaced; every head and sample. Costs rows / S of a forward.
    Returns: AttentionStatistics. Padding is left out. NaN entropy and -inf maximum if no row is valid.
    Raises: ValueError if rows is below 1.
    Source: Esser et al. 2024, section 5.3.2 and figure 5.

    >>> image = Stream(*torch.zeros(3, 2, 16, 4, 32), torch.ones(32), torch.ones(32))
    >>> round(float(attention_statistics([image]).entropy), 3)                   # uniform: log 16
    2.773
    """
    checks.positive_int("attention_statistics", rows=rows)
    scale = streams[0].k.shape[-1] ** -0.5 if scale is None else scale
    k = torch.cat([prepared(s.k.float(), s.k_weight, s.rope, eps) for s in streams], 1)
    seen = key_mask(tuple(streams))
    lengths = k.norm(dim=-1)
    if seen is not None:
        lengths = lengths.masked_fill(~seen[:, 0, 0, :, None], 0)
    longest_key = lengths.max() if k.numel() else lengths.new_zeros(())
    highest, bound = k.new_full((), -torch.inf), k.new_zeros(())
    total, count = k.new_zeros(()), k.new_zeros(())
    for s in streams:
        if s.q is None or not s.queries or not s.q.numel():
            continue
        q, valid = prepared(s.q.float(), s.q_weight, s.rope, eps), s.valid()
        norms = q.norm(dim=-1) if valid is None else q.norm(dim=-1).masked_fill(~valid[..., None], 0)
        bound = torch.maximum(bound, norms.max() * longest_key * scale)
        sample = torch.linspace(0, q.shape[1] - 1, min(rows, q.shape[1]), device=q.device).round().long()
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, sample], k) * scale
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        logp = scores.log_softmax(-1)
        entropy = -(logp.exp() * logp).nan_to_num(0).sum(-1)                       # [B, H, rows]; 0 log 0 = 0
        counts = torch.ones_like(entropy, dtype=torch.bool)
        if valid is not None:
            counts = counts & valid[:, None, sample]
        if seen is not None:
            counts = counts & seen.any(-1)
        highest = torch.maximum(highest, scores.masked_fill(~counts[..., None], -torch.inf).max())
        total, count = total + (entropy * counts).sum(), count + counts.sum()
    return AttentionStatistics(highest, bound, total / count)


_observed: list[AttentionStatistics] | None = None
_rows = 32


@contextmanager
def observe_attention(rows: int = 32) -> Iterator[list[AttentionStatistics]]:
    """Every `joint_attention` called inside adds its statistics to the list this yields: of a model, one per layer.

    Args: rows: as for `attention_statistics`. Not thread-safe: it sets a process-wide switch.

    >>> with observe_attention() as found:
    ...     _ = joint_attention([Stream(*torch.randn(3, 2, 16, 4, 32))])
    >>> len(found)
    1
    """
    global _observed, _rows
    before, (_observed, _rows) = (_observed, _rows), ([], rows)
    try:
        yield _observed
    finally:
        _observed, _rows = before


def observing() -> bool:
    return _observed is not None


def observe(streams: Sequence[Stream], scale: float, eps: float) -> None:
    if _observed is not None:
        _observed.append(attention_statistics(streams, rows=_rows, scale=scale, eps=eps))
