"""The Triton kernels of joint attention: on a GPU where there is one, in Triton's interpreter elsewhere."""

import sys
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

import rfkernels
from rfkernels import Rope, Stream
from rfkernels.joint_attention import launch, library
from rfkernels.joint_attention.layout import flatten
from rfkernels.joint_attention.reference import rotate
from rfkernels.testing import assert_within_rule, nan_filled, traffic

pytest.importorskip("triton", reason="Triton is not installed on this platform")
# In fp16 the backward's rows for keys beyond a stream's end may overflow; nothing reads them, and zeros are stored.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in cast"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Case:
    """Inputs of one call, in fp64; `streams` makes what the op takes, in a dtype, with leaves that need gradients."""

    sizes: tuple[int, ...]
    dim: int = 32
    heads: int = 2
    batch: int = 1
    q_norm: bool | tuple[bool, ...] = True
    k_norm: bool | tuple[bool, ...] = True
    weight: float = 1.0
    lengths: tuple | None = None
    rope: tuple = ()
    silent: tuple[int, ...] = ()
    packed: bool = True
    scale: float | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def __post_init__(self):
        randn = lambda *shape: torch.randn(shape, generator=self.generator, dtype=torch.float64).to(DEVICE)  # noqa: E731
        each = lambda flag: flag if isinstance(flag, tuple) else (flag,) * len(self.sizes)  # noqa: E731
        self.qkv = [randn(self.batch, s, 3, self.heads, self.dim) for s in self.sizes]
        self.weights = [
            [(1 + randn(self.dim) / 4) * self.weight if on else None for on in norms]
            for norms in zip(each(self.q_norm), each(self.k_norm), strict=True)
        ]
        self.angles = [randn(s, self.dim // 2) * 2 for s in self.sizes]
        self.grads = [randn(self.batch, s, self.heads, self.dim) for s in self.sizes]

    def streams(self, dtype):
        made, leaves = [], []
        leaf = lambda t: None if t is None else t.to(dtype).requires_grad_()  # noqa: E731
        for i, (qkv, weights, angles) in enumerate(zip(self.qkv, self.weights, self.angles, strict=True)):
            weights = [leaf(w) for w in weights]
            lengths = None if self.lengths is None else torch.tensor(self.lengths[i], device=DEVICE)
            asks = i not in self.silent
            wide = torch.promote_types(dtype, torch.float32)
            kind = self.rope[i] if self.rope else None
            rope = Rope(angles.cos().to(wide), angles.sin().to(wide), kind == "i") if kind else None
            if self.packed:
                parts = [leaf(qkv if asks else qkv[:, :, 1:])]
                made.append(Stream.packed(parts[0], *weights, lengths, rope, asks))
            else:
                parts = [leaf(t) for t in (t.transpose(1, 2).contiguous() for t in qkv.unbind(2))]
                q, k, v = (t.transpose(1, 2) for t in parts)
                made.append(Stream(q if asks else None, k, v, *weights, lengths, rope, asks))
                parts = parts if asks else parts[1:]
            leaves += [*parts, *[w for w in weights if w is not None and (asks or w is not weights[0])]]
        return made, leaves


def run(case, dtype, function):
    streams, leaves = case.streams(dtype)
    with nan_filled():
        outputs = [o for o in function(streams, case.scale) if o is not None]
        grads = [g.to(dtype) for i, g in enumerate(case.grads) if i not in case.silent]
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def on(backend):
    def function(streams, scale):
        with rfkernels.backend(backend):
            return rfkernels.joint_attention(streams, scale=scale)

    return function


def eager(streams, scale):
    """As a careful user writes it, in the inputs' dtype: norm, rotate, concatenate, softmax, split."""
    def seen(x, weight, rope):
        x = x if weight is None else F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight
        return x if rope is None else rotate(x, rope)

    asking = [s for s in streams if s.queries]
    q = torch.cat([seen(s.q, s.q_weight, s.rope) for s in asking], 1).transpose(1, 2)
    k = torch.cat([seen(s.k, s.k_weight, s.rope) for s in streams], 1).transpose(1, 2)
    v = torch.cat([s.v for s in streams], 1).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if streams[0].lengths is not None:
        mask = torch.cat([s.valid() for s in streams], 1)[:, None, None]
        scores = scores.masked_fill(~mask, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0)
    outputs = iter((p @ v).transpose(1, 2).split([s.k.shape[1] for s in asking], 1))
    outputs = [next(outputs) if s.queries else None for s in streams]
    padded = zip(outputs, streams, strict=True)
    return [o if o is None or s.lengths is None else o * s.valid()[..., None, None] for o, s in padded]


def check(case, dtype=torch.float32):
    """Outputs and all gradients under the error rule."""
    got = run(case, dtype, on("triton"))
    exact, rough = run(case, torch.float64, on("reference")), run(case, dtype, eager)
    for i, (a, b, c) in enumerate(zip(got, exact, rough, strict=True)):
        assert_within_rule(f"tensor {i}", a, b, c)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", ((154, 256), (77, 64), (1, 1), (13, 130)), ids=str)
def test_two_streams(sizes, dtype):
    check(Case(sizes, dim=64, heads=1, batch=1 if sizes == (154, 256) else 2), DTYPES[dtype])


@pytest.mark.parametrize("rope", ((), ("i", "h")))
def test_the_same_bits_when_repeated(rope):
    case = Case((13, 70), batch=2, rope=rope, lengths=((13, 2), (70, 65)))
    for a, b in zip(check(case, torch.bfloat16), run(case, torch.bfloat16, on("triton")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normed", (False, True))
@pytest.mark.parametrize("sizes", ((70,), (5, 66, 3), (4, 70, 1, 9)), ids=str)
def test_one_to_four_streams(sizes, normed):
    check(Case(sizes, q_norm=normed, k_norm=normed), torch.bfloat16)


@pytest.mark.parametrize("dim", (32, 64, 96, 128, 16, 40))
@pytest.mark.parametrize("normed", (False, True))
def test_head_dimensions(dim, normed):
    check(Case((9, 67), dim=dim, q_norm=normed, k_norm=normed), torch.bfloat16)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("normed", (False, True))
def test_lengths_per_sample_including_none_at_all(packed, normed):
    lengths = ((0, 13, 5), (130, 0, 65))
    case = Case((13, 130), heads=1, batch=3, lengths=lengths, packed=packed, q_norm=normed, k_norm=normed)
    text, image, *_ = check(case)
    assert not text[0].any() and not image[1].any() and not text[2, 5:].any() and text[2, :5].all()


def test_a_sample_without_any_key_gives_zeros():
    got = check(Case((13, 70), batch=2, lengths=((0, 13), (0, 70))), torch.bfloat16)
    assert all(not t[0].any() for t in got if t.ndim > 1)


def test_padding_is_never_read():
    case = Case((13, 70), batch=2, lengths=((5, 13), (70, 66)))
    clean = run(case, torch.float32, on("triton"))
    for qkv, valid in zip(case.qkv, case.lengths, strict=True):
        for b, n in enumerate(valid):
            qkv[b, n:] = float("nan")
    for a, b in zip(clean, run(case, torch.float32, on("triton")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", (1.0, 2.0, 6.0, 12.0))
def test_norm_weights_on_both_sides_of_the_switch(weight, dtype):
    """The bound of a row's scores is its length, near sqrt(32) w^2: the limits are 65 nats in bf16, 43 in
    fp32, 10 in fp16."""
    check(Case((13, 70), weight=weight), DTYPES[dtype])


@pytest.mark.parametrize("rows_above", (False, True))
def test_the_switch_is_where_it_says(rows_above, monkeypatch):
    """With a limit just below or above every row's bound the other path runs; both within the rule."""
    case = Case((13, 70))
    monkeypatch.setitem(launch.EXPONENTS, torch.bfloat16, (64.0, 0.01 if rows_above else 1e9))
    check(case, torch.bfloat16)


def test_a_row_far_below_its_bound_keeps_its_digits():
    """Scores all near minus the bound: the shift that replaces the maximum is twice the bound too high. Outputs only:
    queries as parallel as these have gradients that cancel to noise in any bf16 implementation."""
    case = Case((3, 70), weight=2.5)
    for i in range(2):
        case.weights[i] = [w.abs() for w in case.weights[i]]
        case.qkv[i][:, :, 0] = 1 + case.qkv[i][:, :, 0] / 100
        case.qkv[i][:, :, 1] = -1 + case.qkv[i][:, :, 1] / 100
    for dtype in DTYPES.values():
        got = run(case, dtype, on("triton"))[:2]
        exact, rough = run(case, torch.float64, on("reference"))[:2], run(case, dtype, eager)[:2]
        for i, (a, b, c) in enumerate(zip(got, exact, rough, strict=True)):
            assert_within_rule(f"output {i}", a, b, c)


@pytest.mark.parametrize("q_norm, k_norm", (((True, False), (True, False)), (False, True), (True, False)))
def test_norms_that_not_every_stream_has(q_norm, k_norm):
    check(Case((13, 70), q_norm=q_norm, k_norm=k_norm), torch.bfloat16)


@pytest.mark.parametrize("dim", (32, 96))
@pytest.mark.parametrize("normed", (False, True))
@pytest.mark.parametrize("rope", (("i", "i"), ("h", "h"), (None, "i")))
def test_rotary_embeddings(rope, normed, dim):
    check(Case((13, 70), dim=dim, rope=rope, q_norm=normed, k_norm=normed), torch.bfloat16)
    if dim == 32:
        check(Case((13, 70), dim=dim, rope=rope, q_norm=normed, k_norm=normed))


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("rope", ((), ("i", "i")))
def test_streams_without_queries(packed, rope):
    check(Case((13, 70), silent=(0,), packed=packed, rope=rope))


def test_no_stream_asks():
    streams, _ = Case((13, 70), silent=(0, 1)).streams(torch.float32)
    assert on("triton")(streams, None) == (None, None)


def test_strided_views_and_scale():
    check(Case((13, 70), packed=False, scale=0.3), torch.bfloat16)


def test_a_zero_in_a_norm_weight_has_a_gradient():
    case = Case((13, 70))
    case.weights[1][1][3] = 0
    case.weights[0][0][5] = 0
    *_, dk_weight = check(case)
    assert dk_weight[3] != 0


@pytest.mark.parametrize("use", (lambda o: o.sum(), lambda o: o.mT.sin().flatten().cumsum(0).mean()), ids=("sum", "mT"))
def test_expanded_and_transposed_gradients(use):
    def gradients(backend):
        streams, leaves = Case((13, 70)).streams(torch.float32)
        with rfkernels.backend(backend), nan_filled():
            return torch.autograd.grad(sum(use(o) for o in rfkernels.joint_attention(streams)), leaves)

    for a, b in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_queries_of_a_silent_packed_stream_get_zeros():
    case = Case((13, 70))
    (text, image), leaves = case.streams(torch.float32)
    silent = Stream.packed(text.packed_tensor, text.q_weight, text.k_weight, queries=False)
    with rfkernels.backend("triton"), nan_filled():
        _, out = rfkernels.joint_attention([silent, image])
        dqkv, dq_weight, dk_weight, *_ = torch.autograd.grad(out.sum(), leaves)
    assert not dqkv[:, :, 0].any() and not dq_weight.any() and dqkv[:, :, 1:].any() and dk_weight.any()


def test_weights_and_lengths_of_different_dtypes_mix():
    case = Case((13, 70), batch=2, lengths=((13, 5), (70, 66)))
    def mixed(streams, scale):
        text, image = streams
        image.q_weight, image.k_weight = image.q_weight.double().float(), image.k_weight.double().float()
        image.lengths = image.lengths.int()
        with rfkernels.backend("triton"):
            return rfkernels.joint_attention([text, image], scale=scale)

    for a, b in zip(run(case, torch.bfloat16, mixed), run(case, torch.bfloat16, on("triton")), strict=True):
        assert torch.equal(a, b)


def test_empty_streams():
    got = run(Case((0, 5)), torch.float32, on("triton"))
    want = run(Case((0, 5)), torch.float32, on("reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_a_packed_projection_is_one_tensor_written_in_place():
    case = Case((13, 70))
    streams, leaves = case.streams(torch.float32)
    with rfkernels.backend("triton"):
        outputs = rfkernels.joint_attention(streams)
    node = outputs[0].grad_fn
    kinds = {type(n).__name__ for n in (node, *[f for f, _ in node.next_functions if f])}
    assert kinds == {"DirectBackward", "AccumulateGrad"}, "no unbind, no stack"
    dqkv, *_ = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    assert dqkv.is_contiguous() and dqkv.shape == leaves[0].shape


@pytest.mark.parametrize(
    "case",
    (
        Case((13, 70)),
        Case((13, 70), silent=(0,), lengths=((5,), (66,)), packed=False),
        Case((13, 70), rope=("i", "h"), q_norm=(True, False)),
        Case((70,)),
        Case((13, 70), q_norm=False, k_norm=False),
    ),
    ids=("normed", "silent-lengths", "rope", "one-stream", "plain"),
)
def test_the_library_path_writes_the_joint_layout_in_kernels(case, monkeypatch):
    plain = run(case, torch.float32, on("library"))
    if DEVICE == "cpu":
        assert "interpreter" in library.refuses_fused(case.streams(torch.float32)[0]) or len(case.sizes) == 1
        monkeypatch.setattr(library, "interpreted", lambda *args: None)
        assert library.refuses_fused(case.streams(torch.float32)[0]) is None
    got = run(case, torch.float32, on("library"))
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# --- As an operator ---------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(library, "measured", lambda *device_and_dim: ("cudnn", 10))
    monkeypatch.setattr(sys.modules["rfkernels.joint_attention.op"], "interpreted", lambda *args: None)
    short, long = (Case(sizes).streams(torch.float32)[0] for sizes in ((3, 6), (3, 7)))
    assert rfkernels.explain(rfkernels.joint_attention, short).startswith("joint_attention: triton")
    told = rfkernels.explain(rfkernels.joint_attention, long)
    assert told.startswith("joint_attention: library") and "faster from 10 tokens" in told
    assert library.core(long[0].k, None) is library.cudnn and library.core(long[0].k, torch.ones(1)) is library.sdpa
    with rfkernels.backend("triton"):
        assert rfkernels.explain(rfkernels.joint_attention, long).startswith("joint_attention: triton")
