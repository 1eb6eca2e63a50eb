"""Distances between sets of pictures in the space of any feature network."""

from __future__ import annotations

import numpy as np


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance of two Gaussians fitted to features [N, D] and [M, D]:
    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al. 2017; on CLIP features Sauer et al. 2021), in fp64.

    The trace of the square root is the sum of the roots of C1^(1/2) C2 C1^(1/2)'s eigenvalues, which are real and not
    negative, also for fewer samples than dimensions.
    Raises: ValueError for fewer than two samples or another number of features.
    """
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ValueError(
            f"frechet: features are {list(one.shape)} and {list(other.shape)}; expected two samples or more, [N, D]"
        )
    one, other = one.astype(np.float64), other.astype(np.float64)
    c1, c2 = np.atleast_2d(np.cov(one, rowvar=False)), np.atleast_2d(np.cov(other, rowvar=False))
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    means = ((one.mean(0) - other.mean(0)) ** 2).sum()
    return float(means + np.trace(c1) + np.trace(c2) - 2 * mixed)
