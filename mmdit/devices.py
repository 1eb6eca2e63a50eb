"""Where things run."""

from __future__ import annotations

import torch


def pick(asked: torch.device | str | None) -> torch.device:
    """What was asked for, or a GPU if there is one. Raises: ValueError for what PyTorch does not know or see."""
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"device is {asked!r}; expected cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {asked}, but PyTorch sees no GPU")
    return device
