"""The native launcher hands the driver what Triton's own launcher does, without a GPU: recorded by a driver that runs
nothing. On a GPU the tests of the kernels run with both (`bench/gpu.sh first`)."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from rfkernels import native
from rfkernels.triton_support import INSTALLED

pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="Triton is not installed"),
    pytest.mark.skipif(bool(native.missing()), reason=f"{native.missing()}"),
]
CASES = {                                       # launches, forward and backward
    "adaln": 3, "adaln-rms-mixed": 3, "adaln-no-vectors": 2, "adaln-broadcast": 3, "gated-adaln": 3,
    "gated-adaln-chunks": 3, "gated-residual": 3, "qk-norm": 3, "gelu-mlp": 2, "attention": 5,
    "attention-lengths": 5, "attention-without-norm": 3, "attention-keys-only": 5,
}  # fmt: skip


def asked(code, **environment):
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, env=given)


@cache
def launches(length, dtype):
    """Of all cases, each compiled."""
    done = asked(["-m", "tests.rfkernels.launches", str(length), dtype])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def same(a, b):
    """Words of a launch. A gradient may lie where something lay that was gone by then: its name may stand for "new"."""
    return a == b or ("new" in (a, b) and any(word.startswith("gradient") for word in (a, b)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", (5, 70))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_hands_over_what_tritons_launcher_does(dtype, length, case):
    ways = launches(length, dtype)[f"{case}-{length}-{dtype}"]
    assert len(ways["triton"]) == CASES[case]
    for ours, theirs in zip(ways["native"], ways["triton"], strict=True):
        assert len(ours) == len(theirs) and all(map(same, ours, theirs)), (ours, theirs)
    named = {word.rstrip("0123456789") for launch in ways["native"] for word in launch}
    assert {"input" if case != "gelu-mlp" else "new", "gradient"} <= named, "tensors are told apart"


def test_a_launch_that_fails_says_which_and_why():
    assert launches(5, "bfloat16")["failure"].startswith("adaln_fwd: the launch failed: an error (700)")


def test_takes_the_first_call_too():
    """A first step that other kernels computed would not be the one of a run that was interrupted."""
    told = "import rfkernels, torch\nfrom rfkernels import dispatch\ndispatch.run = None\n"
    done = asked(["-c", told + "print(rfkernels.adaln(torch.ones(1, 2, 8)).shape)"], RFKERNELS_LAUNCH="native")
    assert "[1, 2, 8]" in done.stdout, done.stderr


def test_is_chosen_by_name():
    told = ["-c", "import rfkernels, torch; print(rfkernels.explain('adaln', torch.ones(1, 2, 8)))"]
    assert "the native launcher starts Triton's kernels" in asked(told).stdout
    assert "Triton's own launcher starts" in asked(told, RFKERNELS_LAUNCH="triton").stdout
    wrong = asked(told, RFKERNELS_LAUNCH="fast")
    assert "RFKERNELS_LAUNCH is 'fast'; expected one of triton, native" in wrong.stderr
