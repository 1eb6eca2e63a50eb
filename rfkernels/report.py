"""What somebody who helps needs to know: python -m rfkernels.report

Versions, device, native code, and which implementation each op takes on small inputs, and why.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import rfkernels
from rfkernels import dispatch, native

PACKAGES = ("triton", "numpy", "safetensors", "diffusers", "transformers", "flash-attn", "liger-kernel")
VARIABLES = ("RFKERNELS_BACKEND", "RFKERNELS_LAUNCH", "RFKERNELS_NATIVE", "RFKERNELS_CACHE", "TRITON_INTERPRET")


def versions() -> dict[str, str]:
    found = {"rfkernels": rfkernels.__version__, "Python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, str]:
    found = {"system": platform.platform(), "CPU threads": str(torch.get_num_threads())}
    found["CUDA of PyTorch"] = torch.version.cuda or "none"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found[f"GPU {i}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
    if not torch.cuda.is_available():
        found["GPU"] = "none that PyTorch sees"
    found["native code"] = native.described().removeprefix("native code: ")
    found["variables"] = ", ".join(f"{n}={os.environ[n]}" for n in VARIABLES if n in os.environ) or "none set"
    return found


def chosen() -> dict[str, str]:
    """Of each op on small bf16 inputs, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ones = lambda *shape: torch.ones(shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    x, vector, latent = ones(1, 8, 64), ones(1, 64), ones(1, 16, 8, 8)
    q, weight = ones(1, 8, 1, 64), ones(64)
    inputs = {
        "adaln": (x, vector, vector),
        "gated_adaln": (x, x, vector, vector, vector),
        "gated_residual": (x, x, vector),
        "qk_norm": (q, q, weight, weight),
        "joint_attention": ([rfkernels.Stream(q, q, q, weight, weight)],),
        "gelu_mlp": (x, ones(256, 64), None, ones(64, 256), None),
        "rectified_flow": (latent, latent, torch.ones(1, device=device)),
        "weighted_mse": (latent, latent, torch.ones(1, device=device)),
    }
    assert inputs.keys() <= set(dispatch.ops())
    return {op: rfkernels.explain(op, *args).split(": ", 1)[1].split("\n")[0] for op, args in inputs.items()}


def report() -> str:
    parts = {"versions": versions(), "machine": machine(), "ops, on small bf16 inputs": chosen()}
    lines = []
    for title, values in parts.items():
        width = max(map(len, values))
        lines += [title, *(f"  {name:{width}s}  {value}" for name, value in values.items()), ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(report())
