"""Run as a program: layers whose products a cuBLASLt as documented does (fake_cublaslt.cpp), as if a launch table asked
for it. Saves to the path given: {case: {"given": tensors, "made": tensors, "calls": products, "launches": names}}."""

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import fake_driver

if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    driver = fake_driver.install(folder)

import rfkernels
from rfkernels import bias, build, dispatch, launcher, native


def library():
    path = folder / "fake_cublaslt.so"
    source = Path(__file__).with_name("fake_cublaslt.cpp")
    command = [build.compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    native.entry.use_cublaslt(str(path))
    return ctypes.CDLL(str(path))


def run(call, given, dy):
    """Forward and backward of a layer, and what was asked of whom."""
    record, before = folder / "record", fake.fake_calls()
    leaves = [t.detach().requires_grad_() for t in given]
    driver.fake_record(str(record).encode())
    with launcher.chosen("native"), dispatch.as_on_a_gpu():
        out = call(*leaves)
        made = [out.detach(), *torch.autograd.grad(out, leaves, dy)]
    driver.fake_record(b"")
    names = [line.split()[0] for line in record.read_text().splitlines()]
    return {"given": given, "dy": dy, "made": made, "calls": fake.fake_calls() - before, "launches": names}


def linear(x, w, b):
    return bias.linear(x, w, b, before="gated_adaln")


if __name__ == "__main__":
    native.missing()
    fake, found = library(), {}
    launcher._listed = lambda name, size, gpu: name.endswith("_lt")
    torch.manual_seed(0)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for hidden in (96, 100):                                     # rows of 100 elements are not for its epilogue
            sizes = (2, 9, 40), (hidden, 40), (hidden,), (40, hidden), (40,)
            mlp = [(torch.randn(s) / 4).to(dtype) for s in sizes]
            found[f"mlp-{name}-{hidden}"] = run(rfkernels.gelu_mlp, mlp, torch.randn(2, 9, 40).to(dtype))
        found[f"linear-{name}"] = run(linear, mlp[:3], torch.randn(2, 9, hidden).to(dtype))
    cases = {"linear": (linear, found["linear-fp32"]), "mlp": (rfkernels.gelu_mlp, found["mlp-fp32-96"])}
    odd, (_, w, b) = torch.randn(19, 41)[1:, 1:], found["linear-fp32"]["given"]       # its address is odd
    found["odd"] = run(linear, [odd, w, b], torch.randn(18, 100))
    asked = fake.fake_heuristics()
    for _ in range(50):
        run(linear, [odd, w, b], found["odd"]["dy"])
    found["asked again"] = fake.fake_heuristics() - asked
    for what in (fake.fake_refuse, fake.fake_fail):
        native.entry.use_cublaslt(str(folder / "fake_cublaslt.so"))
        what(1)
        for name, (call, before) in cases.items():
            found[f"{what.__name__}-{name}"] = run(call, before["given"], before["dy"])
        what(0)
    native.entry.use_cublaslt(str(folder / "not there"))
    found["missing"] = run(linear, *(cases["linear"][1][what] for what in ("given", "dy")))
    launcher._listed = lambda name, size, gpu: False
    native.entry.forget()
    native.entry.use_cublaslt(str(folder / "fake_cublaslt.so"))
    found["not listed"] = run(rfkernels.gelu_mlp, *(cases["mlp"][1][what] for what in ("given", "dy")))
    torch.save(found, sys.argv[1])
