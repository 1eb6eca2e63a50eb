"""Public function joint_attention: checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rfkernels import checks, dispatch, native
from rfkernels.joint_attention import diagnostics, launch, library, operators, reference
from rfkernels.joint_attention.stream import Stream
from rfkernels.transforms import refuses_transforms
from rfkernels.triton_support import interpreted, refuses_triton

MAX_STREAMS = 4
MAX_HEAD_DIM = 128


def joint_attention(
    streams: Sequence[Stream], *, scale: float | None = None, eps: float = 1e-6
) -> tuple[Tensor | None, ...]:
    """Attention over several streams: every query sees the keys of all of them.

    Args:
        streams: 1 to 4 `Stream`s with the same batch, heads, head dimension, dtype and device; lengths may differ.
        scale: of the scores before the softmax; None: 1 / sqrt(D).
        eps: of the RMSNorm of q and k, where a stream has norm weights.
    Returns: one [B, S_i, H, D] per stream in its dtype, None for a stream with queries=False. Rows of padding, and of
        samples without any valid key, are zeros.
    Raises: ValueError or TypeError that names the argument.
    Source: Esser et al. 2024, figure 2b.

    >>> text = Stream(*torch.randn(3, 2, 7, 4, 32), torch.ones(32), torch.ones(32))
    >>> image = Stream(*torch.randn(3, 2, 16, 4, 32), torch.ones(32), torch.ones(32))
    >>> [out.shape for out in joint_attention([text, image])]
    [torch.Size([2, 7, 4, 32]), torch.Size([2, 16, 4, 32])]
    """
    if not diagnostics.observing():
        outs: tuple[Tensor | None, ...] | None = native.direct("joint_attention", streams, scale, eps)
        if outs is not None:
            return outs
    checked = _check(streams, scale=scale, eps=eps)
    diagnostics.observe(*checked)
    return dispatch.run("joint_attention", *checked)


def _check(streams, *, scale=None, eps=1e-6):
    op = "joint_attention"
    if isinstance(streams, Stream) or not isinstance(streams, Sequence):
        raise TypeError(f"{op}: streams is {type(streams).__name__}; expected a list or tuple of Stream")
    for i, stream in enumerate(streams):
        if not isinstance(stream, Stream):
            raise TypeError(f"{op}: streams[{i}] is {type(stream).__name__}; expected a Stream")
    if not 1 <= len(streams) <= MAX_STREAMS:
        raise ValueError(f"{op}: streams has {len(streams)} entries; expected 1 to {MAX_STREAMS}")
    checks.tell(f"streams[{i}].{name}" for i, s in enumerate(streams) for name in s.copied)
    first = streams[0]
    batch, _, heads, dim = first.shape
    for i, stream in enumerate(streams[1:], 1):
        if (stream.shape[0], stream.shape[2], stream.shape[3]) != (batch, heads, dim):
            turned = stream.shape[1] == first.shape[1] and (stream.shape[0], stream.shape[3]) == (batch, dim)
            raise ValueError(
                f"{op}: streams[{i}] has k of shape {list(stream.shape)}; expected batch {batch}, "
                f"{heads} heads of {dim}, as streams[0]"
                + ("; if these are [B, H, S, D], transpose(1, 2) them first" if turned else "")
            )
        if stream.like.dtype != first.like.dtype or stream.like.device != first.like.device:
            checks.same_dtype(op, "streams[0]", first.like, **{f"streams[{i}].k": stream.like})
            checks.same_device(op, "streams[0]", first.like, **{f"streams[{i}].k": stream.like})
    if not dim:
        raise ValueError(f"{op}: streams[0] has k of shape {list(first.shape)}; expected at least one channel a head")
    if scale is None:
        scale = dim**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale is {type(scale).__name__}; expected a number or None")
    checks.positive(op, eps=eps)
    return tuple(streams), float(scale), eps


def _refuses(streams, scale, eps):
    here = refuses_triton(*[t for s in streams for t in (s.like, s.q_weight, s.k_weight)])
    if here := here or refuses_transforms("joint attention in kernels"):
        return here                                     # first: what follows limits the sizes that torch.export sees
    for i, s in enumerate(streams):
        if s.rope is not None and (s.rope.cos.requires_grad or s.rope.sin.requires_grad):
            return f"the kernels have no gradient of rotary tables, which streams[{i}] asks for"
    dim = streams[0].shape[3]
    if dim > MAX_HEAD_DIM or dim % 8:
        return f"the kernels take head dimensions in steps of 8 up to {MAX_HEAD_DIM}, not {dim}"
    if too_many := launch.beyond_grid(streams[0].shape):
        return too_many
    for s in streams:
        if too_far := launch.beyond_tile(*((s.q, s.k, s.v) if s.packed_tensor is None else (s.packed_tensor,))):
            return too_far
    return None


def _library_refuses(streams, scale, eps):
    return refuses_transforms("a library's attention")


def _slower(streams, scale, eps):
    return interpreted(streams[0].like) or library.faster(streams)


dispatch.register(
    "joint_attention",
    _check,
    dispatch.Implementation(
        "triton", "nothing concatenated, norm inside; 2 kernels forward, 3 backward", operators.triton_joint_attention,
        _refuses, _slower,
    ),
    dispatch.Implementation(
        "library", "a joint copy of q, k and v, then SDPA or what was measured faster", library.joint_attention,
        _library_refuses,
    ),
    dispatch.Implementation("reference", "plain PyTorch, softmax in fp32", reference.joint_attention),
)
