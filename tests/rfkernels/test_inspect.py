"""The compiler's report, in a process of its own: the interpreter's switch must not be set there."""

import os
import subprocess
import sys

import pytest

from rfkernels import build
from rfkernels.inspect.__main__ import TABLES, defects, read_table, regressions
from rfkernels.inspect.compile import Compiled

pytest.importorskip("triton", reason="Triton is not installed on this platform")


def report(**changes):
    counts = {"ld": 20, "ld16": 18, "st": 8, "st16": 6, "mma": 0}
    values = {"kernel": "adaln_fwd", "target": "sm_90", "registers": 72, "spills": 0, "shared": 16, "warps": 4}
    return Compiled(**{**values, "occupancy": 0.5, "counts": counts, "moved": 1.0, **changes})


def test_two_targets_are_compiled_apart():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "rfkernels.inspect", "--all", "--only", "adaln_fwd/960"]
    command += ["--targets", "sm_80", "sm_90", "gfx942"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[2]: line.split()[3:] for line in done.stdout.splitlines() if line.startswith("adaln_fwd/")}
    assert set(rows) == {"sm_80", "sm_90", "gfx942"}
    assert len({tuple(row[:5]) for row in rows.values()}) > 1, "each target has code of its own"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"spills": 4}, "4 spills"),
        ({"counts": {"ld": 20, "ld16": 12, "st": 8, "st16": 6}}, "less than 16 bytes"),
        ({"counts": {"ld": 20, "ld16": 18, "st": 8, "st16": 5}}, "less than 16 bytes"),
        ({"occupancy": 0.0}, "does not fit"),
        ({"moved": 1.5}, "1.500 times the least"),
    ],
)
def test_defects_are_seen(changes, message):
    assert not defects({"k": report()})
    assert message in defects({"k": report(**changes)})[0]


def test_regressions_are_seen():
    from dataclasses import asdict

    table = {"k": asdict(report())}
    assert not regressions({"k": report()}, table)
    assert "0 -> 2 spills" in regressions({"k": report(spills=2)}, table)[0]
    assert "occupancy 0.50 -> 0.25" in regressions({"k": report(occupancy=0.25)}, table)[0]
    assert "not in the committed table" in regressions({"new": report()}, table)[0]


def test_the_mean_is_divided_exactly():
    """The compiler's approximate division is a product with the rounded 1 / C; a row of equal numbers would not be 0.
    The interpreter divides exactly whatever is asked for, so this is read in the code."""
    script = """
from rfkernels.inspect.cases import cases
from rfkernels.inspect.compile import compile_only
with compile_only("cuda", 90) as launched:
    for case in cases():
        if case.name in ("adaln_fwd/960", "gated_adaln_fwd/960"):
            case.call()
    for launch in launched:
        print(launch.name, launch.kernel.asm["ptx"].count("div.full.f32"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split("\n")[:2] == ["adaln_fwd 1", "gated_adaln_fwd 1"], done.stderr      # the variance


def test_what_backwards_fetch_ahead_fits_the_smallest_shared_memory():
    """99 KiB of sm_86 and 89, with six fp32 tensors; beyond the channels of two stages nothing is fetched ahead."""
    script = """
import torch
from rfkernels.adaln import launch
from rfkernels.inspect.compile import compile_only
with compile_only("cuda", 86) as launched:
    for channels in (640, 2048, 4096, 5120):
        x, v = (torch.empty(*shape, channels, device="meta") for shape in ((4, 64), (4,)))
        s = torch.empty(2, 4, 64, device="meta")
        launch.gated_adaln_backward(x, x, x, x, v, v, v, s, True, "layer", 1e-6, torch.float32, True)
    print(*(launch.kernel.metadata.shared for launch in launched if launch.name == "adaln_bwd"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    shared = list(map(int, done.stdout.split()))
    assert len(shared) == 4 and max(shared) <= 99 << 10, done.stderr
    assert min(shared[:3]) > 40 << 10 > shared[3], "up to 4,096 channels some are fetched ahead"


def test_what_has_a_key_of_the_table_is_not_compiled_again():
    script = """
from dataclasses import asdict
from rfkernels.adaln.kernels import gated_adaln_fwd
from rfkernels.inspect.__main__ import inspect
kernel = "gated_adaln_fwd/960 gated_adaln_fwd sm_90"
def report(table):
    gated_adaln_fwd.device_caches.clear()
    return inspect(("sm_90",), "gated_adaln_fwd/960", table)[kernel]
found = report({})
row = {**asdict(found), "registers": 999}
print(found.registers, report({kernel: row}).registers, report({kernel: {**row, "key": "another"}}).registers)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    compiled, known, other = done.stdout.split()
    assert known == "999" and other == compiled != known, done.stderr


def test_csrcs_table_is_that_of_the_committed_reports():
    cuda, triton = (read_table(TABLES / name) for name in ("cuda-13.0.json", "triton-3.8.json"))
    cells = lambda r: f"{r['registers']}, {100 * r['occupancy']:.0f} %"  # noqa: E731
    lines = (build.sources() / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if " %" in line and line[0] == "|"]
    assert len(rows) == 17
    for label, *found in rows:
        op, size, *way = label.replace(",", "").split()
        forward = way == ["forward"]
        ours = f"cuda {op}_{'forward' if forward else 'backward'}_bf16_{'exact' if op == 'gelu' else size}"
        kernel = f"{op.removeprefix('gated_')}_{'fwd' if forward else 'bwd'}"
        theirs = f"{op}_{'fwd' if forward else 'bwd'}/{size} {kernel}"
        wanted = [cells(t[f"{key} sm_{n}"]) for n in (80, 90, 100) for t, key in ((cuda, ours), (triton, theirs))]
        assert found == wanted, label
    assert not any(r["spills"] for r in cuda.values())
