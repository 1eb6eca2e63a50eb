"""Compiles launch settings before they are measured: python -m bench.device.precompile --processes 14 --seconds 100

Every setting of the sweep is compiled by a pool of processes, for this GPU's architecture, without using the GPU: into
the cache where Triton will look for it. What spills or does not fit is left out. The best few of each kernel, by what
the compiler says (instructions of the inner loop for each score; occupancy), go to WORK/candidates.json for the sweep.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmdit.files import write_atomically

KEPT = 6                     # settings of a kernel that are measured, with the one in use
TASKS = ("attention_tasks", "row_tasks", "patch_tasks")


def tasks() -> dict[str, Any]:
    """Of the sweep, by name, on "meta" tensors; most promising first."""
    import torch

    from bench import sweep

    return {task.name: task for make in TASKS for task in getattr(sweep, make)(torch.device("meta"))}


def compile_setting(name: str, setting: dict[str, Any], arch: int) -> dict[str, Any]:
    """What the compiler says of a task's kernel with one setting. In a process that does not interpret."""
    from bench import sweep
    from rfkernels import launch_tables
    from rfkernels.inspect.compile import compile_only, read_cuda

    table: dict[str, Any] = {}
    launch_tables.table = lambda device: table                                                      # type: ignore[assignment]
    for module in (sweep.adaln, sweep.attention, sweep.patches):
        module.device_name = lambda device: "the GPU that is compiled for"                           # type: ignore[attr-defined]
    with compile_only("cuda", arch) as launched:
        task = tasks()[name]
        kind = type(task.now)
        sweep.using(task, kind(**setting), table)
        launched.clear()
        task.call()
    wanted = "adaln_bwd" if task.kernel.startswith("gated_adaln_bwd") else task.kernel
    found = read_cuda(next(launch for launch in launched if launch.name == wanted), arch)
    return {"spills": found.spills, "occupancy": found.occupancy, "registers": found.registers, "loops": found.loops}


def cost(setting: dict[str, Any], found: dict[str, Any]) -> float:
    """Lower is better, as far as a compiler can tell."""
    if found["loops"] and "block_m" in setting:
        return 32 * setting["warps"] * found["loops"][0] / (setting["block_m"] * setting["block_n"])
    return -float(found["occupancy"])


Tried = list[tuple[dict[str, Any], dict[str, Any]]]
"""(a setting, what the compiler says of it)"""


def chosen(results: dict[str, Tried], now: dict[str, Any], kept: int = KEPT) -> dict[str, list[str]]:
    """The settings of each task that are worth measuring, as the sweep names them: so many, the one in use first."""
    found = {}
    for name, tried in results.items():
        fit = [(s, f) for s, f in tried if not f["spills"] and f["occupancy"]]
        best = sorted(fit, key=lambda pair: cost(*pair))
        found[name] = [json.dumps(s) for s in [now[name], *(s for s, _ in best if s != now[name])][:kept]]
    return found


def main(processes: int, seconds: float, arch: int, most: int, kept: int, only: str, out: Path) -> int:
    began = time.monotonic()
    every = {name: found for name, found in tasks_and_settings(most).items() if any(o in name for o in only.split(";"))}
    now = {name: settings[0] for name, settings in every.items()}
    longest = max(map(len, every.values()))
    jobs = [(name, settings[i]) for i in range(longest) for name, settings in every.items() if i < len(settings)]
    results: dict[str, Tried] = {name: [] for name in every}
    failed = 0
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    pending = {pool.submit(compile_setting, name, setting, arch): (name, setting) for name, setting in jobs}
    try:
        for future in as_completed(pending, timeout=seconds):
            name, setting = pending[future]
            try:
                results[name].append((setting, future.result()))
            except Exception as error:                                   # does not compile: the next one
                failed += 1
                print(f"{name} {setting}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
            write_atomically(out, json.dumps(chosen(results, now, kept), indent=1).encode())
    except TimeoutError:
        print("stopped by the clock", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()):
            process.kill()
    done = sum(map(len, results.values()))
    measured = sum(map(len, chosen(results, now, kept).values()))
    took = time.monotonic() - began
    told = f"{done} of {len(jobs)} settings compiled in {took:.0f} s, {failed} did not, {measured} are measured"
    print(f"verdict: {told}")
    return int(not done)


def tasks_and_settings(most: int) -> dict[str, list[dict[str, Any]]]:
    """By task, the setting in use and the others, `most` of them."""
    from rfkernels.inspect.compile import compile_only

    with compile_only("cuda", 90):
        found = tasks()
    return {
        name: [asdict(s) for s in dict.fromkeys((task.now, *task.candidates))][:most] for name, task in found.items()
    }


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":                # asked for by whoever tries this on a CPU
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-W", "ignore", "-m", "bench.device.precompile", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)
    parser = argparse.ArgumentParser(prog="python -m bench.device.precompile", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=100.0, help="stop after this long, with what there is (100)")
    parser.add_argument("--arch", type=int, default=90, help="compute capability: 90 for Hopper (90)")
    parser.add_argument("--most", type=int, default=100, help="settings of a kernel that are compiled at most (100)")
    parser.add_argument("--kept", type=int, default=KEPT, help=f"settings of a kernel that are measured ({KEPT})")
    parser.add_argument("--only", default="", help="kernels whose names hold one of these, one;another")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("WORK", ".")) / "candidates.json")
    sys.exit(main(**vars(parser.parse_args())))
