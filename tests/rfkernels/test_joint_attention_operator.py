"""Joint attention as a PyTorch operator: registration, compilers, checkpointing, autocast, what is saved and moved."""

import sys
from pathlib import Path

import pytest
import torch

import rfkernels
from rfkernels import Stream
from rfkernels.joint_attention import kernels, launch, library
from rfkernels.joint_attention.layout import flatten
from rfkernels.testing import traffic
from tests.rfkernels.attention_cases import DEVICE, Case

pytest.importorskip("triton", reason="Triton is not installed on this platform")


def flat(case, dtype=torch.float32):
    streams, leaves = case.streams(dtype)
    return *flatten(streams), leaves


@pytest.mark.parametrize(
    "case",
    (
        Case((3, 7)),
        Case((3, 7), silent=(0,), lengths=((3,), (5,))),
        Case((3, 7), packed=False, rope=("i", "h"), q_norm=(True, False)),
    ),
    ids=("normed", "silent-lengths", "rope"),
)
@pytest.mark.filterwarnings("ignore:The .grad attribute")       # opcheck's own
def test_the_operator_passes_opcheck(case):
    tensors, layout, _ = flat(case)
    torch.library.opcheck(torch.ops.rfkernels.joint_attention.default, (tensors, layout, 0.2, 1e-6))
    torch.library.opcheck(torch.ops.rfkernels.joint_layout.default, (tensors, layout, 1e-6))


@pytest.mark.parametrize("case", (Case((3, 7)), Case((3, 7), rope=("i", "i"), silent=(0,))), ids=("normed", "rope"))
def test_compiles_whole_and_its_gradients_are_eagers(case):
    def loss(*qkvs):
        streams = [
            Stream.packed(x, s.q_weight, s.k_weight, s.lengths, s.rope, s.queries)
            for x, s in zip(qkvs, made, strict=True)
        ]
        return sum(o.sin().sum() for o in rfkernels.joint_attention(streams) if o is not None)

    made, leaves = case.streams(torch.float32)
    inputs = [s.packed_tensor for s in made]
    with rfkernels.backend("triton"):
        want = torch.autograd.grad(loss(*inputs), leaves)
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_recompilations_do_not_grow_with_length_or_batch():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight = torch.ones(16, device=DEVICE)

    def attend(*qkvs):
        return rfkernels.joint_attention([Stream.packed(x, weight, weight) for x in qkvs])[0]

    with rfkernels.backend("triton"):
        compiled, counts = torch.compile(attend, fullgraph=True, backend=counter), []
        for batch, text, image in ((2, 3, 4), (2, 5, 7), (3, 6, 8), (4, 2, 9), (5, 9, 3), (6, 10, 12)):
            compiled(*[torch.randn(batch, n, 3, 1, 16, device=DEVICE) for n in (text, image)])
            counts.append(counter.frame_count)
    assert counts[-1] == counts[2] <= 3, "the first shapes, dynamic lengths, a dynamic batch, and no more"


@pytest.mark.parametrize("selective", (False, True))
def test_inside_activation_checkpointing(selective):
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    seen = []

    def policy(context, op, *args, **kwargs):
        seen.append(op)
        keep = op == torch.ops.rfkernels.joint_attention.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    streams, leaves = Case((3, 7)).streams(torch.float32)
    options = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if selective else {}
    with rfkernels.backend("triton"):
        call = lambda *_: rfkernels.joint_attention(streams)[1].sin()  # noqa: E731
        want = torch.autograd.grad(call().sum(), leaves)
        got = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False, **options).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert not selective or torch.ops.rfkernels.joint_attention.default in seen, "the policy sees the operator"


@pytest.mark.parametrize("backend", ("triton", "library"))
def test_under_autocast_q_k_and_v_have_one_dtype(backend):
    """A norm outside leaves q and k in fp32 where v came from a projection in bf16 (SimpleTuner 3002)."""
    q, k, v = torch.randn(3, 1, 5, 2, 16, device=DEVICE)
    with rfkernels.backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        assert rfkernels.joint_attention([Stream(q, k, v.bfloat16())])[0].dtype == torch.bfloat16
        assert rfkernels.joint_attention([Stream.packed(torch.stack((q, k, v), 2))])[0].dtype == torch.bfloat16


