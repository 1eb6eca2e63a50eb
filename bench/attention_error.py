"""How far joint attention is from fp64: python -m bench.attention_error

Ours against eager bf16 and SDPA at SD3's shapes, for growing norm weights. On a GPU the kernels run there; elsewhere in
Triton's interpreter (TRITON_INTERPRET=1), which rounds as a GPU does but multiplies matrices in full fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from tqdm import tqdm

import rfkernels
from bench.environment import pretending
from rfkernels import Stream
from rfkernels.triton_support import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, DIM = 1, 64
WEIGHTS = (1.0, 2.0, 4.0, 6.0)


def eager(streams: list[Stream], attend: str) -> list[Tensor]:
    """Norm, concatenate, attend in the inputs' dtype, split."""
    normed = lambda x, w: F.rms_norm(x, x.shape[-1:], eps=1e-6) * w  # noqa: E731
    q = torch.cat([normed(s.q, s.q_weight) for s in streams], 1).transpose(1, 2)
    k = torch.cat([normed(s.k, s.k_weight) for s in streams], 1).transpose(1, 2)
    v = torch.cat([s.v for s in streams], 1).transpose(1, 2)
    if attend == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = (q @ k.transpose(-1, -2) * DIM**-0.5).softmax(-1) @ v
    return list(out.transpose(1, 2).split([s.k.shape[1] for s in streams], 1))


def ours(streams: list[Stream], backend: str) -> list[Tensor]:
    with rfkernels.backend(backend):                                     # type: ignore[arg-type]
        return [o for o in rfkernels.joint_attention(streams) if o is not None]


def tensors(sizes: tuple[int, int], weight: float, dtype: torch.dtype, way: str) -> dict[str, Tensor]:
    """Outputs and gradients, joined over the streams."""
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=g).to(DEVICE)  # noqa: E731
    streams, leaves, grads = [], [], []
    for size in sizes:
        qkv = random(1, size, 3, HEADS, DIM).bfloat16().to(dtype).requires_grad_()
        # Norm weights uniform up to `weight`; inputs are exact in bf16, so that only arithmetic differs.
        uniform = torch.rand(2, DIM, generator=g).to(DEVICE) * weight
        weights = [w.bfloat16().to(dtype).requires_grad_() for w in uniform]
        streams.append(Stream.packed(qkv, *weights))
        leaves += [qkv, *weights]
        grads.append(random(1, size, HEADS, DIM).bfloat16().to(dtype))
    outs = eager(streams, way) if way in ("eager", "sdpa") else ours(streams, way)
    found = torch.autograd.grad(outs, leaves, grads)
    return {
        "out": torch.cat(outs, 1),
        "d(qkv)": torch.cat(found[0::3], 1),
        "d(weights)": torch.stack([f for i, f in enumerate(found) if i % 3]),
    }


def error(got: Tensor, exact: Tensor) -> float:
    """Relative, root mean square."""
    return float((got.double() - exact).norm() / exact.norm())


def main() -> None:
    where = f"Triton {triton.__version__}'s interpreter" if INTERPRETED else torch.cuda.get_device_name()
    print(f"relative error against fp64, bf16, head dimension {DIM}; torch {torch.__version__}, {where}")
    print(f"{'tokens':>10s} {'weights to':>10s} {'of':>11s} {'ours':>9s} {'eager':>9s} {'SDPA':>9s}")
    cases = [(sizes, weight) for sizes in ((154, 256), (154, 1024)) for weight in WEIGHTS]
    for sizes, weight in tqdm(cases[:1] if pretending() else cases, disable=None):
        exact = tensors(sizes, weight, torch.float64, "reference")
        rows = [tensors(sizes, weight, torch.bfloat16, way) for way in ("triton", "eager", "sdpa")]
        for name in exact:
            numbers = " ".join(f"{error(row[name], exact[name]):9.1e}" for row in rows)
            print(f"{'+'.join(map(str, sizes)):>10s} {weight:10.0f} {name:>11s} {numbers}", flush=True)


if __name__ == "__main__":
    main()
