"""Patched models whose attention diffusers spreads over processes (context parallelism, Ulysses), in each order."""

import json

import pytest
import torch
import torch.distributed as dist

from rfkernels import patch

from ..processes import ranks
from .test_patch import inputs, made

pytest.importorskip("diffusers", reason="diffusers is the reference here")
ORDERS = ("do", "apply, do", "do, apply", "apply, do, revert", "do, apply, revert", "apply, revert, do")
TEXT = 6                                                                       # tokens: two processes share them


def errors(path):
    """On one of two processes: how far each order is from the model on one process, relative to it."""
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1                                 # diffusers asks for it; these are CPUs
    dist.init_process_group("gloo")
    found = {}
    torch.manual_seed(3)
    text = torch.randn(2, TEXT, 24)
    for name in ("flux", "qwen"):
        given = inputs(name) | {"encoder_hidden_states": text, "return_dict": False}
        given |= {"txt_ids": torch.zeros(TEXT, 3)} if name == "flux" else {}
        want = made(name)(**given)[0]
        for order in ORDERS:
            model = made(name)
            for step in order.split(", "):
                if step == "do":
                    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
                else:
                    getattr(patch, step)(model)
            found[f"{name}: {order}"] = ((model(**given)[0] - want).norm() / want.norm()).item()
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))
    dist.destroy_process_group()


def test_each_order_draws_what_one_process_does(tmp_path):
    started = ranks(errors, (tmp_path / "errors.json",), 2)
    assert started.wait() == 0, started.printed()
    found = json.loads((tmp_path / "errors.json").read_text())
    assert len(found) == 2 * len(ORDERS) and max(found.values()) < 1e-5, found
