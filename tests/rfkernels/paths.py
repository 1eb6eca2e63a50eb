"""The paths of the fused ops that the same tests run on: Triton's kernels and the native ones of a CPU.

A module that runs its tests on both says `pytestmark = pytest.mark.usefixtures("path")` and calls ops inside
`kernels()`. A test that is about Triton itself is marked `triton_only`.
"""

import rfkernels

_current = "triton"


def path():
    return _current


def kernels():
    return rfkernels.backend(_current)


def operator(name):
    """What an op's operator is called on this path."""
    return name if _current == "triton" else f"{name}_native"


def take(name):
    global _current
    _current = name
