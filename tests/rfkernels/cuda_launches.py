"""Run as a program: what the native launcher hands over for the CUDA kernels of csrc/cuda, chosen as by a launch table.
Prints JSON: {case: {"launches": [words], "dx": address, ...}}; see launches.py."""

import json
import sys
import tempfile
from pathlib import Path

import torch

from bench import fake_driver

if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    driver = fake_driver.install(folder)

import rfkernels
from rfkernels import build, dispatch, launcher, native


def chosen(name, size, device, gpu):
    native.entry.cuda_binary(-1, str(build.cuda_binary(90)))
    return True


def recorded(call, leaves):
    path = folder / "record"
    with launcher.chosen("native"), dispatch.as_on_a_gpu():
        outs = call(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = [torch.ones_like(o) for o in outs]
        driver.fake_record(str(path).encode())
        made = torch.autograd.grad(outs, leaves, grads)
        driver.fake_record(b"")
    lines = [line.split() for line in path.read_text().splitlines()]
    return {"launches": lines, "dy": grads[-1].data_ptr(), "x": leaves[0].data_ptr(), "dx": made[0].data_ptr()}


if __name__ == "__main__":
    native.missing()
    launcher._cuda = chosen
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for c in (100, 1536, 3000):
            x, branch = (torch.randn(2, 70, c).to(dtype).requires_grad_() for _ in range(2))
            v, token = torch.randn(2, c).to(dtype).requires_grad_(), torch.randn(2, 70, c).to(dtype).requires_grad_()
            found[f"adaln-{name}-{c}"] = recorded(lambda x, v: rfkernels.adaln(x, v, v), [x, v])
            found[f"gated_adaln-{name}-{c}"] = recorded(rfkernels.gated_adaln, [x, branch, v, token, v])
    odd = torch.randn(2, 70, 1537).bfloat16()[..., 1:].requires_grad_()                # not at a multiple of 16 bytes
    found["odd"] = recorded(lambda x: rfkernels.adaln(x), [odd])
    json.dump(found, sys.stdout)
