"""Products by cuBLASLt with an epilogue, by a library that does on a CPU what the documentation says. Which algorithms
the real one has, and how fast they are, only a GPU can tell."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from rfkernels import native
from rfkernels.testing import assert_within_rule

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """In a process of its own: the interpreter's switch must not be set there."""
    path = tmp_path_factory.mktemp("lt") / "found.pt"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.rfkernels.lt_products", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path)


def mlp(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def check(case, call):
    def torchs(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in case["given"]]
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves, case["dy"].to(dtype))]

    exact, eager = torchs(torch.float64), torchs(case["given"][0].dtype)
    for i, (got, right, usual) in enumerate(zip(case["made"], exact, eager, strict=True)):
        assert_within_rule(f"{i}", got, right, usual, 3)                  # vectors of 40 elements: 2.1 was seen


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
def test_layers_are_right(dtype, found):
    """GELU with the first product, its gradient and that of the bias with the second's, a bias' with its weight's. In
    fp32 GELU is ours: as an epilogue it is an approximation."""
    for case, call, products in (("mlp", mlp, 1 if dtype == "fp32" else 3), ("linear", F.linear, 1)):
        one = found[f"{case}-{dtype}" + "-96" * (case == "mlp")]
        ours = ["gelu_bwd", "sum_partials"] if (case, dtype) == ("mlp", "fp32") else []     # else not even the sums
        if not ours:                                                      # which nothing runs here
            check(one, call)
        assert one["calls"] == products and one["launches"] == ours


def test_rows_that_an_epilogue_does_not_take_are_ours(found):
    for dtype in ("bf16", "fp16", "fp32"):
        one = found[f"mlp-{dtype}-100"]                # 100 is no multiple of 8; the bias' gradient has no such rule
        assert one["calls"] == 1 and one["launches"] == ["gelu_bwd", "sum_partials"]


def test_addresses_are_told(found):
    """An algorithm is found for the alignment of the tensors that it gets, and found once: allocations on a CPU are at
    multiples of 64, 128 or 256 bytes, of two results here."""
    check(found["odd"], F.linear)
    assert found["odd"]["calls"] == 1 and found["asked again"] < 9


@pytest.mark.parametrize("why", ("fake_refuse", "fake_fail"))
def test_a_refusal_falls_back(why, found):
    check(found[f"{why}-linear"], F.linear)
    assert found[f"{why}-mlp"]["launches"] == ["gelu_bwd", "sum_partials"]
    torch.testing.assert_close(found[f"{why}-mlp"]["made"][0], mlp(*found[f"{why}-mlp"]["given"]))


def test_without_the_library(found):
    check(found["missing"], F.linear)
    assert found["missing"]["calls"] == 0


def test_is_off_where_no_launch_table_asks_for_it(found):
    assert found["not listed"]["calls"] == 0 and found["not listed"]["launches"] == ["gelu_bwd", "sum_partials"]
