"""Muon for the matrices inside blocks, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the momentum of a matrix is replaced by the
nearest matrix with orthonormal rows or columns, so that every direction in it moves by as much. q, k and v, which lie
in one matrix, are orthogonalised apart. Matrices are gathered whole on each process, so the weights do not depend on
how many there are; what that costs at scale has not been measured.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.engine.parallel import like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial that takes singular values from (0, 1] to about 1; the post's."""
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Singular values of about 1 (0.7 to 1.2) in place of their own, by Newton-Schulz iterations.

    Args: matrices: [N, rows, columns], each scaled by anything. Computed in fp32 on a CPU, in bf16 on a GPU.
    Returns: [N, rows, columns] fp32.
    """
    a, b, c = COEFFICIENTS
    x = matrices.float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Steps of matrices. Like PyTorch's fused optimizers it divides gradients by the tensor `grad_scale` and leaves
    everything alone where the tensor `found_inf` is 1, without waiting for the device.

    Args:
        params: groups of matrices; "pieces" of a group: how many lie in one matrix, one above the other.
        lr: length of a step: a matrix [rows, columns] moves by lr max(1, rows / columns)^0.5 along its direction.
        momentum: decay of the gradient's average, applied as Nesterov's.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "pieces": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:                                                    # type: ignore[override]
        alike: dict[tuple[int, ...], list[tuple[nn.Parameter, int, dict[str, Any], Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                whole = self._direction(parameter, group)
                for i, piece in enumerate(whole.chunk(group["pieces"])):
                    alike[tuple(piece.shape)].append((parameter, i, group, piece))
        moves: dict[nn.Parameter, dict[int, Tensor]] = defaultdict(dict)
        for (rows, columns), members in alike.items():
            found = orthogonalised(torch.stack([piece for *_, piece in members])) * max(1.0, rows / columns) ** 0.5
            for (parameter, i, _, _), move in zip(members, found, strict=True):
                moves[parameter][i] = move
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p in moves):
                pieces, here = moves[parameter], _local(parameter)
                move = _local(like(parameter, torch.cat([pieces[i] for i in range(len(pieces))])))
                change = group["lr"] * (move + group["weight_decay"] * here)
                here.sub_(change if self.found_inf is None else torch.where(self.found_inf > 0, 0.0, change))

    def _direction(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The gradient's average, looked ahead; whole."""
        state, beta = self.state[parameter], group["momentum"]
        assert parameter.grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient, average = _local(parameter.grad), _local(state["momentum"])
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        moved = average.lerp(gradient, 1 - beta)
        average.copy_(moved if self.found_inf is None else torch.where(self.found_inf > 0, average, moved))
        ahead = gradient.lerp(average, beta)
        if not isinstance(parameter, DTensor):
            return ahead
        mesh, placements = parameter.device_mesh, parameter.placements
        spread = DTensor.from_local(ahead, mesh, placements, shape=parameter.shape, stride=parameter.stride())
        return spread.full_tensor()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MuonAdamW:
    """Both, as one optimizer to those who step, save and restore it."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        self.param_groups = [*adamw.param_groups, *muon.param_groups]
        self.state = muon.state = adamw.state
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    def step(self) -> None:
        for one in (self.muon, self.adamw):
            one.grad_scale, one.found_inf = self.grad_scale, self.found_inf                          # type: ignore[union-attr]
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in (self.muon, self.adamw):
            one.zero_grad(set_to_none)
