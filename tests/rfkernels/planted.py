"""Small kernels with one fault each, and without: run by test_sanitize.py in a process of its own, as
`TRITON_INTERPRET=1 python -m tests.rfkernels.planted`; prints {name: [kinds, kernels, arguments]} as JSON."""

import json

import torch
import triton
import triton.language as tl

from rfkernels.sanitize import Settings, check_results, install, poison, watch
from rfkernels.sanitize.canary import sparse

install()


@triton.jit
def copy(x_ptr, y_ptr, n, MASK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = at < n
    if MASK:
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=mask, other=0.0), mask=mask)
    else:
        tl.store(y_ptr + at, tl.load(x_ptr + at), mask=mask)


@triton.jit
def copy_of_two(xs, y_ptr, n, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Program i copies xs[i], BACK elements too early."""
    at = tl.arange(0, BLOCK)
    x_ptr = tl.where(tl.program_id(0) == 0, xs[0], xs[1])
    tl.store(y_ptr + tl.program_id(0) * n + at, tl.load(x_ptr + at - BACK, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def rows(x_ptr, y_ptr, n, SKIP: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program; leaves out the last SKIP elements of each."""
    at = tl.arange(0, BLOCK)
    here = tl.program_id(0) * n + at
    tl.store(y_ptr + here, tl.load(x_ptr + here, mask=at < n - SKIP), mask=at < n - SKIP)


@triton.jit
def neighbours(x_ptr, y_ptr, LEFT: tl.constexpr):
    """In place, if x is y: reads what program i - LEFT writes."""
    i = tl.program_id(0)
    tl.store(y_ptr + i, tl.load(x_ptr + i - LEFT, mask=i >= LEFT, other=0.0) + 1.0)


@triton.jit
def constant(y_ptr, value, SAME: tl.constexpr):
    tl.store(y_ptr, value if SAME else tl.program_id(0).to(tl.float32))


@triton.jit
def scatter(y_ptr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at // DIVIDE, at.to(tl.float32))


@triton.jit
def count(y_ptr, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(y_ptr, 1.0)
    else:
        tl.store(y_ptr, tl.load(y_ptr) + 1.0)


@triton.jit
def far(x_ptr, y_ptr, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """x[program, :BLOCK] of rows so far apart that 32-bit offsets wrap."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + at, tl.load(x_ptr + row * stride + at))


@triton.jit
def far_bound(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    """A mask and a loop bound from a product that may wrap."""
    total = tl.zeros([BLOCK], tl.float32)
    at = tl.arange(0, BLOCK)
    for start in range(0, tl.minimum(stride * stride, BLOCK), BLOCK):
        total += tl.load(x_ptr + start + at, mask=at < stride * stride, other=0.0)
    tl.store(y_ptr + at, total)


@triton.jit
def hinted(x_ptr, y_ptr, stride, M: tl.constexpr, C: tl.constexpr, ASSUME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.max_contiguous(tl.multiple_of(tl.program_id(0) * stride + tl.arange(0, BLOCK), M), C)
    tl.assume(stride >= ASSUME)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


n = 100


@triton.jit
def copy_by_table(table_ptr, n, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """From the first address of a table to the second."""
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    y_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(tl.float32))
    columns = tl.arange(0, BLOCK)
    mask = columns < n if MASK else columns < BLOCK
    tl.store(y_ptr + columns, tl.load(x_ptr + columns, mask=mask), mask=columns < n)


def of_table(mask, known=2):
    x, y = torch.randn(n), torch.empty(n)
    table = torch.tensor([x.data_ptr(), y.data_ptr()])
    table.behind = [x, y][:known]
    copy_by_table[(1,)](table, n, mask, 128)


def of_rows(programs, skip, again=False):
    y = torch.empty(4, n)
    rows[(programs,)](torch.randn(4, n), y, n, skip, 128)
    if again:
        rows[(4,)](y, torch.empty(4, n), n, 0, 128)
    check_results("rows", y)


def of_padding(stop, dtype=torch.float32):
    x = torch.randn(n).to(dtype)
    poison(x[50:])
    copy[(1,)](x, torch.empty(n).to(dtype), stop, True, 64, 64)


def of_far(wide, *programs):
    big = sparse((40, 1 << 28), torch.float32)                             # 40 GiB of addresses
    watch.settings = Settings(sparse=True, programs=lambda grid: [(p, 0, 0) for p in programs])
    far[(40,)](big, torch.empty(40 * 16), 1 << 28, wide, 16)


def in_place(left):
    y = torch.zeros(8)
    neighbours[(8,)](y, y, left)


both = torch.randn(2, n)
wide = torch.randn(2, 128)
PLANTS = {
    "clean copy": lambda: copy[(2,)](torch.randn(n), torch.empty(n), n, True, 64, 64),
    "missing mask": lambda: copy[(2,)](torch.randn(n), torch.empty(n), n, False, 64, 64),
    "missing mask inside the storage": lambda: copy[(2,)](wide[0, :n], torch.empty(n), n, False, 64, 64),
    "clean tuple": lambda: copy_of_two[(2,)]((both[0], both[1]), torch.empty(2 * n), n, 0, 128),
    "before its start": lambda: copy_of_two[(2,)]((torch.randn(n), torch.randn(n)), torch.empty(2 * n), n, 3, 128),
    "in the other argument": lambda: copy_of_two[(2,)]((both[0], both[1]), torch.empty(2 * n), n, 3, 128),
    "clean table": lambda: of_table(True),
    "missing mask behind a table": lambda: of_table(False),
    "an address that a table does not list": lambda: of_table(True, known=1),
    "overlapping blocks": lambda: copy[(3,)](torch.randn(n), torch.empty(n), n, True, 32, 64),
    "two values": lambda: constant[(3,)](torch.empty(1), 1.0, False),
    "one value by many": lambda: constant[(3,)](torch.empty(1), 1.0, True),
    "one program": lambda: constant[(1,)](torch.empty(1), 1.0, True),
    "reads its neighbour": lambda: in_place(1),
    "in place": lambda: in_place(0),
    "two lanes": lambda: scatter[(1,)](torch.empty(64), 2, 64),
    "a lane each": lambda: scatter[(1,)](torch.empty(64), 1, 64),
    "counter": lambda: count[(3,)](torch.zeros(1), False),
    "atomic counter": lambda: count[(3,)](torch.zeros(1), True),
    "written whole": lambda: of_rows(4, 0, True),
    "unwritten ends": lambda: of_rows(4, 1),
    "unwritten ends, read": lambda: of_rows(4, 1, True),
    "unwritten row": lambda: of_rows(3, 0),
    "padding left alone": lambda: of_padding(50),
    "padding read": lambda: of_padding(51),
    "padding read in bf16": lambda: of_padding(51, torch.bfloat16),
    "64-bit offsets": lambda: of_far(True, 0, 8, 39),
    "32-bit offsets": lambda: of_far(False, 0, 8, 39),
    "32-bit offsets into itself": lambda: of_far(False, 16),
    "bound and mask overflow": lambda: far_bound[(1,)](torch.randn(64), torch.empty(64), 65537, 64),
    "bound and mask fit": lambda: far_bound[(1,)](torch.randn(64), torch.empty(64), 46340, 64),
    "hints that hold": lambda: hinted[(2,)](torch.randn(256), torch.empty(256), 64, 64, 64, 64, 64),
    "not a multiple": lambda: hinted[(2,)](torch.randn(256), torch.empty(256), 72, 16, 64, 64, 64),
    "not as assumed": lambda: hinted[(2,)](torch.randn(256), torch.empty(256), 64, 64, 64, 65, 64),
    "grid": lambda: constant[(1, 70000)](torch.empty(1), 1.0, True),
}

if __name__ == "__main__":
    found = {}
    for name, run in PLANTS.items():
        watch.reset()
        watch.settings = Settings()
        run()
        found[name] = [[f.kind, f.kernel, f.argument, f.detail] for f in watch.findings]
    print(json.dumps(found))
