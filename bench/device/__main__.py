"""bench/gpu.sh first | second | third: what a GPU has to say in under five minutes a call.

    first    is everything right: the compiler, every kernel, training, sampling; a profile; compute-sanitizer
    second   how fast: the d = 24 step, ops, launchers, training; a sweep of settings, and the step with what it found
    third    against torch.compile, which takes a minute for each step, and against libraries

Each part has a deadline and leaves what it has; one that fails keeps no other from running. All of it is one archive,
OUT/<gpu>-<date>-<call>.tgz; given with --earlier, what passed there is not run again and its launch table is used.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import environment
from bench.device.runner import Outcome, Part, Queue, pack, unpack

SECONDS = 285.0              # of a call; its machine is given ten minutes at most, and each start costs one or two
PATIENCE = 5                 # times that, and each deadline, on a CPU, whose speed depends on what else it does
KERNEL_TESTS = ("adaln_kernels", "bias", "flow_kernels", "gelu_mlp", "join", "joint_attention_kernels",
                "joint_attention_operator", "optim", "patch_kernels", "qk_norm")  # fmt: skip
ENTERED = ("adaln_kernels", "bias", "gelu_mlp", "joint_attention_kernels", "qk_norm")
"""Of those, the tests of ops that the native launcher starts."""
PTXAS = ("ptxas-blackwell", "/usr/local/cuda/bin/ptxas")
STEP = "d24-256px-B32"
COMPILED = "max-autotune;compile;compile+cudnn;ours, compiled"
CRASHING = "flash-attn;flash3;flash4"            # a library that crashes has a part of its own
OPS = {                      # at 256 and at 1024 pixels, attention at 512 too
    "attention": "joint_attention-H24-B64-S154+256;joint_attention-H24-B16-S154+1024;joint_attention-H24-B4-S154+4096",
    "rows": "adaln-1536-B64-S256;qk_norm-1536-B64-S256;gelu_mlp-1536-B64-S256",
    "block": "block-1536-B64-S154+256;block-1536-B4-S154+4096",
}


def python(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", *map(str, arguments)]


def other_ptxas() -> str | None:
    """Another assembler than the one that Triton uses: that it ships for Blackwell, or CUDA's."""
    spec = find_spec("triton")
    shipped = Path(spec.origin or "").parent / "backends" / "nvidia" / "bin" if spec is not None else Path()
    return next((str(path) for path in (shipped / PTXAS[0], Path(PTXAS[1])) if path.is_file()), None)


def bench_part(name: str, file: str, ops: str, seconds: float, work: Path, **environment: str) -> Part:
    """A suite, its results in WORK/NAME.json."""
    results = ("--benchmark-json", work / f"{name}.json")
    told = ("-rs", "-W", "default::pytest_benchmark.logger.PytestBenchmarkWarning")       # why a contender is left out
    command = python("-m", "pytest", *told, f"bench/test_{file}.py", "--ops", ops, *results)
    return Part(name, command, seconds, environment={"BENCH_WITHOUT": "max-autotune", **environment})


