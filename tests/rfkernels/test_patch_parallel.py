"""Patched models whose attention diffusers spreads over processes (context parallelism, Ulysses), in each order."""

import json

import pytest
import torch
import torch.distributed as dist

from rfkernels import patch
from rfkernels.patch.swap import Fused

from ..processes import ranks
from .test_patch import inputs, made
from .test_patch_orders import ORDERS

pytest.importorskip("diffusers", reason="diffusers is the reference here")
TEXT = 6                                                                       # tokens: two processes share them


def errors(path):
    """On one of two processes, of each order: how far it is from the model on one process, relative to it, how many
    tokens of the image the first attention of this one sees, and whether it is patched."""
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
        for order in ("do", *ORDERS):
            model, seen = made(name), []
            count = lambda _, given, seen=seen: seen.append(given[0].shape[1])  # noqa: E731
            model.transformer_blocks[0].attn.to_q.register_forward_pre_hook(count)
            for step in order.split(", "):
                if step == "do":
                    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
                else:
                    getattr(patch, step)(model)
            error = ((model(**given)[0] - want).norm() / want.norm()).item()
            fused = any(isinstance(module, Fused) for module in model.modules())
            found[f"{name}: {order}"] = error, seen, fused
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))
    dist.destroy_process_group()


def test_each_order_draws_what_one_process_does(tmp_path):
    started = ranks(errors, (tmp_path / "errors.json",), 2)
    assert started.wait() == 0, started.printed()
    for case, (error, tokens, fused) in json.loads((tmp_path / "errors.json").read_text()).items():
        assert error < 1e-5, case
        assert tokens == [6], f"{case}: each process has half of 12"
        assert fused == (case.rpartition(" ")[2] == "apply" or case.endswith("apply, do")), case
