"""Compiles what a launcher would launch, for a GPU that is not there, and reads the machine code."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Per multiprocessor: registers, shared memory in bytes, warps, programs (CUDA C++ programming guide, capabilities).
LIMITS = {
    80: (65536, 166912, 64, 32),
    86: (65536, 102400, 48, 16),
    90: (65536, 233472, 64, 32),
    100: (65536, 233472, 64, 32),
}
INSTRUCTIONS = {
    "ld16": r"\bLDG(?:STS)?\.E\.(?:\w+\.)*128\b",                       # LDGSTS: to shared memory, ahead of time
    "ld": r"\bLDG(?:STS)?\b",
    "st16": r"\bSTG\.E\.(?:\w+\.)*128\b",
    "st": r"\bSTG\b",
    "mma": r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b",
    "wgmma": r"\bHGMMA\b",
}


@dataclass
class Compiled:
    """One kernel compiled for one target."""

    kernel: str
    target: str
    registers: int
    spills: int
    """Accesses to local memory, where goes what does not fit in registers."""
    shared: int
    """Bytes of shared memory."""
    warps: int
    occupancy: float
    """Share of a multiprocessor's warps that can be resident; 0 where unknown."""
    counts: dict[str, int] = field(default_factory=dict)
    """Global loads and stores, of them 16 bytes wide; matrix instructions, of them wgmma."""
    loops: list[int] = field(default_factory=list)
    """Instructions of each innermost loop with matrix products, smallest first."""
    moved: float = 0.0
    """Bytes of all the case's kernels' tensor arguments over the least that must move, each counted once a kernel."""
    excess: float = 1.05
    """What `moved` may be."""
    key: str = ""
    """Hash of all that the machine code comes from and of what reads it; equal keys, equal figures."""


@dataclass(frozen=True)
class Launched:
    """One launch."""

    name: str
    """The kernel's."""
    kernel: Any
    """Triton's compiled kernel; None where its key was known."""
    bytes: int
    """Of its tensor arguments."""
    key: str
    """As in `Compiled`."""


class _Driver:
    """Stands in for a GPU driver: names the target, allocates nothing, runs nothing."""

    def __init__(self, backend: str, arch: int | str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
        self._arch = arch

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> str:
        return f"{self._target.backend}{self._arch}"               # Triton keeps what it compiled by this name

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_device_capability(self, device: object = None) -> tuple[int, int]:
        return divmod(self._arch, 10) if isinstance(self._arch, int) else (9, 4)

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def compile_only(backend: str, arch: int | str, known: Container[str] = ()) -> Iterator[list[Launched]]:
    """Inside, a kernel launch on "meta" tensors compiles exactly what it would compile on this target, without running
    it; what has one of the `known` keys is not compiled. Yields the list that launches are appended to."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched: list[Launched] = []
    keys: dict[int, str] = {}                                      # of what Triton keeps in memory, by its identity
    key = ""
    run, before, hook = JITFunction.run, driver.__dict__.get("_active"), knobs.runtime.jit_cache_hook

    def compiling(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        flat = [inner for a in args for inner in (a if isinstance(a, tuple) else (a,))]
        tensors = [a for a in flat if isinstance(a, torch.Tensor)]
        tensors += [behind for a in tensors for behind in getattr(a, "behind", ())]            # a table of addresses
        size = sum(t.numel() * t.element_size() for t in tensors)
        own = key if kernel is None else keys.setdefault(id(kernel), key)
        launched.append(Launched(self.fn.__name__, kernel, size, own))
        return kernel

    def about_to_compile(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        nonlocal key
        key = key_of(fn.jit_function, compile, f"{backend} {arch}")
        return key in known                                                          # true: Triton does not compile

    driver.set_active(_Driver(backend, arch))
    JITFunction.run, knobs.runtime.jit_cache_hook = compiling, about_to_compile
    try:
        yield launched
    finally:
        JITFunction.run, knobs.runtime.jit_cache_hook = run, hook
        if before is not None:
            driver.set_active(before)


def key_of(function: Any, compile: dict[str, Any], target: str) -> str:
    """Of source, also of what it calls and the line it begins at, argument types, constants, launch settings, target,
    Triton, and this file, which reads the code."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(function, compile["signature"], compile["constants"], compile["configs"][0]).hash()
    parts = source, compile["key"], target, triton.__version__, Path(__file__).read_text()
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def tool(name: str, *arguments: str | Path) -> str:
    import triton

    path = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *map(str, arguments)], capture_output=True, text=True)
    return done.stdout + done.stderr


def read_cuda(launch: Launched, arch: int) -> Compiled:
    """Registers, spills and instruction mix from the cubin, by the tools that come with Triton."""
    name, kernel = launch.name, launch.kernel
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "k.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", cubin)
        code = tool("nvdisasm", cubin)
    found = re.search(r"REG:(\d+)", usage)
    if found is None or "/*0000*/" not in code:
        raise RuntimeError(f"{name}: Triton's cuobjdump or nvdisasm gave nothing readable: {(usage + code)[:300]}")
    registers, warps, shared = int(found[1]), kernel.metadata.num_warps, kernel.metadata.shared
    counts = {key: len(re.findall(pattern, code)) for key, pattern in INSTRUCTIONS.items()}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    fits = occupancy(arch, registers, shared, warps)
    return Compiled(name, f"sm_{arch}", registers, spills, shared, warps, fits, counts, _loops(code), key=launch.key)


def _loops(code: str) -> list[int]:
    """Lengths of the loops that multiply matrices and hold no other such loop; a loop ends in a branch to before it."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,6}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    multiplies = re.compile(INSTRUCTIONS["mma"])
    spans = []
    for end, text in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", text)
        start = labels.get(target[1], end + 1) if target else end + 1
        if start <= end and any(multiplies.search(i) for i in instructions[start : end + 1]):
            spans.append((start, end))
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    return sorted(b - a + 1 for a, b in inner)


def occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    file, memory, most, programs = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256                     # registers are handed out to warps in units of 256
    resident = min(file // (per_warp * warps), memory // (shared + 1024), most // warps, programs)
    return resident * warps / most


def read_hip(launch: Launched, arch: str) -> Compiled:
    code, metadata = launch.kernel.asm["amdgcn"], launch.kernel.metadata

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", code)
        return int(found[1]) if found else 0

    wide = {"ld16": r"(?:global|buffer)_load_dwordx4", "st16": r"(?:global|buffer)_store_dwordx4"}
    all_ = {"ld": r"(?:global|buffer)_load_", "st": r"(?:global|buffer)_store_", "mma": r"v_mfma"}
    counts = {key: len(re.findall(rf"^\s*{p}", code, re.M)) for key, p in {**wide, **all_}.items()}
    registers, spills = number("vgpr_count"), number("vgpr_spill_count")
    shared, warps = metadata.shared, metadata.num_warps
    return Compiled(launch.name, arch, registers, spills, shared, warps, 0.0, counts, key=launch.key)
