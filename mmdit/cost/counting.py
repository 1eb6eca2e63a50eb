"""What a computation costs, counted without running it: the kernels that PyTorch would launch, by shapes alone.

`trace` runs a step on fake tensors and records each operator that would launch a kernel: its FLOPs, the bytes that it
reads and writes, and which tensors they are, so that `stretches` can tell what a compiler could leave on chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from rfkernels import dispatch

MATMULS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.convolution", "aten.convolution_backward")
NOTHING_RUNS = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided", "aten.lift_fresh")
TWO = ("adaln_backward", "gated_adaln_backward", "gated_residual_backward", "qk_norm_backward", "gelu_backward",
       "weighted_mse")  # fmt: skip
LAUNCHES: dict[str, Callable[..., int]] = {f"rfkernels.{op}": lambda *args: 2 for op in TWO}
LAUNCHES |= {
    "rfkernels.rectified_flow_backward": lambda dz, dtarget, t, x0, noise: 1 if x0 is None else 2,
    "rfkernels.patch_embed_backward": lambda dy, latent, w, to_latent, to_w, bias, p: to_latent + to_w * (2 + bias),
    "rfkernels.patch_unembed_backward": lambda dlatent, x, w, to_x, to_w, p: to_x + 2 * to_w,
}
"""Of operators that launch more than one kernel, by their arguments; joint attention's: `attention_launches`."""


# Attention on a CPU, which torch's counter does not know before 2.15.
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop)
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop)

Key = tuple[int, ...]
"""Which memory: its storage, where in it a tensor begins, and its shape."""


@dataclass(frozen=True)
class Kernel:
    """One operator that launches something."""

    op: str
    kind: str
    """matmul, attention, modulation (the adaLN family), or other."""
    flops: int
    reads: dict[Key, int]
    """Bytes by part of a storage."""
    writes: dict[Key, int]
    launches: int

    @property
    def bytes(self) -> int:
        """Of the operator's tensors, each once; a kernel of several passes moves more."""
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def read_storages(self) -> set[int]:
        return {key[0] for key in self.reads}


