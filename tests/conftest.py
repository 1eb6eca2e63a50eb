import os
import re
from importlib.util import find_spec
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:                    # before torch is imported: a core for each worker
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available() and find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")          # before any kernel is imported
# A backward compiled with an older version of an op would be taken from the disk: its key is the forward alone.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest

TABLE = Path(__file__).with_name("README.md").read_text()
SLOW = dict(re.findall(r"^\| `(.+?)` \| (.+?) \|$", TABLE, re.M))
"""Tests that `make test` leaves out, by how their names begin: what each would catch that the others do not."""
FIRST = ("train/test_parallel.py", "train/test_faults.py", "train/test_planning.py", "train/test_st", "test_readme.py")
"""Files of long tests: they begin first, so that workers end at the same time."""
DEVICE_TIER = {
    f"test_{name}.py"
    for name in ("adaln_kernels", "bias", "block_styles", "drop_in", "flow_kernels", "gelu_mlp", "join",
                 "joint_attention_kernels", "joint_attention_operator", "optim", "patch_kernels", "qk_norm",
                 "transforms")
}  # fmt: skip
torch.backends.cudnn.allow_tf32 = False        # a convolution that results are compared with has fp32's error


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    name = lambda item: item.nodeid.removeprefix("tests/")  # noqa: E731
    for item in items:
        if name(item).startswith(tuple(SLOW)):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not name(item).startswith(FIRST))
    mark_device_tier(items)


def mark_device_tier(items):
    """The device tier (`-m device`), for the few minutes of a borrowed GPU: of each test of the kernels as few cases as
    show every value of every parameter once. Those of the product of all that are left are marked `product`."""
    seen = {}
    for item in items:
        if "rfkernels" not in item.path.parts or item.path.name not in DEVICE_TIER:
            continue
        parameters = getattr(item, "callspec", None)
        values = {(name, str(value)) for name, value in (parameters.params.items() if parameters else ())} or {"alone"}
        known = seen.setdefault((item.path, item.originalname), set())
        if values - known:
            known |= values
            item.add_marker(pytest.mark.device)
        else:
            item.add_marker(pytest.mark.product)
