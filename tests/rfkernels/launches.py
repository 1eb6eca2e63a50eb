"""Run as a program: what Triton's launcher and the native one hand to the driver, for the same calls. Prints JSON:
{case: {"triton": launches, "native": launches}}, a launch as kernel, grid, block, shared memory and arguments, in which
a tensor's address stands as the tensor's name.

Kernels are compiled for sm_90, the driver runs nothing (bench/fake_driver).
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import torch

from bench import fake_driver

if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    driver = fake_driver.install(folder)

import rfkernels
from rfkernels import Stream, dispatch, launcher

B, C = 2, 64


def leaf(*shape, dtype):
    return torch.randn(shape).to(dtype).requires_grad_()


def family(s, dtype):
    x, branch = leaf(B, s, C, dtype=dtype), leaf(B, s, C, dtype=torch.float32)
    sample, shared, token = leaf(B, C, dtype=dtype), leaf(C, dtype=torch.float32), leaf(B, s, C, dtype=dtype)
    modulation = leaf(B, 3 * C, dtype=dtype)
    return {
        "adaln": (lambda x, v: rfkernels.adaln(x, v, v), [x, sample]),
        "adaln-rms-mixed": (lambda x, a, b: rfkernels.adaln(x, a, b, norm="rms"), [x, token, shared]),
        "adaln-no-vectors": (lambda x: rfkernels.adaln(x), [x]),
        "adaln-broadcast": (lambda x, v: rfkernels.adaln(x, v[:, None], v[:1]), [x, sample]),
        "gated-adaln": (rfkernels.gated_adaln, [x, branch, sample, shared, token]),
        "gated-adaln-chunks": (
            lambda x, m: rfkernels.gated_adaln(x, x, *rfkernels.chunk_modulation(m, 3)), [x, modulation]
        ),
        "gated-residual": (rfkernels.gated_residual, [x, branch, sample]),
    }  # fmt: skip


def others(s, dtype):
    q, k = leaf(B, s, 3, C, dtype=dtype), leaf(B, 2 * s, 3, C, dtype=dtype)
    w = leaf(C, dtype=dtype)
    mlp = [leaf(*shape, dtype=dtype) for shape in ((B, s, C), (2 * C, C), (2 * C,), (C, 2 * C), (C,))]
    text, image = leaf(B, 7, 3, 2, C, dtype=dtype), leaf(B, s, 3, 2, C, dtype=dtype)
    kv = leaf(B, 9, 2, 3, C, dtype=dtype)
    lengths = torch.tensor([3, 5])

    def attend(*streams):
        return tuple(out for out in rfkernels.joint_attention(list(streams)) if out is not None)

    return {
        "qk-norm": (rfkernels.qk_norm, [q, k, w, w]),
        "gelu-mlp": (rfkernels.gelu_mlp, mlp),
        "attention": (lambda a, b, w: attend(Stream.packed(a, w, w), Stream.packed(b, w, w)), [text, image, w]),
        "attention-lengths": (
            lambda a, b, w: attend(Stream.packed(a, w, w, lengths), Stream.packed(b, w, w)), [text, image, w]
        ),
        "attention-without-norm": (lambda q, k: attend(Stream(q, q, q), Stream(k, k, k)), [q, k]),
        "attention-keys-only": (
            lambda kv, q, w: attend(Stream.packed(kv, None, w, queries=False), Stream(q, q, q, w, w)), [kv, q, w]
        ),
    }  # fmt: skip


PRODUCTS = {"gelu-mlp": (0, 1, 3, 4)}       # gradients that no kernel here writes: their memory may have been another's


def recorded(way, call, leaves, products):
    """Launches of the call and its backward."""
    path = folder / "record"
    with launcher.chosen(way), dispatch.as_on_a_gpu():
        driver.fake_record(str(path).encode())
        outs = call(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.manual_seed(0)
        grads = [torch.randn(o.shape).to(o.dtype) for o in outs]
        made = torch.autograd.grad(outs, leaves, grads)
        driver.fake_record(b"")
    names = {}
    for kind, tensors in (("input", leaves), ("output", outs), ("grad", grads), ("gradient", made)):
        written = [i for i in range(len(tensors)) if kind != "gradient" or i not in products]
        names.update({f"{tensors[i].data_ptr():016x}": f"{kind}{i}" for i in written})
    address = re.compile("0000[5-7][0-9a-f]{11}")
    return [
        [names.get(word, "new" if address.fullmatch(word) else word) for word in line.split()]
        for line in path.read_text().splitlines()
    ]


if __name__ == "__main__":
    length, name = int(sys.argv[1]), sys.argv[2]
    found, dtype = {}, getattr(torch, name)
    for case, (call, leaves) in {**family(length, dtype), **others(length, dtype)}.items():
        ways = {way: recorded(way, call, leaves, PRODUCTS.get(case, ())) for way in launcher.LAUNCHERS}
        found[f"{case}-{length}-{name}"] = ways
    driver.fake_fail(700)
    x = leaf(B, 5, C, dtype=torch.bfloat16)
    try:
        with launcher.chosen("native"), dispatch.as_on_a_gpu():
            rfkernels.adaln(x)
    except RuntimeError as error:
        found["failure"] = str(error)
    json.dump(found, sys.stdout)