def test_saves_its_inputs_its_output_and_two_numbers_a_row():
    streams, leaves = Case((13, 70)).streams(torch.bfloat16)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, rfkernels.backend("triton"):
        outputs = rfkernels.joint_attention(streams)
    known = {t.data_ptr() for t in (*leaves, *outputs)}
    extra = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in known)
    assert extra == 2 * 4 * (13 + 70) * 2, "fp32 log-sum-exp and rstd, per token and head"


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
def test_every_query_key_and_value_is_moved_as_often_as_it_must():
    """Forward: q and out once; k and v once per tile of queries, k once more for its rstd."""
    streams, _ = Case((64, 128), dim=64, heads=1).streams(torch.bfloat16)
    tensors, layout = flatten(streams)
    with traffic() as moved:
        out, *_ = launch.forward(tensors, layout, 0.125, 1e-6)
    q, k, v = (64 * 64 for _ in range(3))
    tiles = 3
    assert moved.loaded(tensors[0]) == q + (tiles + 1) * k + tiles * v
    assert moved.stored(out) == out.numel() and moved.loaded(out) == 0


def test_dispatch_takes_the_kernels_on_a_gpu_and_says_why_not_elsewhere():
    streams, _ = Case((3, 7)).streams(torch.float32)
    told = rfkernels.explain(rfkernels.joint_attention, streams)
    assert told.startswith("joint_attention: triton" if DEVICE == "cuda" else "joint_attention: library"), told
    wide, _ = Case((3, 7), dim=136).streams(torch.float32)
    assert "up to 128, not 136" in rfkernels.explain(rfkernels.joint_attention, wide)
    learned, _ = Case((3, 7), rope=("i", "i")).streams(torch.float32)
    learned[0].rope.cos.requires_grad_()
    assert "no gradient of rotary tables" in rfkernels.explain(rfkernels.joint_attention, learned)


def test_a_gpus_table_says_where_a_library_is_faster_and_forcing_overrules_it(monkeypatch):
    monkeypatch.setattr(library, "measured", lambda *device_and_dim: ("cudnn", 10, 11))
    monkeypatch.setattr(sys.modules["rfkernels.joint_attention.op"], "interpreted", lambda *args: None)
    short, long = (Case(sizes).streams(torch.bfloat16)[0] for sizes in ((3, 6), (3, 7)))
    assert rfkernels.explain(rfkernels.joint_attention, short).startswith("joint_attention: triton")
    told = rfkernels.explain(rfkernels.joint_attention, long)
    assert told.startswith("joint_attention: library") and "faster from 10 tokens, with a backward" in told
    with torch.no_grad():
        assert rfkernels.explain(rfkernels.joint_attention, long).startswith("joint_attention: triton")
    frozen = [Stream(*(t.detach() for t in (s.q, s.k, s.v))) for s in long]
    assert rfkernels.explain(rfkernels.joint_attention, frozen).startswith("joint_attention: triton")
    unmeasured = Case((3, 7)).streams(torch.float32)[0], Case((3, 7), lengths=((2,), (7,))).streams(torch.bfloat16)[0]
    assert all(library.faster(tuple(streams)) is None for streams in unmeasured), "fp32, lengths"
    k = long[0].k
    assert [library.core(*a) for a in ((k, None), (k, torch.ones(1)), (k.float(), None))] == [
        library.cudnn, library.sdpa, library.sdpa
    ]  # fmt: skip
    with rfkernels.backend("triton"):
        assert rfkernels.explain(rfkernels.joint_attention, long).startswith("joint_attention: triton")


def test_sizes_are_not_compiled_in():
    """A text length that is sometimes a multiple of 16 must not compile twice in the middle of a run."""
    backward = sys.modules["rfkernels.joint_attention.backward_kernels"]
    for kernel in (kernels.key_rstd, kernels.attention_fwd, backward.attention_bwd_q, backward.attention_bwd_kv):
        names = [n for n in kernel.arg_names if n in ("total", "queries", "keys") or (n[0] in "QS" and n[1:].isdigit())]
        source = Path(kernel.fn.__code__.co_filename).read_text()
        head = source[: source.index(f"def {kernel.fn.__name__}(")].rsplit("@triton.jit", 1)[1]
        assert len(names) >= 5 and all(f'"{n}"' in head for n in names), kernel.fn.__name__


def test_shapes_without_storage_go_through():
    q, k, v = torch.empty(3, 1, 5, 2, 16, device="meta")
    assert rfkernels.joint_attention([Stream(q, k, v)])[0].shape == (1, 5, 2, 16)


def test_more_samples_than_a_launch_takes_go_elsewhere():
    many = torch.empty(1, 1, 3, 1, 8, device=DEVICE).expand(70_000, 1, 3, 1, 8)
    assert "at most 65535" in rfkernels.explain(rfkernels.joint_attention, [Stream.packed(many)])
