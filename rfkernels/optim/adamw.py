"""The optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rfkernels import checks, dispatch
from rfkernels.optim import launch, native, reference
from rfkernels.optim.reference import STATES, Settings
from rfkernels.triton_support import refuses_triton


class AdamW(torch.optim.Optimizer):
    """AdamW with states of few bits, and weights in bf16 that are rounded at random; see README.md.

    Args:
        params: fp32 or bf16, plain or sharded by FSDP2 (DTensors, `Shard(0)`).
        lr, betas, eps, weight_decay: as of torch.optim.AdamW. With 8 bits an eps far below 1e-8 does not matter.
        states: "bf16" or "int8"; "fp32" for comparison. Parameters of one dimension have fp32 states.
        seed: of the rounding's noise.
    Raises: ValueError for numbers that cannot be meant, or another sharding.

    >>> layer = torch.nn.Linear(8, 4)
    >>> optimizer = AdamW(layer.parameters(), lr=1e-3, states="int8")
    """

    grad_scale: Tensor | None = None
    """Gradients are divided by it."""
    found_inf: Tensor | None = None
    """Where it is 1 nothing is changed."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, states: str = "int8", seed: int = 0,
    ) -> None:  # fmt: skip
        checks.choice("AdamW", "states", states, STATES)
        for name, value, most in (("betas[0]", betas[0], 1), ("betas[1]", betas[1], 1)):
            if not 0 <= value < most:
                raise ValueError(f"AdamW: {name} is {value}; expected a number from 0 to below {most}")
        if not (lr >= 0 and eps > 0 and weight_decay >= 0):
            raise ValueError(f"AdamW: lr is {lr}, eps {eps}, weight_decay {weight_decay}; expected positive numbers")
        self.states, self.seed = states, seed
        self._held: dict[Tensor, _Held] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step, spread as it is."""
        state = reference.empty_state(_rows(_local(parameter)), self.states if parameter.ndim > 1 else "fp32")
        if parameter.ndim == 1:
            state = {name: value.view(-1) for name, value in state.items()}
        made = {name: _spread(value, parameter) for name, value in state.items()}
        return {"step": torch.zeros((), device=parameter.device), **made}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer; states keep their dtypes, which PyTorch would make those of the parameters."""
        super().load_state_dict(state_dict)
        parameters = (p for group in self.param_groups for p in group["params"])
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        for parameter, number in zip(parameters, numbers, strict=True):
            if number in state_dict["state"]:
                held = state_dict["state"][number].items()
                self.state[parameter] = {name: value.to(parameter.device).clone() for name, value in held}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step with the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = list(self._updates())
        if updates:
            steps = [update.step for update in updates]
            torch._foreach_add_(steps, 1)
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf.to(step.device) for step in steps])
        by_kernel: dict[torch.device, list[launch.Update]] = defaultdict(list)
        for update in updates:
            run = _chosen(update.parameter, update.gradient)
            if run is launch.adamw:
                by_kernel[update.parameter.device].append(update)
            else:
                run(*update, self.grad_scale, self.found_inf)
        for members in by_kernel.values():
            launch.adamw_all(members, self.grad_scale, self.found_inf)
        written = [tensor for u in updates for tensor in (u.parameter, *u.state.values())]
        torch.autograd.graph.increment_version(written)                   # kernels write where autograd does not look
        return loss

    def _updates(self) -> Iterator[launch.Update]:
        """Of each parameter that has a gradient."""
        parameters = ((group, parameter) for group in self.param_groups for parameter in group["params"])
        for number, (group, parameter) in enumerate(parameters, 1):
            if parameter.grad is None:
                continue
            if not (state := self.state[parameter]):
                state.update(self.fresh(parameter))
            held = self._held.get(parameter)
            if held is None or not held.is_of(parameter, state):
                held = self._held[parameter] = _Held.of(parameter, state)
            key = (self.seed * 0x9E3779B1 + number * 0x85EBCA77) & 0x7FFFFFFF
            beta1, beta2 = group["betas"]
            settings = Settings(
                float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], key, held.first_row
            )
            gradient = _local(parameter.grad).contiguous()
            gradient = gradient if gradient.ndim == 2 else gradient.view(held.parameter.shape)
            yield launch.Update(held.parameter, gradient, held.state, state["step"], settings)


class _Held(NamedTuple):
    """A parameter and its state as rows, kept from step to step: views of hundreds of tensors take milliseconds."""

    parameter: Tensor
    state: dict[str, Tensor]
    first_row: int
    made_of: Tensor

    @classmethod
    def of(cls, parameter: Tensor, state: dict[str, Tensor]) -> _Held:
        own = {name: _rows(_local(value)) for name, value in state.items() if name != "step"}
        return cls(_rows(_local(parameter)), own, _first_row(parameter), state["exp_avg"])

    def is_of(self, parameter: Tensor, state: dict[str, Tensor]) -> bool:
        """False after a state was loaded or weights were exchanged."""
        same = self.parameter.data_ptr() == _local(parameter).data_ptr()
        return same and self.made_of is state["exp_avg"]


def _chosen(parameter: Tensor, gradient: Tensor) -> Callable[..., None]:
    """What does a step: the kernel on a GPU, the native code on a CPU, or else the definition.

    Raises: RuntimeError if a backend is forced that cannot run."""
    forced = dispatch.forced_backend("adamw")
    for name, run, refuses in (("triton", launch.adamw, _refuses_kernel), ("native", native.adamw, native.refuses)):
        if forced not in (None, name):
            continue
        reason = refuses(parameter, gradient)
        if reason is None:
            return run
        if forced == name:
            raise RuntimeError(f"AdamW: backend {forced!r} was forced but {reason}")
    return reference.adamw


def _refuses_kernel(parameter: Tensor, gradient: Tensor) -> str | None:
    if not parameter.is_cuda or not parameter.is_contiguous():
        return f"the parameter is on {parameter.device}, contiguous: {parameter.is_contiguous()}"
    return refuses_triton(parameter, gradient)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _rows(tensor: Tensor) -> Tensor:
    """[R, C], of no rows too; a vector as rows of one element, as it is sharded."""
    return tensor.view(tensor.shape[0], math.prod(tensor.shape[1:]))


def _sharded(parameter: Tensor) -> bool:
    if not hasattr(parameter, "placements"):
        return False
    kinds = [str(placement) for placement in parameter.placements]
    if any(not (placement.is_replicate() or placement.is_shard(0)) for placement in parameter.placements):
        raise ValueError(f"AdamW: a parameter is placed as {', '.join(kinds)}; expected whole rows on each process")
    return True


def _first_row(parameter: Tensor) -> int:
    if not _sharded(parameter):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = parameter.device_mesh, parameter.placements                                   # type: ignore[attr-defined]
    _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    return int(offset[0])


def _spread(local: Tensor, parameter: Tensor) -> Tensor:
    """A state's rows as a tensor that is placed as its parameter."""
    if not _sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    shape = (parameter.shape[0], *local.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    made: Tensor = DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride  # type: ignore[attr-defined]
    )
    return made
