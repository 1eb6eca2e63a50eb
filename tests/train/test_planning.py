"""The plan of a run: its bytes against tensors that are really there, its times against their definition."""

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.saved_bytes import saved
from mmdit import MMDiT, adapters, presets
from mmdit.adapters import Lora
from mmdit.cost.counting import trace
from mmdit.cost.flops import training_flops
from mmdit.cost.hardware import GPUS
from train.config import Parallel
from train.engine import parallel
from train.engine.parallel import World
from train.planning.activations import _traces, activations, model_on_meta, whole_model
from train.planning.plan import Layout, plan, units
from train.planning.report import report
from train.recipes import RECIPES

from ..processes import called

H100 = GPUS["H100 80GB HBM3"]


def small(**parallel):
    config = RECIPES["d15-256"]()
    return dataclasses.replace(config, model=presets.by_depth(4), parallel=Parallel(**parallel))


def autocast(model, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return model(*inputs)


def test_units_are_all_the_parameters():
    model = MMDiT(presets.tiny())
    sizes = units(model)
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    assert sizes["modulation"] == sum(p.numel() for p in model.modulation.parameters())


def test_activations_are_what_autograd_keeps():
    """Of a real step under autocast on this machine, with its ops as they run here; within 5 %."""
    config = small()
    model = MMDiT(config.model).bfloat16()
    inputs = [torch.randn(2, 16, 32, 32).bfloat16(), torch.rand(2), torch.randn(2, 154, 4096).bfloat16(),
              torch.randn(2, 2048).bfloat16()]  # fmt: skip
    whole = saved(lambda: autocast(model, inputs), list(model.parameters()))
    found = trace(lambda: whole_model(config, 2, 256), backward=True, on_gpu=False)
    assert found.kept == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("how", ({"reference_channels": 16}, {"reference_tokens": True}), ids=("channels", "tokens"))
def test_activations_of_an_editor_are_what_autograd_keeps(how):
    config = small()
    config = dataclasses.replace(config, objective="editing", model=dataclasses.replace(config.model, **how))
    model = MMDiT(config.model).bfloat16()
    latent, reference = torch.randn(2, 2, 16, 32, 32).bfloat16()
    inputs = [latent, torch.rand(2), torch.randn(2, 154, 4096).bfloat16(), torch.randn(2, 2048).bfloat16()]

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(*inputs, references=[reference])

    found = trace(lambda: whole_model(config, 2, 256), backward=True, on_gpu=False)
    assert found.kept == pytest.approx(saved(run, list(model.parameters())), rel=0.05)


@pytest.mark.parametrize("pixels", (256, 1024))
def test_checkpointing_keeps_less_and_computes_more(pixels):
    deep = RECIPES[f"d24-{pixels}"]()
    by_kind = {
        kind: activations(dataclasses.replace(deep, parallel=Parallel(checkpointing=kind)), 1, pixels)
        for kind in ("none", "selective", "full")
    }
    none, selective, full = (kept for kept, _ in by_kind.values())
    assert selective < 0.45 * none and full < 0.25 * none
    flops = [sum(k.flops for k in kernels) for _, kernels in by_kind.values()]
    assert flops[0] < flops[1] < 1.2 * flops[0] and flops[1] < flops[2] < 1.4 * flops[0]


class Alive(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still there; views of what was there before left out."""

    def __init__(self, before):
        super().__init__()
        self.before, self.made = {t.untyped_storage()._cdata for t in before}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.before:
                self.made[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage())
        return out

    def bytes(self):
        return sum(found.nbytes() for found in (made() for made in self.made.values()) if found is not None)


@pytest.mark.parametrize("kind", ("selective", "full"))
def test_what_checkpointing_keeps_is_what_is_there(kind):
    """Of a real forward under autocast on this machine, the one block that is computed again left out; within 5 %."""
    config, batch = small(checkpointing=kind), 2
    model = parallel.build(config.model, config.parallel, World(torch.device("cpu")), 0, False).bfloat16()
    model.blocks[-1].leaves_pending = False            # on a CPU a residual outside of a block keeps its branch in fp32
    inputs = [torch.randn(batch, 16, 32, 32).bfloat16(), torch.rand(batch), torch.randn(batch, 154, 4096).bfloat16(),
              torch.randn(batch, 2048).bfloat16()]  # fmt: skip
    with Alive([*model.parameters(), *model.buffers(), *inputs]) as alive:
        out = autocast(model, inputs)
        gc.collect()
        there = alive.bytes()
    assert out.requires_grad
    planned, _ = activations(config, batch, 256)
    again = _traces(small(), batch, 256)[1][0].kept
    assert planned - again == pytest.approx(there + sum(x.nbytes for x in inputs), rel=0.05)


@pytest.mark.parametrize("kind", [{"weight_sets": 3}, {"backbone": "uvit"}], ids=("3 sets", "uvit"))
def test_other_backbones_are_planned_too(kind):
    config = RECIPES["d15-256"]()
    for checkpointing in ("none", "full"):
        parallel = Parallel(checkpointing=checkpointing)
        chosen = dataclasses.replace(config, model=presets.by_depth(2, **kind), parallel=parallel)
        kept, kernels = activations(chosen, 1, 256)
        assert kept > 0 and sum(kernel.flops for kernel in kernels) > 0


def test_sharded_bytes_are_those_of_the_rows_that_a_process_gets():
    """Two processes' shards, gradients, moments and averages: a quarter of a percent off for padding of odd rows."""
    config, layout = small(), Layout(2, 1, 8, 1)
    found = plan(config, layout, H100, "h100", 256)
    parameters = list(model_on_meta(config).parameters())
    really = sum(-(-p.shape[0] // 2) * p[0].numel() for p in parameters)           # FSDP2 cuts the first dimension
    for part, bytes_each in (("weights", 4), ("gradients", 4), ("AdamW", 8), ("average", 4)):
        (planned,) = (value for name, value in found.memory.items() if name.startswith(part))
        assert planned == pytest.approx(bytes_each * really, rel=0.05)


def test_communication_and_time_follow_their_definitions():
    config, tokens = small(), 256
    alone, eight = (plan(config, Layout(n, 1, 64 * n, 1), H100, "h100", 256) for n in (1, 8))
    parameters = sum(p.numel() for p in model_on_meta(config).parameters())
    assert alone.network == 0 and eight.sent["reduce-scatter of gradients, fp32"] == pytest.approx(3.5 * parameters)
    assert eight.sent["all-gather of weights, bf16, forward and backward"] == pytest.approx(3.5 * parameters)
    flops = 64 * training_flops(config.model, tokens).total
    assert eight.mfu == pytest.approx(flops / eight.compute / H100.flops)
    replicas = plan(config, Layout(16, 2, 1024, 1), H100, "h100", 256)
    assert replicas.sent["all-reduce over replicas, fp32"] == pytest.approx(8 * parameters / 8 / 2)
    twice = plan(config, Layout(8, 1, 512, 2), H100, "h100", 256)
    assert twice.sent["all-gather of weights, bf16, forward and backward"] == pytest.approx(7 * parameters)
    full = plan(small(checkpointing="full"), Layout(8, 1, 512, 1), H100, "h100", 256)
    assert 1.1 * eight.compute < full.compute < 1.5 * eight.compute                         # a forward more


def test_the_eight_billion_on_a_thousand_gpus():
    done = called("train", "plan", "d38-256", "--gpus", "1024", "--gpu", "h100")
    assert done.returncode == 0, done.stderr
    for part in ("8.06B parameters (33% of them modulation)", "weights, fp32, sharded", "fits: ", "MFU"):
        assert part in done.stdout
    for words, message in (
        (("--gpu", "abacus"), "gpu is 'abacus'; expected how one of these begins: A100"),
        (("--gpus", "5000"), "batch is 4096; expected a sample for each of 5000 x 1 parts"),
    ):
        wrong = called("train", "plan", "d24-256", *words)
        assert wrong.returncode == 1 and message in wrong.stderr


def test_what_does_not_fit_is_told_what_would():
    config = dataclasses.replace(RECIPES["d15-1024"](), parallel=Parallel())
    told = report(dataclasses.replace(config, batch=1680), 8, "h100", None)
    assert "does not fit: " in told and "with --parallel.checkpointing full" in told and "accumulate" in told


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapted(targets, **parallel):
    lora = Lora(rank=8, targets=targets)
    return dataclasses.replace(small(**parallel), adapter=lora, initial=Path("base"))


@pytest.mark.parametrize("targets", (("attention",), ("all",)), ids=str)
def test_activations_with_an_adapter_are_what_autograd_keeps(targets):
    config = adapted(targets)
    model = MMDiT(config.model).bfloat16()
    adapters.attach(model, config.adapter)
    inputs = [torch.randn(2, 16, 32, 32).bfloat16(), torch.rand(2), torch.randn(2, 154, 4096).bfloat16(),
              torch.randn(2, 2048).bfloat16()]  # fmt: skip
    whole = saved(lambda: autocast(model, inputs), list(model.parameters()))
    found = trace(lambda: whole_model(config, 2, 256), backward=True, on_gpu=False)
    assert found.kept == pytest.approx(whole, rel=0.05)


def test_an_adapters_state_is_counted():
    """Frozen weights once in bf16; of what is trained weights, gradients, two moments and an average in fp32."""
    config = adapted(("all",))
    model = model_on_meta(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    found = plan(config, Layout(1, 1, 1, 1), H100, "H100 80GB HBM3", 256).memory
    assert found["frozen weights, bf16, sharded"] == 2 * frozen
    fp32 = sum(value for name, value in found.items() if "fp32, sharded" in name)
    assert fp32 == 20 * trained


def test_rank_16_on_the_8b_model_fits_24_gb():
    config = dataclasses.replace(
        RECIPES["lora-sd35-large"](), adapter=Lora(rank=16), parallel=Parallel(checkpointing="full"), batch=1
    )
    found = plan(config, Layout(1, 1, 1, 1), H100, "H100 80GB HBM3", 1024)
    assert 17e9 < found.total < 20e9                                       # others measured 18.8 at rank 64


def test_a_pair_costs_two_pictures_and_the_reference():
    config = adapted(("all",))
    pairs = dataclasses.replace(config, objective="preference")
    one, two = (plan(c, Layout(1, 1, 1, 1), H100, "H100 80GB HBM3", 256) for c in (config, pairs))
    kept = [value for p in (one, two) for name, value in p.memory.items() if name.startswith("activations")]
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.1)
    assert [round(c.flops_share, 3) for c in (small(), config, pairs)] == [1.0, 0.667, 2.0]
