"""Importing the packages costs what they need: torch, and little else."""

import subprocess
import sys

import pytest

LATER = ("torch._dynamo", "triton", "tyro", "PIL", "sympy", "torch.distributed.tensor", "diffusers", "transformers")


@pytest.mark.parametrize("package", ("rfkernels", "rfkernels.nn", "mmdit"))
def test_importing_leaves_for_later_what_takes_long(package):
    code = (
        f"import sys, torch; before = set(sys.modules); import {package}; "
        f"print(*(name for name in {LATER} if name in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], "imported before they are needed"
