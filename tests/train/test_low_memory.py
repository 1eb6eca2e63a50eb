"""Runs with an optimizer of few bits: what is stored, resumed and spread."""

import numpy as np
import pytest
import torch

from train.config import Optimizer
from train.engine import loop
from train.engine.loop import train
from train.engine.storage import Reader
from train.planning.plan import Layout, plan

from .conftest import changed
from .launching import losses
from .test_planning import H100, small
from .test_run import same, state_of


def optimizer(states, **more):
    return Optimizer(lr=1e-3, warmup=2, states=states, **more)


@pytest.mark.parametrize("states", ("bf16", "int8"))
def test_losses_are_near_those_of_fp32_states(states, config, tmp_path):
    runs = [changed(config, run=tmp_path / s, optimizer=optimizer(s), steps=30) for s in ("fp32", states)]
    for run in runs:
        train(run)
    one, two = (np.array(losses(run.run)[0]) for run in runs)
    assert one[-1] < 0.9 * one[0] and np.abs(two - one).max() < 0.02 * one[0]


def test_resume_is_bitwise_the_uninterrupted_run(config, tmp_path, killed_at):
    config = changed(config, optimizer=optimizer("int8"))
    train(config)
    held = Reader(config.run / "checkpoints" / "step-00000012").read_metadata().state_dict_metadata
    kinds = {m.properties.dtype for name, m in held.items() if name.endswith("0.image.attn.qkv.weight.exp_avg")}
    assert kinds == {torch.int8} and any(name.endswith("exp_avg_sq_scale") for name in held)
    other = changed(config, run=tmp_path / "other")
    killed_at(other, 5)
    train(other)
    same(state_of(config.run), state_of(other.run))


def test_two_processes_and_one_store_the_same(config, tmp_path, launch):
    """Gradients are summed in another order: what they differ by moves few codes."""
    one = changed(config, run=tmp_path / "one", optimizer=optimizer("int8"), steps=4)
    train(one)
    two = changed(one, run=tmp_path / "two")
    launch(two, 2)
    assert losses(two.run)[0] == pytest.approx(losses(one.run)[0], rel=1e-4)
    train(changed(two, optimizer=two.optimizer, steps=6))                 # and one process resumes what two wrote
    assert len(losses(two.run)[0]) == 6


def test_weights_in_bf16_are_stored_so_and_move(config, tmp_path):
    run = changed(config, precision="bf16", optimizer=optimizer("int8", weights="bf16"), steps=10)
    models, build = [], loop.parallel.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.parallel, "build", lambda *args: models.append(build(*args)) or models[-1])
        train(run)
    assert {p.dtype for p in models[0].parameters()} == {torch.bfloat16}
    assert losses(run.run)[0][-1] < losses(run.run)[0][0]


def test_what_does_not_go_together_is_refused(config):
    for wrong in ({"kind": "muon", "states": "int8"}, {"weights": "bf16"}):
        with pytest.raises(ValueError, match=r"Config: optimizer\."):
            changed(config, optimizer=Optimizer(**wrong))


@pytest.mark.parametrize("states, weights, each", (("int8", "bf16", 6), ("bf16", "bf16", 8), ("int8", "fp32", 10),
                                                   ("fp32", "fp32", 16)))  # fmt: skip
def test_the_plan_counts_them(states, weights, each):
    """Bytes a parameter, of weights, gradients and moments."""
    config = changed(small(), optimizer=Optimizer(states=states, weights=weights))
    memory = plan(config, Layout(1, 1, 1, 1), H100, "H100 80GB HBM3", 256).memory
    whole = plan(small(), Layout(1, 1, 1, 1), H100, "H100 80GB HBM3", 256).memory["weights, fp32, sharded"] / 4
    held = sum(value for name, value in memory.items() if name.startswith(("weights", "gradients,", "AdamW")))
    assert held / whole == pytest.approx(each, abs=0.05)