def first(work: Path, pretend: bool) -> list[Part]:
    """Correctness."""
    ptxas, processes = other_ptxas(), "2" if pretend else "14"
    tests = [f"tests/rfkernels/test_{name}.py" for name in (("gelu_mlp",) if pretend else KERNEL_TESTS)]
    training = "bench.device.training"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", 1)
    spread = (*launcher, "-m", training, "plain")
    sanitized = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    one_attention = ("-m", "bench.device.attention")
    lengths = ("tests/rfkernels/test_joint_attention_kernels.py", "-k", "lengths_per_sample and True-True")
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}               # else a stray access hits a neighbour's block
    table = f"{work}.csrc"                                           # asks for all CUDA kernels and epilogues
    native = {"RFKERNELS_LAUNCH": "native"}
    csrc = {**native, "RFKERNELS_LAUNCH_TABLES": table}
    entered = [f"tests/rfkernels/test_{name}.py" for name in (("gelu_mlp",) if pretend else ENTERED)]

    def device_tests(name: str, files: list[str], marked: str = "device") -> list[str]:
        return python("-m", "pytest", "-p", "no:benchmark", "-m", marked, "-n", processes, "--dist", "load",
                      "--timeout", 150, "--tb", "line", "--junit-xml", work / f"{name}.xml", *files)  # fmt: skip

    return [
        Part("build", python("-m", "rfkernels.build"), 120, beside=True),
        Part("tests", device_tests("tests", tests), 240, beside=True, environment={"RFKERNELS_LAUNCH": "triton"}),
        Part("ptxas", python(*one_attention), 60),
        Part("train", python("-m", training, "plain"), 70),
        Part("sample", python("-m", training, "sampled"), 40),
        Part("spread", python(*spread), 60),
        Part("resume", python("-m", training, "resumed"), 60),
        Part("tuning", python("-m", "bench.device.tuning"), 90),
        Part("compiled", python("-m", training, "compiled"), 90),
        Part("table", python("-m", "bench.device.ways", "--table", table), 20, after="build"),
        Part("tests-native", device_tests("tests-native", entered), 60, environment=native, after="tests"),
        Part("tests-csrc", device_tests("tests-csrc", entered, "device and not same_kernel"), 60, environment=csrc,
             after="tests"),
        Part("profile", python("-m", "bench.profile", "--steps", "training"), 60),
        Part("racecheck", [*sanitized, "racecheck", "--kernel-regex", "kns=attention", *python(*one_attention)], 45,
             environment=uncached, needs="compute-sanitizer"),
        Part("memcheck", [*sanitized, "memcheck", *python("-m", "pytest", "-p", "no:xdist", *lengths)], 60,
             environment=uncached, needs="compute-sanitizer"),
        Part("ptxas-other", python(*one_attention), 60,
             environment={"TRITON_PTXAS_PATH": ptxas or "", "TRITON_CACHE_DIR": f"{work}.ptxas-other"}),
    ]  # fmt: skip


def second(work: Path, pretend: bool) -> list[Part]:
    """Numbers, most telling first: deadlines together are more than the time there is. What a sweep tries was compiled
    and chosen elsewhere if `candidates.json` is there already."""
    processes, most = ("2", "2") if pretend else ("14", "40")
    compile_ = ("-m", "bench.device.precompile", "--processes", processes, "--most", most, "--seconds", 120)
    sweep = ("-m", "bench.sweep", "--out", work, "--minutes", 0.7, "--candidates", work / "candidates.json")
    step, ops = sizes(pretend)
    known, eager = (work / "candidates.json").is_file(), {"BENCH_WITHOUT": f"{COMPILED};{CRASHING};diffusers"}
    return [
        Part("build", python("-m", "rfkernels.build"), 120, beside=True),
        *([] if known else [Part("precompile", python(*compile_), 130, beside=True)]),
        bench_part("step", "model", step, 100, work, **eager),
        Part("sweep", python(*sweep), 60, after="precompile"),
        *(bench_part(name, "ops", case, 40, work, **eager) for name, case in ops.items()),
        Part("ways", python("-m", "bench.device.ways"), 60, after="build"),
        Part("paper", python("-m", "bench.device.paper"), 120),
        bench_part("step-again", "model", step, 35, work, RFKERNELS_LAUNCH_TABLES=str(work), **eager),
        Part("optimizers", python("-m", "bench.device.optimizers"), 30),
        Part("settings", python("-m", "bench.device.settings"), 60),
        Part("error", python("-m", "bench.attention_error"), 30),
    ]


