"""Builds the native code of csrc: python -m rfkernels.build

Nothing needs it: without a compiler, or without having run this, PyTorch's own kernels and Triton's launcher do the
work, and `rfkernels.explain` says so. What is built lies in a cache by the versions of PyTorch and Python and the
sources, so a second build does nothing and another version of any of them never loads it. Importing builds nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

ISAS: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
}
"""Flags of the instruction sets that the kernels are compiled for on x86, besides the compiler's own choice."""
KERNELS = "cpu/kernels.cpp"                    # once for each of them
PYTORCH = (("ops",), ("cpu",), ("launch", "lt"))         # folders of what knows PyTorch, those compiled together
NAME = "rfkernels_native.so"
CUDA = "cuda/kernels.cu"                       # once for each of
CUDA_TARGETS = (80, 90, 100)                   # which later minor versions of the same major one run too


class CannotBuild(RuntimeError):
    """Why there is nothing built, in a line."""


@lru_cache
def sources() -> Path:
    """The folder csrc, of a checkout or of an installed package."""
    package = Path(__file__).resolve().parent
    return next((f for f in (package / "csrc", package.parent / "csrc") if f.is_dir()), package / "csrc")


def x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@lru_cache
def key() -> str:
    """Names what these sources are for this PyTorch and CUDA, this Python and this kind of machine."""
    versions = f"{torch.__version__} {torch.version.cuda} {sys.version} {platform.machine()} {sys.platform}"
    digest = hashlib.sha256(versions.encode())
    for path in (Path(__file__), *sorted(sources().rglob("*"))):
        if path.suffix in (".py", ".cpp", ".cu", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def folder() -> Path:
    """Where it is built: in RFKERNELS_CACHE, or in the user's cache."""
    given = os.environ.get("RFKERNELS_CACHE")
    home = given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rfkernels"
    return Path(home) / f"torch-{torch.__version__}-{key()}"


def built() -> Path | None:
    """The library for this PyTorch and these sources, if it was built."""
    path = folder() / NAME
    size = path.with_suffix(".size")                                  # one that was cut off would end the process
    whole = path.is_file() and size.is_file() and size.read_text() == str(path.stat().st_size)
    return path if whole else None


def cuda_binary(capability: int) -> Path | None:
    """The CUDA kernels for a GPU of this compute capability (90: sm_90), if they were built."""
    target = next((t for t in CUDA_TARGETS if t // 10 == capability // 10 and t <= capability), None)
    path = folder() / binary(target or 0)
    return path if path.is_file() else None


def binary(target: int) -> str:
    """File name of the CUDA kernels for sm_`target`."""
    return f"rfkernels_{target}.cubin"


def cuda_missing() -> str | None:
    """Why there are no CUDA kernels beside the built library, or None."""
    told = folder() / "cuda"
    return (told.read_text() or None) if told.is_file() else "they are not built"


def nvcc() -> str:
    """Raises: CannotBuild."""
    asked = os.environ.get("NVCC") or "nvcc"
    if found := shutil.which(asked):
        return found
    raise CannotBuild(f"{asked} is not on the path")


def nvcc_version() -> str:
    """All that it says of itself. Raises: CannotBuild."""
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout


def built_by() -> str | None:
    """`nvcc_version` of the nvcc that built the CUDA kernels which lie here."""
    told = folder() / "nvcc"
    return told.read_text() if told.is_file() else None


def _cuda_jobs(into: Path, targets: tuple[int, ...] = CUDA_TARGETS) -> list[list[str]]:
    """What compiles csrc/cuda, for each kind of GPU.

    Raises: CannotBuild, where PyTorch is not for CUDA or there is no nvcc.
    """
    if torch.version.cuda is None:
        raise CannotBuild("this PyTorch is not for CUDA")
    return [
        [nvcc(), "-std=c++17", f"-arch=sm_{target}", "-cubin", str(sources() / CUDA), "-o", str(into / binary(target))]
        for target in targets
    ]


def compiler() -> str:
    """Raises: CannotBuild."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise CannotBuild(f"no C++ compiler: {asked or 'g++, c++ or clang++'} is not on the path")


def headers() -> list[str]:
    """Raises: CannotBuild."""
    python, root = Path(sysconfig.get_paths()["include"]), Path(torch.__file__).parent / "include"
    wanted = {"Python's headers (python3-dev)": python / "Python.h", "PyTorch's headers": root / "ATen/ATen.h"}
    for what, path in wanted.items():
        if not path.is_file():
            raise CannotBuild(f"no {what}: {path} is not there")
    return [f"-I{root}", f"-I{root / 'torch/csrc/api/include'}", f"-I{python}"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{' '.join(command)}\n{done.stderr.strip()[-4000:]}")


def _together(folders: tuple[str, ...], into: Path) -> Path:
    """One source of all in these folders: PyTorch's headers take longer than what stands in them."""
    made = into / f"{folders[0]}.cpp"
    files = (path for name in folders for path in sorted((sources() / name).glob("*.cpp")))
    made.write_text("".join(f'#include "{path}"\n' for path in files if path != sources() / KERNELS))
    return made


def _cxx_jobs(into: Path) -> list[list[str]]:
    """What compiles the parts of the library, each but for its "-o". Raises: CannotBuild."""
    cxx, include = compiler(), headers()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    torch_flags = ["-std=c++20", "-O2", "-fPIC", "-fopenmp", abi]
    loops = ["-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
             "-ffp-contract=off"]        # g - mean(g) of one channel is 0, as in eager PyTorch
    isas: dict[str, tuple[str, ...]] = {"portable": (), **(ISAS if x86() else {})}
    own = ["-DRFKERNELS_X86"] if x86() else []
    parts = [[*torch_flags, *own, *include, str(_together(folders, into))] for folders in PYTORCH]
    parts += [[*loops, f"-DRFKERNELS_ISA={isa}", *flags, str(sources() / KERNELS)] for isa, flags in isas.items()]
    return [[cxx, *part, "-c", "-o", str(into / f"{i}.o")] for i, part in enumerate(parts)]


def compile_cuda(into: Path, targets: tuple[int, ...]) -> None:
    """Binaries of the CUDA kernels alone. Raises: CannotBuild."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, _cuda_jobs(into, targets)))


def _compile(into: Path) -> str | None:
    """The library and the binaries of the CUDA kernels, in a folder of their own. Returns why there are none of these.

    Raises: CannotBuild, without the library.
    """
    jobs = _cxx_jobs(into)
    try:
        cuda, reason = _cuda_jobs(into), None
    except CannotBuild as error:
        cuda, reason = [], str(error)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        library, binaries = [pool.submit(_run, job) for job in jobs], [pool.submit(_run, job) for job in cuda]
    for job in library:
        job.result()
    objects = [job[-1] for job in jobs]
    where = f"-L{Path(torch.__file__).parent / 'lib'}"
    libraries = [where, "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
    _run([compiler(), "-shared", *objects, "-o", str(into / NAME), *libraries])
    return next((str(failed) for job in binaries if (failed := job.exception())), reason)


def build() -> tuple[Path, bool]:
    """The library, and whether it was built just now. One process builds, others wait for it; one that is killed leaves
    nothing that has to be removed.

    Raises: CannotBuild.
    """
    if not (sources() / KERNELS).is_file():
        raise CannotBuild(f"no sources: {sources() / KERNELS} is not there")
    try:
        where = folder()
    except RuntimeError as error:                                      # no home folder
        raise CannotBuild(f"{error} RFKERNELS_CACHE names a folder") from error
    try:
        where.mkdir(parents=True, exist_ok=True)
        lock = open(where / "lock", "w")                               # noqa: SIM115 - held until this function ends
    except OSError as error:
        raise CannotBuild(f"{where}: {error.strerror}; RFKERNELS_CACHE names another folder") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                               # the system lets go of it, whatever happens
        if found := built():
            if cuda_missing() and torch.version.cuda and shutil.which(os.environ.get("NVCC") or "nvcc"):
                with tempfile.TemporaryDirectory(dir=where) as made:           # nvcc may have come since
                    try:
                        compile_cuda(Path(made), CUDA_TARGETS)
                        reason = None
                    except CannotBuild as error:
                        reason = str(error)
                    _keep_cuda(Path(made), where, reason)
            return found, False
        with tempfile.TemporaryDirectory(dir=where) as made:
            reason = _compile(Path(made))
            _keep_cuda(Path(made), where, reason)
            (where / NAME).with_suffix(".size").write_text(str((Path(made) / NAME).stat().st_size))
            os.replace(Path(made) / NAME, where / NAME)
    return where / NAME, True


def _keep_cuda(made: Path, where: Path, reason: str | None) -> None:
    """What was compiled of the CUDA kernels, and why the rest was not, in a line."""
    for path in made.glob("*.cubin"):
        os.replace(path, where / path.name)
        (where / "nvcc").write_text(nvcc_version())
    (where / "cuda").write_text((reason or "").strip().split("\n")[-1][:200])


def main() -> int:
    start = time.monotonic()
    try:
        path, fresh = build()
    except CannotBuild as error:
        print(f"native code: not built. {error}\nPyTorch's own kernels run in its place.", file=sys.stderr)
        return 1
    what = f"built in {time.monotonic() - start:.0f} s" if fresh else "already built"
    from rfkernels import native

    if reason := native.missing():
        remedy = "" if fresh else f"; remove {path} to build it anew"
        print(f"native code: {what}, but {reason}{remedy}", file=sys.stderr)
        return 1
    print(f"native code: {what} for torch {torch.__version__}, {native.instructions()} on this CPU: {path}")
    reason, targets = cuda_missing(), ", ".join(f"sm_{target}" for target in CUDA_TARGETS)
    print("CUDA kernels:", f"not built. {reason}; Triton's do the same" if reason else f"built for {targets}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
