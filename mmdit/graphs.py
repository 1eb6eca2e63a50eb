"""A model's forward as CUDA graphs: captured once for a shape, then replayed without host time between its kernels."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmdit.model import MMDiT
from rfkernels import dispatch

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
WARMUPS = 2              # kernels compile and libraries make their workspaces before a capture


def refusal(model: MMDiT) -> str | None:
    """Why a model cannot be replayed, or None. A replay runs kernels alone: what Python does in between is left out."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "the model has forward hooks"
    parameters = list(model.parameters())
    if parameters[0].device.type != "cuda":
        return f"the model is on {parameters[0].device}"
    if any(isinstance(p, DTensor) for p in parameters):
        return "the model is sharded"
    return None


def capture(forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(what runs the forward's kernels again, the output that they write)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    return graph.replay, out


class Graphs:
    """Those of one model, one for each shape of its inputs and set of skipped blocks. Every input is copied to where
    the capture read it, so one capture serves all texts, times and batches of a shape."""

    def __init__(self, weights: tuple[int, ...], capture: Capture = capture) -> None:
        self.weights, self._capture = weights, capture
        self._captured: dict[Any, tuple[Callable[[], None], list[Tensor], Tensor]] = {}

    def __call__(
        self, model: MMDiT, z: Tensor, context: Tensor, lengths: Tensor | None, modulation: Tensor,
        skip_blocks: Collection[int],
    ) -> Tensor:  # fmt: skip
        """The model's output; arguments as of its forward."""
        given = [z, context, modulation, *([] if lengths is None else [lengths])]
        circumstances = torch.is_autocast_enabled("cuda"), dispatch.forced()
        key = (*((t.shape, t.dtype) for t in given), tuple(sorted(skip_blocks)), *circumstances)
        if key not in self._captured:
            own = [t.clone() for t in given]

            def forward() -> Tensor:
                own_z, own_context, own_modulation, *own_lengths = own
                out: Tensor = model(
                    own_z, None, own_context, None, *own_lengths, modulation=own_modulation, skip_blocks=skip_blocks
                )
                return out

            replay, out = self._capture(forward)
            self._captured[key] = replay, own, out
        replay, own, out = self._captured[key]
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        replay()
        return out.clone()


_of: WeakKeyDictionary[MMDiT, Graphs] = WeakKeyDictionary()


def of(model: MMDiT) -> Graphs:
    """The graphs of a model, kept as long as it lives and its weights stay where they are; their values may change."""
    weights = tuple(p.data_ptr() for p in model.parameters())
    if model not in _of or _of[model].weights != weights:
        _of[model] = Graphs(weights)
    return _of[model]
