import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available() and find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")          # before any kernel is imported
# A backward compiled with an older version of an op would be taken from the disk: its key is the forward alone.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest

DEVICE_TIER = {
    f"test_{name}.py"
    for name in ("adaln_kernels", "bias", "block_styles", "drop_in", "flow_kernels", "gelu_mlp",
                 "joint_attention_kernels", "joint_attention_operator", "patch_kernels", "qk_norm", "transforms")
}  # fmt: skip
torch.backends.cudnn.allow_tf32 = False        # a convolution that results are compared with has fp32's error


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """The device tier (`-m device`), for the few minutes of a borrowed GPU: of each test of the kernels as few cases as
    show every value of every parameter once, not the product of all."""
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
