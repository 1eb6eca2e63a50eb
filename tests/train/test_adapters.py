"""Runs that train an adapter: what is held, resumed, spread, sampled and refused."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mmdit import MMDiT, adapters, checkpoint
from mmdit.adapters import Lora
from mmdit.sampling.sample import Sampler
from train.config import Config, Optimizer, Parallel
from train.engine import loop
from train.engine.loop import train
from train.engine.storage import Reader
from train.objectives import Flow

from . import launching
from .conftest import changed


@pytest.fixture
def tuned(config, tmp_path):
    """An adapter's run of twelve steps, of a model with weights that are not those of its beginning."""
    base = tmp_path / "base.safetensors"
    torch.manual_seed(0)
    model = MMDiT(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(model, base)
    lora = Lora(rank=2, alpha=4, targets=("all",))
    optimizer = Optimizer(lr=1e-2, warmup=2)
    return changed(config, run=tmp_path / "run", initial=base, adapter=lora, optimizer=optimizer, caption_dropout=0.1)


def losses(run):
    return launching.losses(run)[0]


def names_of(run, step=12):
    return set(Reader(run / "checkpoints" / f"step-{step:08d}").read_metadata().state_dict_metadata)


def weights(run):
    return load_file(run / "adapter.safetensors")


def test_the_adapter_alone_is_trained_and_kept(tuned):
    train(tuned)
    assert not (tuned.run / "model.safetensors").exists()
    names = names_of(tuned.run)
    assert names and all(name.endswith((".lora_a", ".lora_b", ".step", ".exp_avg", ".exp_avg_sq")) for name in names)
    assert losses(tuned.run)[-1] < losses(tuned.run)[0]
    moved = [name for name, value in weights(tuned.run).items() if name.endswith("lora_b") and value.any()]
    assert len(moved) > 20
    sampler, base = Sampler.load(tuned.run), checkpoint.load(tuned.initial)
    held = sampler.model.state_dict()
    assert all(torch.equal(held[name], value) for name, value in base.state_dict().items())
    assert sampler(["a small red circle on the left"], steps=2).std() > 0


def test_its_first_step_is_that_of_the_base(tuned, config):
    """The loss before anything has moved, and the validation of the average, which begins at nothing too."""
    train(changed(tuned, steps=1))
    whole = changed(config, run=tuned.run.parent / "whole", initial=tuned.initial, steps=1, caption_dropout=0.1)
    train(whole)
    assert losses(tuned.run)[0] == pytest.approx(losses(whole.run)[0], rel=1e-5)


def test_resume_is_bitwise_the_uninterrupted_run(tuned, tmp_path, killed_at):
    train(tuned)
    other = changed(tuned, run=tmp_path / "other")
    killed_at(other, 6)
    train(other)
    one, two = weights(tuned.run), weights(other.run)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tuned.run) == losses(other.run)


@pytest.mark.parametrize("change", ("base", "rank", "alpha"))
def test_another_base_or_adapter_is_refused(tuned, change):
    train(changed(tuned, steps=4))
    again = changed(tuned, steps=8)
    if change == "base":
        model = checkpoint.load(tuned.initial)
        model.time_embed.fc1.bias.data += 1
        checkpoint.save(model, tuned.initial)
    else:
        again = changed(again, adapter=dataclasses.replace(tuned.adapter, **{change: 3}))
    with pytest.raises(ValueError, match=f"a run with other settings .*{'base' if change == 'base' else 'adapter'}"):
        train(again)


def test_an_adapter_finds_its_base_or_says_what_it_misses(tuned):
    train(changed(tuned, steps=2))
    shutil.copy(tuned.initial, tuned.initial.with_name("kept"))
    checkpoint.save(MMDiT(tuned.model), tuned.initial)
    with pytest.raises(ValueError, match="is an adapter of the weights"):
        Sampler.load(tuned.run)
    tuned.initial.unlink()
    with pytest.raises(FileNotFoundError, match=r"is an adapter of .*base.safetensors, which is not there"):
        Sampler.load(tuned.run)


@pytest.mark.parametrize(
    "processes, parallel",
    [(2, Parallel()), (4, Parallel(replicas=2)), (1, Parallel(accumulate=2, checkpointing="full")),
     (2, Parallel(checkpointing="selective"))],
    ids=("2", "HSDP 2x2", "1 x 2 parts, full", "2, selective"),
)  # fmt: skip
def test_losses_do_not_depend_on_the_processes(processes, parallel, tuned, tmp_path, launch):
    train(changed(tuned, steps=6))
    spread = changed(tuned, run=tmp_path / "spread", parallel=parallel, steps=6)
    launch(spread, processes)
    assert losses(spread.run) == pytest.approx(losses(tuned.run), rel=1e-4)
    one, two = weights(tuned.run), weights(spread.run)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0.05, atol=2e-4)


def test_in_bf16_the_base_is_stored_in_bf16_and_adapters_in_fp32(tuned, tmp_path, launch):
    mixed = changed(tuned, precision="bf16", steps=4, run=tmp_path / "one")
    models = []
    build = loop.parallel.build

    def watched(*args):
        models.append(build(*args))
        return models[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.parallel, "build", watched)
        train(mixed)
    kinds = {p.dtype for n, p in models[0].named_parameters() if "lora" not in n}
    assert kinds == {torch.bfloat16} and models[0].patch_embed.pos_embed.dtype == torch.float32
    assert {p.dtype for n, p in models[0].named_parameters() if "lora" in n} == {torch.float32}
    spread = changed(mixed, run=tmp_path / "two")
    launch(spread, 2)
    assert losses(spread.run) == pytest.approx(losses(mixed.run), rel=0.02)


def test_an_adapter_needs_a_base_and_adamw(tuned):
    for change in ({"initial": None}, {"optimizer": Optimizer(kind="muon")}):
        with pytest.raises(ValueError, match="an adapter needs the weights that it adapts, and AdamW"):
            changed(tuned, **change)
    assert Config.from_json(tuned.to_json()) == tuned


def test_captions_are_dropped_whole(config):
    from train.data.shards import Cache

    bucket = Cache(config.cache).buckets("train")["32x32"]
    flow = Flow.of(changed(config, encoder_dropout=0.0, caption_dropout=0.25), Cache(config.cache), None)
    dropped = [not flow_draw(flow, bucket, i, step).text.pooled.any() for step in range(20) for i in range(20)]
    assert sum(dropped) / len(dropped) == pytest.approx(0.25, abs=0.06)


def flow_draw(flow, bucket, i, step):
    import numpy as np

    from mmdit.flow import by_name

    return dataclasses.replace(flow, formulation=by_name("rf")).draw(bucket, np.array([i]), step)


def test_exported_for_others(tuned, tmp_path):
    """What training leaves is what `adapters.read` takes, and what other programs read after a conversion."""
    train(changed(tuned, steps=2))
    adapter = adapters.read(tuned.run / "adapter.safetensors")
    assert adapters.save(adapter, tmp_path / "for others", tuned.model, format="diffusers").is_file()