def third(work: Path, pretend: bool) -> list[Part]:
    """Against compilers and libraries."""
    step, ops = sizes(pretend)
    generated = "qk_norm" if pretend else "adaln-1536-B64-S256;gelu_mlp-1536-B64-S256"
    attention = ops.get("attention", "qk_norm")
    return [
        Part("build", python("-m", "rfkernels.build"), 120, beside=True),
        bench_part("step-compiled", "model", f"{step} training" if step == STEP else step, 150, work,
                   BENCH_WITHOUT="max-autotune"),
        *(bench_part(f"{name}-compiled", "ops", case, 100, work, BENCH_WITHOUT=f"max-autotune;{CRASHING}")
          for name, case in ops.items()),
        bench_part("libraries", "ops", attention, 50, work, BENCH_WITHOUT=COMPILED),
        Part("generated", python("-m", "bench.profile", "--ops", generated), 40),
    ]  # fmt: skip


def sizes(pretend: bool) -> tuple[str, dict[str, str]]:
    """(the model's step, ops) that are measured."""
    return ("d2", {"qk_norm": "qk_norm"}) if pretend else (STEP, OPS)


CALLS = {"first": first, "second": second, "third": third}


def prepared(pretend: bool) -> None:
    """The environment of all parts."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("OMP_NUM_THREADS", "1" if pretend else "2")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")                    # a machine without a network has no other
    if pretend:
        os.environ.update(BENCH_PRETEND="1", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def main(call: str, out: Path, pretend: bool, earlier: Path | None, candidates: Path | None, seconds: float,
         parts: str, hang: str) -> int:  # fmt: skip
    prepared(pretend)
    import torch

    if not pretend and not torch.cuda.is_available():
        print("error: PyTorch sees no GPU here; --pretend tries the script on a CPU", file=sys.stderr)
        return 1
    about: dict[str, Any] = {"call": call, "environment": environment.environment(), "pretended": pretend}
    print(about["environment"], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    slug = environment.device_name().lower().replace(" ", "_")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        known: dict[str, Outcome] = unpack(earlier, work) if earlier is not None else {}
        if candidates is not None:
            (work / "candidates.json").write_bytes(candidates.read_bytes())
        if (work / f"{slug}.json").is_file():                             # of an earlier sweep
            os.environ["RFKERNELS_LAUNCH_TABLES"] = str(work)
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "rfkernels-triton"))
        chosen = [part for part in CALLS[call](work, pretend) if not parts or part.name in parts.split(";")]
        if pretend:
            seconds *= PATIENCE
            chosen = [replace(part, seconds=part.seconds * PATIENCE) for part in chosen]
        if hang:                                             # for the test of deadlines
            stuck = python("-c", "import time; print('hanging', flush=True); time.sleep(1000)")
            chosen = [Part(p.name, stuck, 3, p.beside) if p.name == hang else p for p in chosen]
        queue = Queue(work, seconds, known)
        signal.signal(signal.SIGTERM, signal.default_int_handler)        # archived all the same
        try:
            queue.run(chosen)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        finally:
            table = work / f"{slug}.json"                                # of the sweep, for launch_tables
            about["launch_table"] = table.name if table.is_file() else None
            archive = out / f"{slug}-{time.strftime('%Y-%m-%d', time.gmtime())}-{call}.tgz"
            pack(work, archive, about)
    print(queue.verdict())
    print(f"wrote {archive}")
    return int(not all(outcome.good for outcome in queue.outcomes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "bench/results"),
                        help="folder of the archive ($OUT, else bench/results)")  # fmt: skip
    parser.add_argument("--pretend", action="store_true", help="on a CPU: kernels interpreted, tiny shapes")
    parser.add_argument("--earlier", type=Path, help="archive of a call before, to continue from")
    parser.add_argument("--candidates", type=Path,
                        help="settings to sweep, of bench.device.precompile on another machine")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of all parts together ({SECONDS:.0f})")
    parser.add_argument("--parts", default="", help="these alone, one;another (all)")
    parser.add_argument("--hang", default="", help="a part that is made to hang, to try the deadlines")
    sys.exit(main(**vars(parser.parse_args())))
