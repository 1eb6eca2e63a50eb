"""The kernels of csrc/cuda, as nvcc compiles them: the same figures as of Triton's."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from rfkernels import build
from rfkernels.inspect.compile import INSTRUCTIONS, Compiled, occupancy, tool

THREADS = {"960": 128, "1152": 160, "1536": 192, "1920": 256, "2432": 320, "3072": 384, "any": 256, "any_wide": 512}
"""Of a block of the adaLN family, by the end of a kernel's name; 128 of the others. As in csrc/cuda/kernels.cu."""


def compiled(targets: tuple[str, ...], anew: bool = False) -> dict[str, Compiled]:
    """"cuda kernel target" -> report, for those of the targets that csrc/cuda is built for. What `python -m
    rfkernels.build` has compiled of these sources with this nvcc is not compiled again, unless asked for.

    Raises: CannotBuild, without nvcc.
    """
    wanted = [target for target in build.CUDA_TARGETS if f"sm_{target}" in targets]
    anew = anew or build.built_by() != build.nvcc_version()
    binaries = {target: None if anew else build.cuda_binary(target) for target in wanted}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        build.compile_cuda(Path(folder), tuple(target for target in wanted if not binaries[target]))
        for target in wanted:
            for kernel in read(binaries[target] or Path(folder) / build.binary(target), target):
                found[f"cuda {kernel.kernel} {kernel.target}"] = kernel
    return found


def version() -> str:
    """Of nvcc, "13.0". Raises: CannotBuild."""
    return re.findall(r"release (\d+\.\d+)", build.nvcc_version())[0]


def read(path: Path, target: int) -> list[Compiled]:
    """Every kernel of a binary."""
    usage, code = tool("cuobjdump", "-res-usage", path), tool("nvdisasm", path)
    bodies = dict(re.findall(r"\.section\s+\.text\.(\w+),.*?\n(.*?)(?=\n\t?\.section|\Z)", code, re.S))
    found = []
    for name, registers, shared in re.findall(r"Function (\w+):\s*REG:(\d+).*?SHARED:(\d+)", usage, re.S):
        body = bodies[name]
        counts = {key: len(re.findall(pattern, body)) for key, pattern in INSTRUCTIONS.items()}
        spills, warps = len(re.findall(r"\b(?:LDL|STL)\b", body)), threads(name) // 32
        fits = occupancy(target, int(registers), int(shared), warps)
        found.append(Compiled(name, f"sm_{target}", int(registers), spills, int(shared), warps, fits, counts))
    return sorted(found, key=lambda kernel: kernel.kernel)


def threads(name: str) -> int:
    family, _, size = name.replace("any_wide", "anywide").rpartition("_")
    return THREADS[size.replace("anywide", "any_wide")] if "adaln" in family else 128


def defects(reports: dict[str, Compiled]) -> list[str]:
    """What none may do: spill, not fit, and, at a width of its own, load activations in less than 16 bytes; mean, rstd
    and what tells dtypes apart are narrow."""
    found = []
    for key, r in reports.items():
        if r.spills:
            found.append(f"{key}: {r.spills} spills")
        if r.occupancy == 0:
            found.append(f"{key}: does not fit on a multiprocessor")
        if "any" not in r.kernel and r.counts["ld"] - r.counts["ld16"] > 2:
            found.append(f"{key}: activations loaded in less than 16 bytes")
    return found
