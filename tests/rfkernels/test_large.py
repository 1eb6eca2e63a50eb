"""Tensors beyond 2^31 elements, as a GPU holds them: a few programs of each kernel in the sanitizer, on memory that
costs nothing until it is touched. In a process of its own: TRITON_INTERPRET=1 python -m tests.rfkernels.test_large"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LIMIT = 2**31
BF16, F32 = torch.bfloat16, torch.float32


def huge(*shape, dtype=BF16):
    from rfkernels.sanitize.canary import sparse

    return sparse(shape, dtype)


def strided(shape, strides, dtype=BF16):
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return huge(reach, dtype=dtype).as_strided(shape, strides)


def modulated():
    """Gradients of a modulation of 2^31 numbers, written in place: the second stage's rows are far apart."""
    from rfkernels.adaln import launch

    partials, out = huge(1, 6000, 64, dtype=F32), strided((6000, 64), (400_000, 1))
    launch._kernels().sum_partials[(6000, 1, 1)](
        partials, out, out, out, out, 6000, 1, 1, 1, 1, 400_000, 0, 0, 0, C=64, **launch.SECOND_STAGE
    )


def flow(elements):
    from rfkernels.flow import launch

    x, t = huge(1, elements), torch.rand(1)
    launch.rectified_flow(x, x, t)
    launch.rectified_flow_backward(x, x, t, x, x)
    launch.weighted_mse_backward(torch.ones(()), x, x, t, True)


def gelu():
    from rfkernels.mlp import launch

    launch.multiprocessors = lambda device: 16_000                           # short spans
    launch.gelu_backward(huge(LIMIT + 70, 8), huge(LIMIT + 70, 8), True, False)


def norms():
    from rfkernels.qk_norm import launch

    launch.multiprocessors = lambda device: 4096
    q, w = huge(2, 300_007, 3, 24, 64)[:, :, 0], huge(64)
    launch.qk_norm(q, q, w, w, 1e-6)
    launch.qk_norm_backward(q, q, q, q, w, w, 1e-6)


def attention():
    from rfkernels.joint_attention import launch

    qkv, w = huge(1, 1_500_001, 3, 24, 64), huge(64)
    tensors, settings = [qkv, w, w, torch.tensor([90])], ("3qkl", 0.125, 1e-6)
    outs = launch.forward(tensors, *settings)
    launch.backward(outs[:1], outs, tensors, *settings, True)


def far_tokens():
    """Just below the token stride from which attention is refused."""
    from rfkernels.joint_attention import launch

    q, w = strided((1, 130, 1, 64), (1, launch.MAX_TOKEN_STRIDE - 64, 64, 1)), huge(64)
    tensors, settings = [q, q, q, w, w], ("1qk", 0.125, 1e-6)
    outs = launch.forward(tensors, *settings)
    launch.backward(outs[:1], outs, tensors, *settings, False)


def patches():
    from rfkernels.position import launch

    latent, weight = huge(40_003, 16, 64, 64), huge(64, 64)
    launch.to_tokens(launch.Patches(latent, 2, True), weight, (64, 1), 64, huge(64), huge(1024, 64))


def tokens():
    from rfkernels.adaln import launch

    x, v = huge(600_000, 8, 960), huge(600_000, 960)
    _, statistics = launch.adaln(x, v, v, True, "layer", 1e-6, x.dtype)
    launch.adaln_backward(x, x, v, v, statistics, True, "layer", 1e-6)


CASES = {
    "modulation": modulated, "flow, 2^31 - 1": lambda: flow(LIMIT - 1), "flow, 2^31 + 5": lambda: flow(LIMIT + 5),
    "gelu": gelu, "qk_norm": norms, "attention, tokens": attention, "attention, strides": far_tokens,
    "patches": patches, "adaln": tokens,
}  # fmt: skip


def corners(grid):
    """The first and last programs along each axis."""
    ends = [sorted({i for i in (0, 1, n // 2, n - 2, n - 1) if 0 <= i < n}) for n in grid]
    return [(x, y, z) for x in ends[0] for y in ends[1][-2:] for z in ends[2][-2:]]


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.rfkernels.test_large"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_offsets_do_not_overflow(case, found):
    assert found[case] == []


def main():
    from rfkernels.sanitize import Settings, install, watch

    install()
    watch.settings = Settings(sparse=True, unwritten=False, programs=corners)
    errors = {}
    for name, run in CASES.items():
        watch.reset()
        run()
        errors[name] = list(map(str, watch.errors))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
