"""python -m rfkernels.inspect [--check | --write]: the compilers' report on every kernel, without a GPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

try:
    import tyro
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"error: python -m rfkernels.inspect needs {error.name}: pip install 'rfkernels[cli]'")

from rfkernels.build import CannotBuild
from rfkernels.inspect import cuda
from rfkernels.inspect.cases import cases
from rfkernels.inspect.compile import Compiled, compile_only, read_cuda, read_hip
from rfkernels.triton_support import INSTALLED, INTERPRETED

TABLES = Path(__file__).with_name("tables")          # one for each Triton that was looked at: compilers differ
PRODUCTS = ("attention", "patch", "tokens_to_patches")        # kernels that multiply matrices, by how their names begin
REDUCTIONS = ("sum_partials", "sum_rows", "sum_heads", "sum_per_sample", "weighted_mse_total", "key_rstd")
NARROW = {"adamw_step": (22, 4)}        # kernels with more narrow loads and stores: a table's row, 8-bit codes, scales
FETCHES_AHEAD, STAGES = ("adaln_bwd", "gated_residual_bwd", "join_bwd"), 3           # kernels whose loops are pipelined
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def table_path() -> Path:
    """Of the Triton that is installed."""
    import triton

    return TABLES / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.json"


def read_table(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_table(path: Path, table: dict[str, dict]) -> None:
    """A line for each kernel, so that a change of one is a change of one line."""
    path.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items()) + "\n}\n")


def as_row(report: Compiled) -> dict:
    """For a table; the kernels of csrc have no key."""
    return {name: value for name, value in asdict(report).items() if value != ""}


def inspect(targets: tuple[str, ...], only: str, table: dict[str, dict]) -> dict[str, Compiled]:
    """Compiles all cases whose name contains `only`, but for kernels whose key is in the table: those are the table's.
    "case kernel target" -> report."""
    chosen = [case for case in cases() if only in case.name]
    known = {row["key"]: row for row in table.values() if row.get("key")}
    reports = {}
    for target in targets:
        cuda = target.startswith("sm_")
        with compile_only("cuda" if cuda else "hip", int(target[3:]) if cuda else target, known) as launched:
            for case in tqdm(chosen, desc=target, disable=None):
                launched.clear()
                case.call()
                moved = sum(launch.bytes for launch in launched) / case.bytes
                for launch in launched:
                    if launch.kernel is None:
                        report = Compiled(**known[launch.key])
                    else:
                        report = read_cuda(launch, int(target[3:])) if cuda else read_hip(launch, target)
                    report.moved, report.excess = moved, case.excess
                    reports[f"{case.name} {launch.name} {target}"] = report
    return reports


def defects(reports: dict[str, Compiled]) -> list[str]:
    """What no kernel may do on a CUDA target: spill, access activations in less than 16 bytes, not fit."""
    found = []
    for key, r in reports.items():
        if not r.target.startswith("sm_"):
            continue                                                     # AMD is information, not a promise
        if r.spills:
            found.append(f"{key}: {r.spills} spills")
        if r.kernel.startswith(PRODUCTS):
            if not r.counts["mma"] or (r.target == "sm_90" and r.counts["wgmma"] < r.counts["mma"]):
                found.append(f"{key}: products not on the tensor cores, or not as wgmma on sm_90")
            if r.kernel == "patches_to_tokens" and r.counts["st16"] < r.counts["st"]:
                found.append(f"{key}: tokens stored in less than 16 bytes")
        elif r.kernel not in REDUCTIONS:
            # mean and rstd are one number a row, once for each stage; a backward's rows of partials are narrow too
            narrow, few = NARROW.get(r.kernel, (2 * STAGES if r.kernel in FETCHES_AHEAD else 2, 2))
            narrow_stores = 0 if r.kernel.endswith("bwd") and r.counts["st16"] else r.counts["st"] - r.counts["st16"]
            if r.counts["ld"] - r.counts["ld16"] > narrow or narrow_stores > few:
                found.append(f"{key}: activations loaded or stored in less than 16 bytes")
        if r.moved > r.excess:
            found.append(f"{key}: moves {r.moved:.3f} times the least")
        if r.occupancy == 0:
            found.append(f"{key}: does not fit on a multiprocessor")
    return found


def regressions(reports: dict[str, Compiled], table: dict[str, dict]) -> list[str]:
    """What is worse than in the committed table: spills, lower occupancy, fewer of the accesses 16 bytes wide."""
    found = []
    for key, r in reports.items():
        if not r.target.startswith("sm_"):
            continue
        before = table.get(key)
        if before is None:
            found.append(f"{key}: not in the committed table; run with --write")
            continue
        if r.spills > before["spills"]:
            found.append(f"{key}: {before['spills']} -> {r.spills} spills")
        if r.occupancy < 0.75 * before["occupancy"]:
            found.append(f"{key}: occupancy {before['occupancy']:.2f} -> {r.occupancy:.2f}")
        for access in ("ld16", "st16"):
            if r.counts[access] < before["counts"][access]:
                found.append(f"{key}: {access} {before['counts'][access]} -> {r.counts[access]}")
    return found


def main(
    check: bool = False, write: bool = False, targets: tuple[str, ...] = TARGETS, only: str = "", all: bool = False
) -> None:
    """Compile the kernels for GPUs that are not here and report. What a kernel of the committed table is compiled from,
    source, arguments, settings and compiler, is kept with it as a key; where that is the same, so are the figures.

    Args:
        check: Exit 1 on a defect, or on a regression against the committed tables, where there are any of this version
            of Triton, and for csrc/cuda of nvcc.
        write: Write these tables.
        targets: sm_80, sm_90, sm_100, gfx942.
        only: Only cases whose name contains this; those of csrc/cuda begin with cuda.
        all: Compile again also what has the table's key.
    """
    import triton

    if INTERPRETED:
        sys.exit("error: TRITON_INTERPRET is set; inspection needs the compiler")
    all = all or "TRITON_PTXAS_PATH" in os.environ                      # an assembler that the keys know nothing of
    table = {} if all else read_table(table_path())
    reports = inspect(targets, only, table)
    keys = {row.get("key") for row in table.values()}
    print(f"{sum(r.key in keys for r in reports.values())} of {len(reports)} are known by their key")
    print(
        f"Triton {triton.__version__}; shared memory in bytes; occ: share of a multiprocessor's warps resident; "
        "loops: instructions of those that multiply matrices"
    )
    kept = (lambda row: True) if only else (lambda row: row["target"] not in targets)         # of a table, by --write
    wrong = settle(reports, defects(reports), table_path(), check, write, kept)
    if only and not only.startswith("cuda"):
        return finish(wrong, check)
    try:
        compiled = {key: r for key, r in cuda.compiled(targets, anew=all).items() if only in key}
        print(f"csrc/cuda by nvcc {cuda.version()}")
        path = TABLES / f"cuda-{cuda.version()}.json"
        wrong += settle(compiled, cuda.defects(compiled), path, check, write, kept)
    except CannotBuild as error:
        print(f"csrc/cuda is not looked at: {error}")
    finish(wrong, check)


def finish(wrong: list[str], check: bool) -> None:
    for line in wrong:
        print(f"FAIL {line}")
    if check and wrong:
        sys.exit(1)


def settle(
    reports: dict[str, Compiled],
    wrong: list[str],
    path: Path,
    check: bool,
    write: bool,
    kept: Callable[[dict], bool],
) -> list[str]:
    """Prints the reports; writes them to a table, or compares them with it. Returns what is wrong."""
    columns = f"{'regs':>5s} {'spill':>6s} {'shared':>7s} {'warps':>5s} {'occ':>5s}"
    columns += "  ld16/ld  st16/st  mma  moved/least  loops"
    print(f"{'case':58s} {columns}")
    for key, r in reports.items():
        loads, stores = f"{r.counts['ld16']}/{r.counts['ld']}", f"{r.counts['st16']}/{r.counts['st']}"
        print(
            f"{key:58s} {r.registers:5d} {r.spills:6d} {r.shared:7d} {r.warps:5d} {r.occupancy:5.2f}  "
            f"{loads:>7s}  {stores:>7s}  {r.counts['mma']:3d}  {r.moved:.3f}  {' '.join(map(str, r.loops))}"
        )
    if write:
        table = read_table(path)
        rows = {key: row for key, row in table.items() if kept(row)} | {key: as_row(r) for key, r in reports.items()}
        place = {key: i for i, key in enumerate(table)}                                # a row stays where it was
        write_table(path, dict(sorted(rows.items(), key=lambda item: place.get(item[0], len(place)))))
        print(f"wrote {path}")
    if check and path.is_file():
        return wrong + regressions(reports, read_table(path))
    if check:
        print(f"no {path.name}: only defects are looked for; --write makes one")
    return wrong


if __name__ == "__main__":
    if not INSTALLED:
        sys.exit("error: Triton is not installed")
    tyro.cli(main, prog="python -m rfkernels.inspect")
