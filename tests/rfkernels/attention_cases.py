"""Inputs of joint attention and ways to run them, for the tests of its kernels and of its operator."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import rfkernels
from rfkernels import Rope, Stream
from rfkernels.joint_attention.reference import rotate
from rfkernels.testing import nan_filled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """Inputs of one call, in fp64; `streams` makes what the op takes, in a dtype, with leaves that need gradients."""

    sizes: tuple[int, ...]
    dim: int = 32
    heads: int = 2
    batch: int = 1
    q_norm: bool | tuple[bool, ...] = True
    k_norm: bool | tuple[bool, ...] = True
    weight: float = 1.0
    lengths: tuple | None = None
    rope: tuple = ()
    silent: tuple[int, ...] = ()
    packed: bool = True
    scale: float | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def __post_init__(self):
        randn = lambda *shape: torch.randn(shape, generator=self.generator, dtype=torch.float64).to(DEVICE)  # noqa: E731
        each = lambda flag: flag if isinstance(flag, tuple) else (flag,) * len(self.sizes)  # noqa: E731
        self.qkv = [randn(self.batch, s, 3, self.heads, self.dim) for s in self.sizes]
        self.weights = [
            [(1 + randn(self.dim) / 4) * self.weight if on else None for on in norms]
            for norms in zip(each(self.q_norm), each(self.k_norm), strict=True)
        ]
        self.angles = [randn(s, self.dim // 2) * 2 for s in self.sizes]
        self.grads = [randn(self.batch, s, self.heads, self.dim) for s in self.sizes]

    def streams(self, dtype):
        made, leaves = [], []
        leaf = lambda t: None if t is None else t.to(dtype).requires_grad_()  # noqa: E731
        for i, (qkv, weights, angles) in enumerate(zip(self.qkv, self.weights, self.angles, strict=True)):
            weights = [leaf(w) for w in weights]
            lengths = None if self.lengths is None else torch.tensor(self.lengths[i], device=DEVICE)
            asks = i not in self.silent
            wide = torch.promote_types(dtype, torch.float32)
            kind = self.rope[i] if self.rope else None
            rope = Rope(angles.cos().to(wide), angles.sin().to(wide), kind == "i") if kind else None
            if self.packed:
                parts = [leaf(qkv if asks else qkv[:, :, 1:])]
                made.append(Stream.packed(parts[0], *weights, lengths, rope, asks))
            else:
                parts = [leaf(t) for t in (t.transpose(1, 2).contiguous() for t in qkv.unbind(2))]
                q, k, v = (t.transpose(1, 2) for t in parts)
                made.append(Stream(q if asks else None, k, v, *weights, lengths, rope, asks))
                parts = parts if asks else parts[1:]
            leaves += [*parts, *[w for w in weights if w is not None and (asks or w is not weights[0])]]
        return made, leaves


def run(case, dtype, function):
    streams, leaves = case.streams(dtype)
    with nan_filled():
        outputs = [o for o in function(streams, case.scale) if o is not None]
        grads = [g.to(dtype) for i, g in enumerate(case.grads) if i not in case.silent]
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def on(backend):
    def function(streams, scale):
        with rfkernels.backend(backend):
            return rfkernels.joint_attention(streams, scale=scale)

    return function


def eager(streams, scale):
    """As a careful user writes it, in the inputs' dtype: norm, rotate, concatenate, softmax, split."""
    def seen(x, weight, rope):
        x = x if weight is None else F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight
        return x if rope is None else rotate(x, rope)

    asking = [s for s in streams if s.queries]
    q = torch.cat([seen(s.q, s.q_weight, s.rope) for s in asking], 1).transpose(1, 2)
    k = torch.cat([seen(s.k, s.k_weight, s.rope) for s in streams], 1).transpose(1, 2)
    v = torch.cat([s.v for s in streams], 1).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if streams[0].lengths is not None:
        mask = torch.cat([s.valid() for s in streams], 1)[:, None, None]
        scores = scores.masked_fill(~mask, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0)
    outputs = iter((p @ v).transpose(1, 2).split([s.k.shape[1] for s in asking], 1))
    outputs = [next(outputs) if s.queries else None for s in streams]
    padded = zip(outputs, streams, strict=True)
    return [o if o is None or s.lengths is None else o * s.valid()[..., None, None] for o, s in padded]
