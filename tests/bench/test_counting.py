"""What is counted by shapes against what runs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import rfkernels
from bench import models, roofline
from bench.cases import cases
from bench.models import Size
from bench.saved_bytes import saved
from mmdit.cost.counting import Kernel, stretches, trace
from mmdit.cost.hardware import GPUS, Ceilings
from rfkernels import dispatch

CPU = torch.device("cpu")
CASES = {c.name.split("-")[0]: c for c in cases(CPU)}
SIZE = Size(3, 64, 2)
CEILINGS = Ceilings(copy=1e12, matmul=1e14, attention=5e13, launch=2e-6)


def made(case, contender):
    def make():
        op = case.contenders[contender]
        return op, [t.requires_grad_() for t in case.make()], getattr(op, "weights", [])

    return make


@pytest.fixture
def block():
    case = CASES["block"]
    yield case
    for op in case.contenders.values():
        op.free()


def test_flops_of_a_block_are_those_that_torch_counts(block):
    found = trace(made(block, "eager"), backward=True)
    block.contenders["eager"].free()
    op, inputs, _ = made(block, "eager")()
    with FlopCounterMode(display=False) as counted:
        outs = op(*inputs)
        forward = counted.get_total_flops()
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    assert found.flops == counted.get_total_flops()
    assert sum(k.flops for k in found.kernels[: found.forward]) == forward == block.forward_flops
    # the case counts a backward as twice the forward; an attention that keeps no scores computes them again
    attention = sum(k.flops for k in found.kernels[: found.forward] if k.kind == "attention")
    assert found.flops == forward + block.backward_flops + attention // 2


@pytest.mark.parametrize("step", models.STEPS)
def test_flops_of_a_model_are_those_of_its_formula(step):
    size = Size(12, 256, 1)
    ours, plain = (models.counted(size, step, way) for way in ("ours", "eager"))
    attention = sum(k.flops for k in plain.kernels[: plain.forward] if k.kind == "attention")
    again = attention // 2 if step == "training" else 0
    # the formula has a backward for the embedders' inputs, which nobody asks for
    assert plain.flops - again == pytest.approx(size.flops(step), rel=1e-2 if step == "training" else 1e-4)
    assert 0.95 * plain.flops < ours.flops < plain.flops                          # the last block's text asks nothing


def test_bytes_are_those_of_the_tensors():
    x = torch.empty(8, 32)
    found = trace(lambda: (lambda x, w: F.gelu(x @ w), [torch.empty(8, 32), torch.empty(32, 16)], []), backward=False)
    product, gelu = found.kernels
    assert (product.kind, product.flops, product.bytes) == ("matmul", 2 * 8 * 32 * 16, 4 * (8 * 32 + 32 * 16 + 8 * 16))
    assert gelu.bytes == 2 * 4 * 8 * 16 and found.kept == 0
    expands = lambda x, v: x * v.expand(8, 32)  # noqa: E731
    expanded = trace(lambda: (expands, [torch.empty(8, 32), torch.empty(32)], []), backward=False)
    assert expanded.kernels[0].bytes == 2 * x.nbytes + 32 * 4                     # an expanded tensor is read once
    views = trace(lambda: (lambda x: x.t().reshape(-1), [torch.empty(8, 32)], []), backward=False)
    assert [k.op for k in views.kernels] == ["aten.clone"]                        # a view launches nothing, a copy does


def test_kept_bytes_are_those_that_autograd_keeps(block):
    """Against a real run on this machine, so with what runs on it."""
    found = trace(made(block, "ours"), backward=True, on_gpu=False)
    block.contenders["ours"].free()
    op, inputs, weights = made(block, "ours")()
    assert found.kept == saved(lambda: op(*inputs), weights)


def test_launches_are_those_that_the_profiler_sees(block):
    """Eager's on a CPU, where an operator, in place or not, stands for a kernel; those that others are made of do not
    count again."""
    counted = Counter(k.op.rstrip("_") for k in trace(made(block, "eager"), backward=False, on_gpu=False).kernels)
    block.contenders["eager"].free()
    op, inputs, _ = made(block, "eager")()

    def within(event):
        while (event := event.cpu_parent) is not None:
            yield event.name.replace("::", ".").rstrip("_")

    with torch.no_grad():
        op(*inputs)
        with torch.profiler.profile() as profiled:
            op(*inputs)
    seen = Counter(
        name for e in profiled.events()
        if (name := e.name.replace("::", ".").rstrip("_")) in counted and not counted.keys() & set(within(e))
    )  # fmt: skip
    assert seen == counted
    assert {"aten.addmm": 6, "aten.native_layer_norm": 4, "aten.gelu": 2, "aten.cat": 3}.items() <= counted.items()


def rotary_attention(text, image, *weights):
    streams = []
    for qkv, pair in ((text, weights[:2]), (image, weights[2:])):
        tables = torch.zeros(2, qkv.shape[1], 32)
        streams.append(rfkernels.Stream.packed(qkv, *pair, rope=rfkernels.Rope(*tables)))
    return rfkernels.joint_attention(streams)


def partly_normed_attention(text, image, *weights):
    streams = [rfkernels.Stream.packed(text, *weights[:2]), rfkernels.Stream.packed(image, None, weights[3])]
    unused = weights[2].sum() * 0                             # takes a gradient, from no kernel of ours
    return tuple(out + unused for out in rfkernels.joint_attention(streams))


def test_launches_of_the_kernels_are_those_of_their_launchers(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    launched = []

    class Counting:
        def __getitem__(self, grid):
            return lambda *args, **settings: launched.append(grid)

    from rfkernels.adaln import kernels as adaln_kernels
    from rfkernels.flow import kernels as flow_kernels
    from rfkernels.joint_attention import backward_kernels, kernels, prepare_kernels
    from rfkernels.mlp import kernels as mlp_kernels
    from rfkernels.position import kernels as position_kernels
    from rfkernels.qk_norm import kernels as qk_norm_kernels

    for module, names in (
        (adaln_kernels, ("adaln_fwd", "adaln_bwd", "gated_adaln_fwd", "gated_residual_fwd", "gated_residual_bwd",
                         "sum_partials")),
        (kernels, ("key_rstd", "attention_fwd")),
        (backward_kernels, ("attention_bwd_q", "attention_bwd_kv", "sum_rows")),
        (qk_norm_kernels, ("qk_norm_fwd", "qk_norm_bwd")),
        (mlp_kernels, ("gelu_bwd",)),
        (position_kernels, ("patches_to_tokens", "tokens_to_patches", "patch_weight_bwd")),
        (flow_kernels, ("rectified_flow_fwd", "rectified_flow_bwd", "weighted_mse_fwd", "weighted_mse_total",
                        "weighted_mse_bwd", "sum_per_sample")),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, Counting())
    monkeypatch.setattr(prepare_kernels, "prepare_fwd", Counting())
    monkeypatch.setattr(prepare_kernels, "prepare_bwd", Counting())
    rotated = replace(CASES["joint_attention"], contenders={"ours": rotary_attention})
    partly = replace(CASES["joint_attention"], contenders={"ours": partly_normed_attention})
    family = [case for case in CASES.values() if not case.name.startswith("block")]
    for case in (*family, rotated, partly):
        name = case.name
        for backward in (False, True):
            kernels_of_ours = trace(made(case, "ours"), backward=backward).kernels
            count = sum(k.launches for k in kernels_of_ours if k.op.startswith("rfkernels."))
            op, inputs, _ = made(case, "ours")()
            launched.clear()
            with dispatch.as_on_a_gpu(), torch.set_grad_enabled(backward):
                outs = op(*inputs)
                if backward:
                    torch.autograd.grad(outs, inputs, [torch.ones_like(o) for o in outs])
            assert len(launched) == count, (name, backward)


def kernel(kind, reads, writes, flops=0):
    keyed = ({(key,): size for key, size in part.items()} for part in (reads, writes))
    return Kernel("x", kind, flops, *keyed, 1)


def test_a_stretch_reads_what_comes_from_outside_and_writes_what_is_read_after_it():
    product = kernel("matmul", {1: 10}, {2: 20}, 1000)
    moves = (({2: 20, 9: 4}, {3: 20}), ({3: 20}, {4: 20}), ({4: 20}, {5: 6}))
    chain = [kernel("other", *move) for move in moves]
    after = kernel("matmul", {4: 20}, {6: 1}, 1000)
    first, fused, last = stretches([product, *chain, after])
    assert (first, last) == (product, after)
    assert fused.reads == {(2,): 20, (9,): 4} and fused.launches == 1
    assert fused.writes == {(4,): 20, (5,): 6}                # 3 is read inside only; 5 is never read, so a result


def test_a_stretch_reads_each_view_of_a_packed_tensor():
    def norms(qkv):
        q, k, _ = qkv.unbind(1)
        return q * 2 + k

    found = trace(lambda: (norms, [torch.empty(4, 3, 8)], []), backward=False)
    (fused,) = stretches(found.kernels)
    assert sum(fused.reads.values()) == 2 * 4 * 8 * 4 and sum(fused.writes.values()) == 4 * 8 * 4


def test_a_kernel_takes_what_its_busiest_resource_takes():
    assert roofline.seconds(kernel("matmul", {1: 10**6}, {}, 10**12), CEILINGS) == 1e-2
    assert roofline.seconds(kernel("attention", {1: 10**6}, {}, 10**12), CEILINGS) == 2e-2
    assert roofline.seconds(kernel("other", {1: 10**9}, {2: 10**9}), CEILINGS) == 2e-3
    assert roofline.seconds(kernel("other", {1: 8}, {}), CEILINGS) == 2e-6


@pytest.mark.parametrize("step", models.STEPS)
def test_predictions_are_in_order(step):
    found = roofline.predict(Size(4, 256, 8), step, CEILINGS)
    times = [found[way].seconds for way in ("eager", "compiled", "ideal")]
    assert times == sorted(times, reverse=True)
    assert found["ideal"].seconds < found["fused"].seconds < found["eager"].seconds
    assert found["fused"].launches < found["eager"].launches and found["fused"].bytes < found["eager"].bytes
    if step == "training":
        assert found["ideal"].kept < found["fused"].kept < found["eager"].kept


def test_ceilings_of_a_data_sheet_say_that_they_are_assumed(tmp_path):
    ceiling, sheet = roofline.ceilings("h100", tmp_path)
    assert sheet == GPUS["H100 80GB HBM3"] and ceiling.source.startswith("assumed: 70%")
    assert ceiling.matmul == pytest.approx(0.7 * 989e12)
    with pytest.raises(ValueError, match="gpu is 'abacus'; expected one of"):
        roofline.ceilings("abacus", tmp_path)


def test_what_a_gpu_would_run_is_known_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = cases(torch.device("cuda"))
    assert len(found) == len({c.name for c in found}) == 2 * 4 * 11
    for case in found:
        assert {"ours", "eager", "compile", "max-autotune"} <= case.contenders.keys()
        assert case.forward_flops > 0 or case.forward_bytes > 0
    attention = next(c for c in found if c.name.startswith("joint_attention"))
    assert {"flash2", "cudnn", "compile+cudnn"} <= attention.contenders.keys()
    assert {"ours, compiled", "compile", "max-autotune"} <= set(models.names())


def test_ways_to_run_a_model_are_one_function_on_the_same_weights():
    ways = models.contenders(SIZE, CPU, torch.float32)
    inputs = models.inputs(SIZE)
    assert {"ours", "eager", "diffusers"} <= ways.keys()
    with torch.no_grad():
        want = ways["ours"](*inputs)
        for name, model in ways.items():
            torch.testing.assert_close(model(*inputs), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()), msg=name)
    parameters = {id(p) for p in ways["ours"].parameters()}
    assert {id(p) for p in ways["eager"].parameters()} == parameters


@pytest.mark.filterwarnings("ignore:The .grad attribute")       # of the chunks, which dynamo looks at
def test_a_compiler_takes_the_baseline_whole_and_its_gradients_agree(block):
    eager, compiled = (block.contenders["eager"] for _ in range(2))
    inputs = [t.requires_grad_() for t in block.make()]
    wanted = [*inputs, *eager.weights]
    whole = torch.compile(eager.module, backend="aot_eager", fullgraph=True, dynamic=False)

    def gradients(module):
        outs = module(list(inputs[:2]), eager.vectors(inputs[2]), None)
        return torch.autograd.grad(outs, wanted, [torch.ones_like(o) for o in outs])

    for a, b in zip(gradients(whole), gradients(compiled.module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_mixed_dtypes_save_the_casts_around_the_ops():
    """Under autocast: no tensor of the residual stream's size is cast between our ops, which with one dtype it was."""
    size = Size(2, 64, 2)
    mixed, one = (models.counted(size, "training", way, torch.float32, True) for way in ("ours", "ours, one dtype"))
    streams = 2 * size.batch * 128 * (size.tokens + models.TEXT_TOKENS)                   # bytes in bf16, both streams
    casts, before = (sum(k.bytes for k in t.kernels if k.op == "aten._to_copy") for t in (mixed, one))
    assert before - casts > 6 * streams and mixed.launches < one.launches and mixed.bytes < one.bytes
    found = roofline.predict(size, "training", CEILINGS, autocast=True)
    assert found["fused"].seconds < found["one dtype"].seconds < found["eager"].seconds
