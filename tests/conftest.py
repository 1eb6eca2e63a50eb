import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available() and find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")          # before any kernel is imported

import pytest

from rfkernels.testing import mend_interpreter

mend_interpreter()
torch.backends.cudnn.allow_tf32 = False        # a convolution that results are compared with has fp32's error


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
