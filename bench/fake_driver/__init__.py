"""Triton's launcher, and ours, over a CUDA driver that runs nothing: what a launch costs, and what it hands over.

    with fake_driver.installed(folder):
        with dispatch.as_on_a_gpu():
            rfkernels.adaln(x)                     # x on the CPU; compiled for sm_90, launched, nothing computed

Triton keeps the driver that it first finds, so a process installs it before anything else and keeps it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rfkernels import build

ARCH = 90


def library(folder: Path) -> Path:
    """Builds the driver in a folder. Raises: rfkernels.build.CannotBuild."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "libcuda.so.1"
    if not path.is_file():
        compiler = build.compiler()
        made = folder / f"libcuda-{os.getpid()}.so"
        command = [compiler, "-x", "c", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, str(Path(__file__).with_name("driver.c")), "-o", str(made)], check=True)
        os.replace(made, path)
        (folder / "libcuda.so").unlink(missing_ok=True)
        (folder / "libcuda.so").symlink_to(path.name)
    return path


def install(folder: Path) -> Any:
    """Makes it the driver of this process: Triton's active one, of one GPU of compute capability 9.0. Returns the
    library: `fake_record(path)` starts a record of launches, `fake_launches()` counts, `fake_fail(code)` fails them."""
    if "triton.runtime" in sys.modules and os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("fake_driver: kernels are interpreted in this process; unset TRITON_INTERPRET")
    path = library(folder)
    loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)             # by its soname, for every later dlopen
    loaded.fake_record.argtypes = [ctypes.c_char_p]
    loaded.fake_launches.restype = ctypes.c_long
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    class Fake(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=0: (ARCH // 10, ARCH % 10)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        @staticmethod
        def is_active() -> bool:
            return True

    triton.runtime.driver.set_active(Fake())
    return loaded
