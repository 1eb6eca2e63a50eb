"""Muon: its direction against a singular value decomposition, its steps against their definition, on any processes."""

import pytest
import torch

from mmdit import MMDiT, presets
from train.config import Optimizer
from train.engine.loop import make_optimizer
from train.engine.muon import Muon, MuonAdamW, orthogonalised
from train.engine.parallel import World
from train.engine.stepping import Stepper, Taken

from .launching import ended

ALONE = World(torch.device("cpu"))


@pytest.mark.parametrize("shape", ((24, 24), (48, 16), (16, 48)))
def test_directions_are_orthonormal(shape):
    """Singular vectors are kept, singular values of one order become about 1: 0.68 to 1.13 is what the polynomial
    gives."""
    u, _, v = torch.linalg.svd(torch.randn(3, *shape).double(), full_matrices=False)
    given = u @ torch.linspace(0.1, 1, min(shape)).double().diag() @ v * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for u, v, found in zip(u, v, orthogonalised(given.float()), strict=True):                        # noqa: B020
        core = u.T @ found.double() @ v.T
        assert core.diagonal().min() > 0.6 and core.diagonal().max() < 1.2
        assert (core - core.diagonal().diag()).abs().max() < 1e-3


def test_a_step_is_nesterovs_average_orthogonalised_by_pieces():
    weight = torch.nn.Parameter(torch.randn(12, 4))
    start, average = weight.detach().clone(), torch.zeros(12, 4)
    optimizer = Muon([{"params": [weight], "pieces": 3}], lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        gradient = torch.randn(12, 4)
        weight.grad = gradient.clone()
        optimizer.step()
        average = 0.9 * average + 0.1 * gradient
        ahead = 0.1 * gradient + 0.9 * average
        move = torch.cat([orthogonalised(piece[None])[0] for piece in ahead.chunk(3)])          # 4 x 4: length 1
        start = start - 0.1 * (move + 0.5 * start)
    torch.testing.assert_close(weight.detach(), start)


def test_matrices_inside_blocks_are_muons_and_the_rest_is_adamws():
    model = MMDiT(presets.tiny())
    optimizer = make_optimizer(model, Optimizer(kind="muon", muon_lr=0.03, lr=1e-3, weight_decay=0.1))
    assert isinstance(optimizer, MuonAdamW)
    names = {p: n for n, p in model.named_parameters()}
    muons = {names[p]: group for group in optimizer.muon.param_groups for p in group["params"]}
    assert muons.keys() == {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert all(group["pieces"] == (3 if "qkv" in name else 1) for name, group in muons.items())
    crossing = MMDiT(presets.tiny(backbone="uvit"))
    kinds = {n: p for n, p in crossing.named_parameters() if n.endswith(".kv.weight")}
    groups = make_optimizer(crossing, Optimizer(kind="muon")).muon.param_groups
    assert kinds and all(any(p is q for g in groups if g["pieces"] == 2 for q in g["params"]) for p in kinds.values())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(names)


@pytest.mark.parametrize("what", ("loss", "gradient"))
def test_a_step_that_is_not_finite_changes_nothing(what):
    torch.manual_seed(0)
    model = MMDiT(presets.tiny())
    optimizer = make_optimizer(model, Optimizer(kind="muon", lr=1e-2))
    stepper = Stepper(model, optimizer, 1.0, ALONE)

    def backward():
        c = model.config
        out = model(torch.randn(2, c.in_channels, 4, 4), torch.rand(2), torch.randn(2, 3, c.context_dim),
                    torch.randn(2, c.pooled_dim))  # fmt: skip
        loss = (out - 1).square().mean()
        loss.backward()
        return loss.detach()

    stepper(Taken(0, 1.0, 0.0), backward())
    before = [t.clone() for t in (*model.parameters(), *(v for s in optimizer.state.values() for v in s.values()))]
    loss = backward()
    if what == "gradient":
        model.blocks[0].image.attn.qkv.weight.grad[0, 0] = torch.inf
    stepper(Taken(1, 1.0, 0.0), loss * torch.nan if what == "loss" else loss)
    after = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


TRAINED = """
import dataclasses, sys, torch
from pathlib import Path
from train.config import Optimizer
from train.engine.loop import train
from train.recipes import RECIPES
from mmdit import presets

if __name__ == "__main__":
    base = RECIPES["shapes"]()
    train(dataclasses.replace(base, run=Path(sys.argv[1]) / "run", cache=Path({cache!r}), minutes=None, steps=4,
          batch=8, optimizer=Optimizer(kind="muon", muon_lr=0.02, lr=1e-3, eps=1e-6, warmup=0), checkpoint_every=2,
          validation=dataclasses.replace(base.validation, samples=1), unit_latents=True, threads=1,
          samples=dataclasses.replace(base.samples, count=1, steps=1)))
"""


def test_the_weights_do_not_depend_on_the_number_of_processes(tmp_path, launch, cache):
    from safetensors.torch import load_file

    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        ended(launch.start(TRAINED.replace("{cache!r}", repr(str(cache))), folder, processes))
        found.append(load_file(folder / "run/model.safetensors"))
    one, two = found
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5, msg=name)