@dataclass
class Trace:
    kernels: list[Kernel] = field(default_factory=list)
    kept: int = 0
    """Bytes that autograd keeps between forward and backward, weights left out."""
    weights: int = 0
    """Bytes of the parameters."""
    weight_storages: frozenset[int] = frozenset()
    forward: int = 0
    """How many of the kernels are the forward's."""

    @property
    def flops(self) -> int:
        return sum(k.flops for k in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(k.bytes for k in self.kernels)

    @property
    def launches(self) -> int:
        return sum(k.launches for k in self.kernels)


def storage(tensor: Tensor) -> int:
    """Tells tensors of one memory from others, fake ones too, while they live."""
    return tensor.untyped_storage()._cdata


def kind(op: str) -> str:
    if "attention" in op:
        return "attention"
    if op in MATMULS:
        return "matmul"
    return "modulation" if op.startswith("rfkernels.") and ("adaln" in op or "gated" in op) else "other"


def attention_flops(op: str, args: tuple[Any, ...]) -> int:
    """Of rfkernels' joint attention: two products of the scores' size forward, five backward (as it is usually counted,
    although seven are computed)."""
    from rfkernels.joint_attention.layout import parse

    backward = op.endswith("backward")
    streams = parse(*args[2:4]) if backward else parse(*args[:2])
    batch, _, heads, dim = streams[0].k.shape
    queries, keys = (sum(s.k.shape[1] for s in streams if s.asks or every) for every in (False, True))
    return (10 if backward else 4) * batch * heads * queries * keys * dim


def attention_launches(op: str, args: tuple[Any, ...]) -> int:
    """Of rfkernels' joint attention. With norms on both sides and no rotation: rstd of the keys and attention; dQ, dK
    and dV, the sums of the weights' gradients, and those of biases where they are asked for. Otherwise q and k are
    prepared by a kernel each, in the backward again, and have a backward of their own. Gradients of weights of several
    dtypes are cast to their own."""
    from rfkernels.joint_attention.layout import parse

    backward = op.endswith("backward")
    streams = parse(*args[2:4]) if backward else parse(*args[:2])
    inside = all(s.cos is None and s.k_weight is not None and (s.q_weight is not None or not s.asks) for s in streams)
    sides = [(s.q_weight, s.cos) for s in streams if s.asks] + [(s.k_weight, s.cos) for s in streams]
    prepared = 0 if inside else sum(weight is not None or cos is not None for weight, cos in sides)
    if not backward:
        return prepared + inside + 1
    weights = [weight for weight, _ in sides if weight is not None]
    sums = 1 if inside else len(weights)
    mixed = inside and len({weight.dtype for weight in weights}) > 1
    return 2 * prepared + 2 + sums + bool(args[6]) + sum(mixed and weight.dtype != torch.float32 for weight in weights)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._alive: list[Tensor] = []                       # so that no storage takes a dead one's place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        wrote = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._alive += wrote
        op = f"{func.namespace}.{func._opname}"
        known = {storage(t) for t in read}
        aliases = all(storage(t) in known for t in wrote)
        if not wrote or op in NOTHING_RUNS or (aliases and not func._schema.is_mutable):
            return out
        flops, launches = 0, LAUNCHES[op](*args) if op in LAUNCHES else 1
        if op.startswith("rfkernels.joint_attention"):
            flops, launches = attention_flops(op, args), attention_launches(op, args)
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
        self.kernels.append(Kernel(op, kind(op), flops, sizes(read), sizes(wrote), launches))
        return out


def sizes(tensors: list[Tensor]) -> dict[Key, int]:
    """Bytes by part of a storage: each element once, however often it is expanded."""
    return {
        (storage(t), int(t.storage_offset()), *t.shape): min(t.untyped_storage().nbytes(), t.numel() * t.element_size())
        for t in tensors
    }


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have parameters of this dtype; fake ones cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def keeping(weights: list[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd keeps inside, `weights` left out."""
    left_out, kept = {storage(w) for w in weights}, {}

    def pack(tensor: Tensor) -> Tensor:
        if storage(tensor) not in left_out:
            kept[storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


Made = tuple[Callable[..., Any], list[Tensor], list[Tensor]]
"""(what to call, its arguments, the weights)"""


def trace(make: Callable[[], Made], *, backward: bool, on_gpu: bool = True) -> Trace:
    """The kernels of a step.

    Args:
        make: gives what to call, its arguments, and the weights, in fake tensors, so that any size costs nothing.
        backward: whether the step is forward and backward; gradients of the outputs are at hand.
        on_gpu: count rfkernels' ops as on a GPU; if not, as on this machine.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    found = Trace()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        if on_gpu:
            stack.enter_context(dispatch.as_on_a_gpu())
        call, args, weights = make()
        found.weights = sum(w.numel() * w.element_size() for w in weights)
        found.weight_storages = frozenset(storage(w) for w in weights)
        counter = stack.enter_context(_Counter())
        if backward:
            with keeping(weights) as kept:
                outs = [t for t in tree_leaves(call(*args)) if isinstance(t, Tensor) and t.requires_grad]
            found.kept, found.forward = sum(kept.values()), len(counter.kernels)
            grads = [torch.empty_like(t) for t in outs]
            wanted = [t for t in (*args, *weights) if t.requires_grad]
            torch.autograd.grad(outs, wanted, grads, allow_unused=True)
        else:
            with torch.no_grad():
                call(*args)
            found.forward = len(counter.kernels)
        found.kernels = counter.kernels
    return found


# --- What a compiler could fuse ---------------------------------------------------------------------------------------


def stretches(kernels: list[Kernel]) -> list[Kernel]:
    """The kernels with every run of `other` ones between two products made one, which reads what comes from outside it
    and writes what is read after it: the most that a compiler can fuse without touching the products themselves."""
    last_read: dict[int, int] = {}                     # by storage: of what was written whole, a view may be read
    for i, k in enumerate(kernels):
        last_read.update(dict.fromkeys(k.read_storages, i))
    found: list[Kernel] = []
    start = 0
    while start < len(kernels):
        end = start
        while end < len(kernels) and kernels[end].kind == "other":
            end += 1
        if end == start:
            found.append(kernels[start])
            start += 1
            continue
        reads: dict[Key, int] = {}
        writes: dict[Key, int] = {}
        for k in kernels[start:end]:
            written = {key[0] for key in writes}
            reads.update({key: size for key, size in k.reads.items() if key[0] not in written})
            writes.update(k.writes)
        live = {key: size for key, size in writes.items() if last_read.get(key[0], end) >= end}   # unread: a result
        found.append(Kernel("fused", "other", 0, reads, live, 1))
        start = end
    return found
