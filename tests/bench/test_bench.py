"""The bench itself: that it measures what it says, and that its gate catches a kernel that got slower."""

import json
import os
import statistics
import subprocess
import sys
import time

import pytest
import torch

from bench import eager, environment, gate, models
from bench.cases import cases
from bench.measure import Samples, copies_beyond_cache, interleaved
from bench.profile import covered
from bench.test_ops import agrees
from mmdit.cost.hardware import gpu

CPU = torch.device("cpu")


@pytest.fixture
def busy(monkeypatch):
    """Makes calls that take so many seconds of a clock that nothing else moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(seconds):
        def call(i):
            now[0] += seconds

        return call

    return taking


def ratio(samples):
    return {"adaln forward": samples["ours"].over(samples["eager"]), "only now": 1.0}


def test_the_gate_catches_a_slowed_kernel_and_no_slower_clock(busy):
    before = interleaved({"ours": busy(1e-3), "eager": busy(2e-3)}, CPU, rounds=5)
    slow_clock = interleaved({"ours": busy(2e-3), "eager": busy(4e-3)}, CPU, rounds=5)
    slow_kernel = interleaved({"ours": busy(1.3e-3), "eager": busy(2e-3)}, CPU, rounds=5)
    stored = ratio(before)
    assert not gate.regressions(stored, ratio(slow_clock), 0.1)
    (line,) = gate.regressions(stored, ratio(slow_kernel), 0.1)
    assert line.startswith("adaln forward: 0.") and "of eager's time (+" in line
    assert not gate.regressions(stored, ratio(slow_kernel), 0.6)


def test_medians_are_those_of_what_ran(busy):
    samples = interleaved({"a": busy(1e-3), "b": busy(3e-3)}, CPU, rounds=5)
    assert (samples["a"].median, samples["b"].median) == pytest.approx((1e-3, 3e-3))
    assert len(samples["a"].seconds) == 5 and not samples["a"].graph
    assert Samples([1.0, 1.0, 1.0, 1.0], False, 0).spread == 0


@pytest.mark.parametrize("case", cases(CPU), ids=lambda c: c.name)
def test_contenders_compute_the_same(case):
    for name, op in case.contenders.items():
        assert agrees(case, op) is None, name


def test_a_contender_that_computes_something_else_is_left_out():
    case = cases(CPU)[0]
    assert "off by" in agrees(case, lambda x, shift, scale: (x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1),))

    def refuses(*inputs):
        raise RuntimeError("no such shape")

    assert agrees(case, refuses) == "RuntimeError: no such shape"


def test_bytes_and_flops_are_those_of_the_tensors():
    from torch.utils.flop_counter import FlopCounterMode

    by_name = {c.name.split("-")[0]: c for c in cases(CPU)}
    adaln, attention = by_name["adaln"], by_name["joint_attention"]
    x, *_ = adaln.make()
    assert adaln.forward_bytes == 2 * x.nbytes and adaln.backward_bytes == 3 * x.nbytes
    inputs = [t.requires_grad_() for t in attention.make()]
    with FlopCounterMode(display=False) as counted:
        attention.contenders["eager"](*inputs)
    assert counted.get_total_flops() == attention.forward_flops


def test_the_sweep_calls_the_patch_kernels():
    """In the interpreter, at a small size: each call gives what its product says."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from bench import sweep

    tasks = {t.kernel: t for t in sweep.patch_tasks(torch.device("cpu"), batch=1, widths=(16,))}
    assert set(tasks) == {"patches_to_tokens", "tokens_to_patches", "patch_weight_bwd"}
    shapes = {name: [list(t.shape) for t in task.call()] for name, task in tasks.items()}
    assert shapes == {"patches_to_tokens": [[1, 256, 16]], "tokens_to_patches": [[1, 16, 32, 32]],
                      "patch_weight_bwd": [[16, 64], [16]]}  # fmt: skip
    assert all(t.isfinite().all() for task in tasks.values() for t in task.call())


def test_results_carry_what_they_ran_on():
    found = environment.environment()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["device"] == environment.device_name()
    assert gpu("Some GPU 9000") is None and gpu("NVIDIA H200").flops == 989e12
    assert copies_beyond_cache(CPU, 1 << 20) == 1


def test_the_suite_runs_and_its_gate_fails_it(tmp_path):
    hidden = ("TRITON_INTERPRET", "PYTEST")                              # a worker of xdist may not measure
    environment_ = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {"OMP_NUM_THREADS": "1"}
    written, stored = tmp_path / "now.json", tmp_path / "before.json"
    command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "--ops", "gated_residual", "-W", "ignore"]
    command += ["--benchmark-json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_)
    assert done.returncode == 0, done.stdout[-2000:]
    found = json.loads(written.read_text())
    ours = [b for b in found["benchmarks"] if b["extra_info"]["contender"] == "ours"]
    assert len(ours) == 4 and all(b["extra_info"]["runs"].startswith("gated_residual") for b in ours)
    eager = {b["group"]: b["stats"]["data"] for b in found["benchmarks"] if b["extra_info"]["contender"] == "eager"}
    for b in ours:
        pairs = zip(b["stats"]["data"], eager[b["group"]], strict=True)
        assert statistics.median(x / y for x, y in pairs) == pytest.approx(b["extra_info"]["ratio"], rel=1e-6)
        b["extra_info"]["ratio"] /= 100                                   # as if it had been much faster before
    stored.write_text(json.dumps(found))
    assert gate.ratios(found).keys() == {b["group"] for b in ours}
    done = subprocess.run([*command, "--against", str(stored)], capture_output=True, text=True, env=environment_)
    assert done.returncode == 1 and "slower:" in done.stdout, done.stdout[-2000:]


def test_a_compiled_model_trains_where_warnings_are_errors():
    """As in the suite on a GPU, where torch 2.11's Dynamo warns of a gradient that it looks at itself."""
    model = eager.model(models.ours(models.Size(2, 64, 1)))
    model.blocks = torch.nn.ModuleList(eager.twin(block) for block in model.blocks)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    model(*models.inputs(models.Size(2, 64, 1))).square().mean().backward()
    assert all(p.grad is not None for p in model.blocks[0].parameters())


def test_time_in_kernels_counts_what_overlaps_once():
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == (4.0, 6.0)
