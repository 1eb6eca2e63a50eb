"""The sanitizer finds what was planted, names it, and is silent elsewhere; in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")
ROOT = Path(__file__).parents[2]
# By plant: kind, kernel, argument; what else it also is stands behind the first.
FOUND = {
    "clean copy": [],
    "missing mask": [("out-of-bounds", "copy", "x_ptr")],
    "missing mask inside the storage": [("outside-view", "copy", "x_ptr")],
    "clean tuple": [],
    "before its start": [("out-of-bounds", "copy_of_two", "xs[0]"), ("out-of-bounds", "copy_of_two", "xs[1]")],
    "in the other argument": [("outside-view", "copy_of_two", "xs[1]"), ("out-of-bounds", "copy_of_two", "xs[0]")],
    "clean table": [],
    "missing mask behind a table": [("out-of-bounds", "copy_by_table", "table_ptr's")],
    "an address that a table does not list": [("wild-pointer", "copy_by_table", "")],
    "overlapping blocks": [("race-same-bits", "copy", "y_ptr")],
    "two values": [("race-write-write", "constant", "y_ptr")],
    "one value by many": [("race-same-bits", "constant", "y_ptr")],
    "one program": [],
    "reads its neighbour": [("race-read-write", "neighbours", "x_ptr")],
    "in place": [("own-write-after-read", "neighbours", "y_ptr")],
    "two lanes": [("lanes-collide", "scatter", "y_ptr")],
    "a lane each": [],
    "counter": [(f"race-{kind}", "count", "y_ptr") for kind in ("read-write", "write-read", "write-write")]
    + [("own-write-after-read", "count", "y_ptr")],
    "atomic counter": [],
    "written whole": [],
    "unwritten ends": [("unwritten-output", "rows", "y_ptr")],
    "unwritten ends, read": [("unwritten-read", "rows", "x_ptr"), ("unwritten-output", "rows", "y_ptr")],
    "unwritten row": [("unwritten-output", "rows", "y_ptr")],
    "padding left alone": [],
    "padding read": [("unwritten-read", "copy", "x_ptr")],
    "padding read in bf16": [("unwritten-read", "copy", "x_ptr")],
    "64-bit offsets": [],
    "32-bit offsets": [("overflow-address", "far", "x_ptr"), ("out-of-bounds", "far", "x_ptr")],
    "32-bit offsets into itself": [("overflow-address", "far", "x_ptr")],
    "bound and mask overflow": [("overflow-control", "far_bound", ""), ("overflow-mask", "far_bound", "")],
    "bound and mask fit": [],
    "hints that hold": [],
    "not a multiple": [("hint", "hinted", "")],
    "not as assumed": [("assumption", "hinted", "")],
    "grid": [("grid", "constant", ""), ("race-same-bits", "constant", "y_ptr")],
}


def run(*command, path=ROOT, **more):
    environment = {**os.environ, "PYTHONPATH": str(path), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **more)


def test_planted_faults_are_named_and_nothing_else():
    done = run("-m", "tests.rfkernels.planted", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    planted = json.loads(done.stdout)
    named = {name: {tuple(one[:3]) for one in found} for name, found in planted.items()}
    assert named == {name: set(found) for name, found in FOUND.items()}
    for kind, _, _, detail in (one for found in planted.values() for one in found):
        assert "program (" in detail or kind == "grid", "the program is named"


DRIVE = {
    "adaln": """
x, v = torch.randn(2, 5, 200, requires_grad=True), torch.randn(2, 200, requires_grad=True)
with rfkernels.backend("triton"):
    y = rfkernels.adaln(x, v, v)
    sanitize.check_results("adaln", [y, *torch.autograd.grad(y.sum(), (x, v))])
""",
    "far": """
from rfkernels.sanitize.canary import sparse
storage = sparse((3 << 30,), torch.bfloat16)
sanitize.watch.settings = sanitize.Settings(sparse=True, unwritten=False)
x = torch.as_strided(storage, (3, 5, 200), (1 << 30, 200, 1))
v = torch.randn(3, 200)
with rfkernels.backend("triton"):
    rfkernels.adaln(x, v, v)
""",
}
LOAD = "    return tl.load(ptr + rows + columns[None, :], mask=live[:, None] & (columns < C)[None, :], other=0.0)"
MUTATIONS = {
    "a missing mask": ("adaln", LOAD, LOAD.replace("(columns < C)", "(columns < CHUNK * 99)"), "out-of-bounds", "_ptr"),
    "an overlapping store": (
        "adaln", "    last = tl.minimum((split + 1) * span, S)\n    tokens_in_all",
        "    last = tl.minimum((split + 1) * span + 1, S)\n    tokens_in_all", "race-", "dx_ptr",
    ),
    "an unwritten row": (
        "adaln", "    live = tokens < S\n    x_rows", "    live = tokens < S - 1\n    x_rows", "unwritten-", "_ptr",
    ),
    "a 32-bit offset": (
        "far", "    return b.to(tl.int64) * stride_b + tokens.to(tl.int64)[:, None] * stride_s",
        "    return b * stride_b + tokens[:, None] * stride_s", "overflow-address", "x_ptr",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ["none", *MUTATIONS])
def test_faults_in_a_copy_of_a_kernel_are_named(fault, tmp_path):
    shutil.copytree(ROOT / "rfkernels", tmp_path / "rfkernels", ignore=shutil.ignore_patterns("__pycache__"))
    kernels = tmp_path / "rfkernels" / "adaln" / "kernels.py"
    drive, kind, argument = "adaln", "", ""
    if fault != "none":
        drive, old, new, kind, argument = MUTATIONS[fault]
        text = kernels.read_text()
        assert old in text
        kernels.write_text(text.replace(old, new))
    script = tmp_path / "drive.py"
    script.write_text("import torch\nimport rfkernels\nfrom rfkernels import sanitize\n" + DRIVE[drive])
    done = run("-m", "rfkernels.sanitize", script, path=tmp_path, cwd=tmp_path)
    found = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert done.returncode == (fault != "none"), done.stdout + done.stderr
    assert bool(found) == (fault != "none")
    if found:
        named = [line for line in found if f"error: {kind}" in line and argument in line and "program (" in line]
        assert named and "adaln_" in named[0], found


def test_a_test_during_which_a_kernel_erred_fails(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import torch\nfrom tests.rfkernels.planted import copy\n"
        "def test_right(): copy[(2,)](torch.randn(100), torch.empty(100), 100, True, 64, 64)\n"
        "def test_wrong(): copy[(2,)](torch.randn(100), torch.empty(100), 100, False, 64, 64)\n"
    )
    done = run("-m", "rfkernels.sanitize", "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "sanitizer: error: out-of-bounds: copy x_ptr at rfkernels/planted.py" in done.stdout


def test_a_script_without_kernels_ends_as_it_would(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(int(sys.argv[1]))\n")
    assert run("-m", "rfkernels.sanitize", script, 0).returncode == 0
    assert run("-m", "rfkernels.sanitize", script, 3).returncode == 3
    assert run("-m", "rfkernels.sanitize").returncode == 2
