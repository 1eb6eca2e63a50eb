"""A model's forward as CUDA graphs: captured once for a shape, then replayed without host time between its kernels."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmdit import adapters
from mmdit.model import MMDiT
from rfkernels import dispatch

Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]
WARMUPS = 2              # kernels compile and libraries make their workspaces before a capture
KEPT = 4                 # captures of a model, each with the memory of its activations


def refusal(model: MMDiT) -> str | None:
    """Why a model cannot be replayed, or None. A replay runs kernels alone: what Python does in between is left out."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "the model has forward hooks"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on: its copies of the weights would be captured, and are gone when it ends"
    parameters = list(model.parameters())
    if parameters[0].device.type != "cuda":
        return f"the model is on {parameters[0].device}"
    if any(hasattr(p, "device_mesh") for p in parameters):                   # DTensors; importing those takes 0.6 s
        return "the model is sharded"
    return None


def capture(forward: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """(what runs the forward's kernels again, the output that they write)."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):          # its own stream belongs to the device that was used first
            out = forward()
    return graph.replay, out


class Graphs:
    """Those of one model, for the last few shapes of its inputs and sets of skipped blocks. Every input is copied to
    where the capture read it, so one capture serves all texts, times and batches of a shape.

    Args: memory: where the model's parameters and buffers lie.
    """

    def __init__(self, memory: tuple[int, ...], capture: Capture = capture) -> None:
        self.memory, self._capture = memory, capture
        self.captured: OrderedDict[Any, tuple[Callable[[], None], list[Tensor], Tensor]] = OrderedDict()
        self._full = False

    def __call__(
        self, model: MMDiT, z: Tensor, context: Tensor, lengths: Tensor | None, modulation: Tensor,
        skip_blocks: Collection[int], references: Sequence[Tensor] = (),
    ) -> Tensor:  # fmt: skip
        """The model's output; arguments as of its forward."""
        given = [z, context, modulation, *references, *([] if lengths is None else [lengths])]
        how = len(references), tuple(sorted(skip_blocks)), torch.is_inference_mode_enabled(), dispatch.forced()
        key = (*((t.shape, t.dtype) for t in given), *how)
        if key not in self.captured and not self._full:
            self._make(key, model, given, skip_blocks, len(references))
        if key not in self.captured:
            return _called(model, given, skip_blocks, len(references))
        self.captured.move_to_end(key)
        replay, own, out = self.captured[key]
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        replay()
        return out.clone()

    def _make(
        self, key: Any, model: MMDiT, given: list[Tensor], skip_blocks: Collection[int], references: int
    ) -> None:  # fmt: skip
        own = [t.clone() for t in given]

        def forward() -> Tensor:
            return _called(model, own, skip_blocks, references)

        while len(self.captured) >= KEPT:
            self.captured.popitem(last=False)
        try:
            replay, out = self._capture(forward, own[0].device)
            self.captured[key] = replay, own, out
        except torch.OutOfMemoryError:
            self.captured.clear()
            self._full = True
            warnings.warn("no GPU memory for CUDA graphs: sampling continues without them", stacklevel=2)


def _called(model: MMDiT, given: list[Tensor], skip_blocks: Collection[int], references: int) -> Tensor:
    """The model's output for a graph's inputs, of which so many are references."""
    z, context, modulation, *others = given
    seen = {"references": others[:references]} if references else {}
    lengths = others[references:]
    out: Tensor = model(z, None, context, None, *lengths, modulation=modulation, skip_blocks=skip_blocks, **seen)
    return out


_of: WeakKeyDictionary[MMDiT, Graphs] = WeakKeyDictionary()


def of(model: MMDiT) -> Graphs:
    """The graphs of a model, kept as long as it lives and its weights stay where they are; their values may change.
    Adapters that are off have graphs of their own."""
    memory = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    memory += tuple(layer.enabled for _, layer in adapters.layers(model))
    if model not in _of or _of[model].memory != memory:
        _of[model] = Graphs(memory)
    return _of[model]
