"""What is inspected: every kernel, at the widths of the models, as its launcher launches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rfkernels.adaln import launch
from rfkernels.flow import launch as flow
from rfkernels.joint_attention import join
from rfkernels.joint_attention import launch as attention
from rfkernels.joint_attention.layout import parse
from rfkernels.mlp import launch as mlp
from rfkernels.optim import launch as optim
from rfkernels.optim.reference import Settings, empty_state
from rfkernels.position import launch as position
from rfkernels.position.launch import Patches
from rfkernels.qk_norm import launch as qk

WIDTHS = (960, 1152, 1536, 1920, 2432, 3072)
BATCH, LENGTH = 32, 256
HEADS, TEXT = 24, 154
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Case:
    """A call of a launcher on "meta" tensors."""

    name: str
    call: Callable[[], object]
    bytes: int
    """The least it must move: each activation once, in bf16."""
    excess: float = 1.05
    """How many times that it may: vectors, statistics and partial sums; what a second kernel reads again."""


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def patch_cases(width: int) -> Iterator[Case]:
    """A latent of 16 x 32 x 32 and its 256 tokens. Excess: weight, positions, and partial sums of the weight."""
    latent, x, weight = _tensor(BATCH, 16, 32, 32), _tensor(BATCH, LENGTH, width), _tensor(width, 64)
    positions, bias = _tensor(LENGTH, width, dtype=torch.float32), _tensor(width)
    embedded, least = Patches(latent, 2, True), 2 * (x.numel() + latent.numel())
    to_tokens = partial(position.to_tokens, embedded, weight, (64, 1), width, bias, positions)
    yield Case(f"patches_to_tokens/{width}", to_tokens, least, 1.1)
    unembedded = Patches(latent, 2, False)
    yield Case(f"tokens_to_patches/{width}", partial(position.to_latent, x, unembedded, weight.t(), (1, width)), least)
    gradient = partial(position.weight_gradient, x, embedded, weight, (64, 1), bias)
    yield Case(f"patch_weight_bwd/{width}", gradient, least, 1.7)
    h, least = _tensor(BATCH, LENGTH, width, dtype=torch.float32), 4 * x.numel() + 2 * latent.numel()     # autocast
    to_tokens = partial(to_tokens, dtype=torch.float32)
    to_latent = partial(position.to_latent, h, embedded, weight, (64, 1))
    gradient = partial(position.weight_gradient, h, embedded, weight, (64, 1), bias)
    yield Case(f"patches_to_tokens_autocast/{width}", to_tokens, least, 1.1)
    yield Case(f"tokens_to_patches_autocast/{width}", to_latent, least)
    yield Case(f"patch_weight_bwd_autocast/{width}", gradient, least, 1.7)


def flow_cases() -> Iterator[Case]:
    x, t = _tensor(BATCH, 16, 128, 128), _tensor(BATCH, dtype=torch.float32)
    scalar = _tensor(dtype=torch.float32)
    for name, each, call in (
        ("rectified_flow_fwd", 8, partial(flow.rectified_flow, x, x, t)),
        ("rectified_flow_bwd", 8, partial(flow.rectified_flow_backward, x, x, t, None, None)),
        ("weighted_mse_fwd", 4, partial(flow.weighted_mse, x, x, t)),
        ("weighted_mse_bwd", 6, partial(flow.weighted_mse_backward, scalar, x, x, t, False)),
    ):
        yield Case(f"{name}/latent", call, each * x.numel())


def optimizer_cases() -> Iterator[Case]:
    """A matrix of 1536 x 6144, fp32 and bf16, with gradients of its dtype. What is updated in place counts once."""
    step, settings = _tensor(dtype=torch.float32), Settings(1e-4, 0.9, 0.999, 1e-8, 0.0, seed=0)
    for states, each in (("bf16", 4), ("int8", 2)):
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            p = _tensor(1536, 6144, dtype=dtype)
            call = partial(optim.adamw, p, p, empty_state(p, states), step, settings, step, step)
            yield Case(f"adamw_{states}/{name}", call, (each + 2 * dtype.itemsize) * p.numel())


def cases() -> Iterator[Case]:
    for width in WIDTHS:
        x, v = _tensor(BATCH, LENGTH, width), _tensor(BATCH, width)
        s = _tensor(2, BATCH, LENGTH, dtype=torch.float32)
        norm = (True, "layer", 1e-6)
        calls: dict[str, tuple[int, Callable[[], object]]] = {            # bytes per element, call
            "adaln_fwd": (4, partial(launch.adaln, x, v, v, *norm, x.dtype)),
            "adaln_bwd": (6, partial(launch.adaln_backward, x, x, v, v, s, *norm)),
            "gated_adaln_fwd": (8, partial(launch.gated_adaln, x, x, v, v, v, *norm, x.dtype)),
            "gated_adaln_bwd": (12, partial(launch.gated_adaln_backward, x, x, x, x, v, v, v, s, *norm, x.dtype, True)),
            "gated_residual_fwd": (6, partial(launch.gated_residual, x, x, v)),
            "gated_residual_bwd": (6, partial(launch.gated_residual_backward, x, x, v)),
        }
        h = _tensor(BATCH, LENGTH, width, dtype=torch.float32)            # the residual stream under autocast
        calls |= {
            "adaln_fwd_autocast": (6, partial(launch.adaln, h, v, v, *norm, x.dtype)),
            "adaln_bwd_autocast": (10, partial(launch.adaln_backward, x, h, v, v, s, *norm)),
            "gated_adaln_fwd_autocast": (12, partial(launch.gated_adaln, h, x, v, v, v, *norm, x.dtype)),
            "gated_adaln_bwd_autocast": (
                18, partial(launch.gated_adaln_backward, h, x, h, x, v, v, v, s, *norm, h.dtype, True)
            ),
            "gated_residual_fwd_autocast": (10, partial(launch.gated_residual, h, x, v)),
            "gated_residual_bwd_autocast": (8, partial(launch.gated_residual_backward, h, x, v)),
        }  # fmt: skip
        for name, (least, call) in calls.items():
            yield Case(f"{name}/{width}", call, least * x.numel())
        h = _tensor(BATCH * LENGTH, 4 * width)
        yield Case(f"gelu_bwd/{4 * width}", partial(mlp.gelu_backward, h, h, True, True), 8 * h.numel())
        yield from patch_cases(width)
    yield from flow_cases()
    yield from optimizer_cases()
    for dim in HEAD_DIMS:
        # Two streams, packed, both normalised. Excess of the forward: keys are read for their rstd first. Backward: its
        # second kernel reads k, v and dout again; the queries folded for each of the two streams are written and read.
        qkvs = [_tensor(BATCH, n, 3, HEADS, dim) for n in (TEXT, LENGTH)]
        weight = _tensor(dim, dtype=torch.float32)
        tensors = [qkvs[0], weight, weight, qkvs[1], weight, weight]
        q, k, _ = qkvs[1].unbind(2)
        norms, dy = (q, k, weight, weight), _tensor(BATCH, LENGTH, HEADS, dim)
        yield Case(f"qk_norm_fwd/{dim}", partial(qk.qk_norm, *norms, 1e-6), 8 * dy.numel())
        yield Case(f"qk_norm_bwd/{dim}", partial(qk.qk_norm_backward, dy, dy, *norms, 1e-6), 12 * dy.numel())
        outs = [_tensor(BATCH, n, HEADS, dim) for n in (TEXT, LENGTH)]
        rows = _tensor(BATCH, HEADS, TEXT + LENGTH, dtype=torch.float32)
        settings = ("3qk,3qk", dim**-0.5, 1e-6)
        least = 2 * sum(out.numel() for out in outs)
        forward = partial(attention.forward, tensors, *settings)
        backward = partial(attention.backward, outs, [*outs, rows, rows], tensors, *settings, True)
        yield Case(f"attention_fwd/{dim}", forward, 4 * least, 1.30)
        yield Case(f"attention_bwd/{dim}", backward, 8 * least, 2.0)
        streams, joint = parse(tensors, "3qk,3qk"), [_tensor(BATCH, TEXT + LENGTH, HEADS, dim) for _ in range(3)]
        yield Case(f"join_fwd/{dim}", partial(join.forward, streams, joint, 1e-6), 6 * least)
        yield Case(f"join_bwd/{dim}", partial(join.backward, joint, streams, 1e-6), 8 * least, 1.2)      # v is not read
