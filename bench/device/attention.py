"""Is the compiler right? One bf16 attention at D = 64 against fp64, forward and backward:
python -m bench.device.attention

The kernels stand at the edge of what fits in registers, and versions of ptxas have been seen to miscompile such code.
Run once with the ptxas that comes with Triton and once with another, TRITON_PTXAS_PATH: if the two differ, or one is
wrong, it is the compiler's doing.
"""

from __future__ import annotations

import os
import sys

import torch

from bench.attention_error import error, tensors
from bench.device.runner import VERDICT

LIMIT = 2.0                  # times the error of eager PyTorch in the same dtype


def main() -> int:
    sizes = (154, 256) if torch.cuda.is_available() else (20, 33)
    exact = tensors(sizes, 2.0, torch.float64, "reference")
    ours, eager = (tensors(sizes, 2.0, torch.bfloat16, way) for way in ("triton", "eager"))
    print(f"{VERDICT}ptxas: {os.environ.get('TRITON_PTXAS_PATH', 'as it comes with Triton')}")
    ratios = {name: error(ours[name], exact[name]) / error(eager[name], exact[name]) for name in exact}
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(f"{VERDICT}error over that of eager bf16, at most {LIMIT:g} wanted: {told}")
    return int(not all(ratio <= LIMIT for ratio in ratios.values()))


if __name__ == "__main__":
    sys.exit(main())
