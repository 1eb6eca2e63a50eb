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
from rfkernels import dispatch, launcher, native


def launches(call):
    """(what it returns, launches)"""
    path = folder / "record"
    driver.fake_record(str(path).encode())
    made = call()
    driver.fake_record(b"")
    return made, [line.split() for line in path.read_text().splitlines()]


def recorded(call, leaves):
    with launcher.chosen("native"), dispatch.as_on_a_gpu():
        outs, forward = launches(lambda: call(*leaves))
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = [torch.ones_like(o) for o in outs]
        made, backward = launches(lambda: torch.autograd.grad(outs, leaves, grads))
    addresses = {"dy": grads[-1], "x": leaves[0], "dx": made[0], "out": outs[0]}
    return {"forward": forward, "launches": backward} | {name: t.data_ptr() for name, t in addresses.items()}


if __name__ == "__main__":
    native.missing()
    launcher._listed = lambda name, size, gpu: name.endswith("_cuda")
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for c in (100, 1536, 3000):
            x, branch = (torch.randn(2, 70, c).to(dtype).requires_grad_() for _ in range(2))
            v, token = torch.randn(2, c).to(dtype).requires_grad_(), torch.randn(2, 70, c).to(dtype).requires_grad_()
            found[f"adaln-{name}-{c}"] = recorded(lambda x, v: rfkernels.adaln(x, v, v), [x, v])
            found[f"gated_adaln-{name}-{c}"] = recorded(rfkernels.gated_adaln, [x, branch, v, token, v])
        for dim in (64, 40):
            (q, k), w = (torch.randn(2, 70, 2, 3, dim).to(dtype).unbind(2), torch.rand(dim).to(dtype))
            leaves = [t.requires_grad_() for t in (q, k, w, w.clone())]
            found[f"qk_norm-{name}-{dim}"] = recorded(rfkernels.qk_norm, leaves)
        for c in (96, 100):
            x, fc1, fc2 = (torch.randn(s).to(dtype).requires_grad_() for s in ((2, 70, 32), (c, 32), (32, c)))
            b1, b2 = (torch.randn(n).to(dtype).requires_grad_() for n in (c, 32))
            found[f"gelu-{name}-{c}"] = recorded(rfkernels.gelu_mlp, [x, fc1, b1, fc2, b2])
    odd = torch.randn(2, 70, 1537).bfloat16()[..., 1:].requires_grad_()                # not at a multiple of 16 bytes
    found["odd"] = recorded(lambda x: rfkernels.adaln(x), [odd])
    json.dump(found, sys.stdout)
