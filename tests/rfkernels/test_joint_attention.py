import pytest
import torch
import torch.nn.functional as F

import rfkernels
from rfkernels import Rope, Stream

pytest.importorskip("diffusers", reason="diffusers is the reference here")
from diffusers.models.embeddings import apply_rotary_emb

BACKENDS = ("reference", "library")


def tensors(*shape, count=3, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


def one_sample(streams, b, eps=1e-6):
    """Joint attention of sample b by definition: loops over heads, only valid tokens, no mask."""
    parts = []
    for s in streams:
        n = s.k.shape[1] if s.lengths is None else int(s.lengths[b])
        q, k = s.q[b, :n], s.k[b, :n]
        if s.q_weight is not None:
            q = F.rms_norm(q, q.shape[-1:], s.q_weight, eps)
            k = F.rms_norm(k, k.shape[-1:], s.k_weight, eps)
        parts.append((q, k, s.v[b, :n]))
    keys, values = torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    outputs = []
    for q, _, _ in parts:
        heads = [
            torch.softmax(q[:, h] @ keys[:, h].T / q.shape[-1] ** 0.5, -1) @ values[:, h] for h in range(q.shape[1])
        ]
        outputs.append(torch.stack(heads, 1))
    return outputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", ([13, 30], [1, 1], [13], [4, 3, 2, 1]), ids=str)
@pytest.mark.parametrize("normed", (False, True))
@pytest.mark.parametrize("padded", (False, True))
def test_every_query_sees_the_keys_of_all_streams(backend, lengths, normed, padded):
    streams, leaves = [], []
    for length in lengths:
        q, k, v = tensors(2, length, 3, 8)
        weights = tensors(8, count=2) if normed else [None, None]
        valid = torch.tensor([length, (length + 1) // 2]) if padded else None
        streams.append(Stream(q, k, v, *weights, valid))
        leaves += [t for t in (q, k, v, *weights) if t is not None]
    with rfkernels.backend(backend):
        got = rfkernels.joint_attention(streams)
    want = [torch.zeros_like(s.q) for s in streams]
    for b in range(2):
        for i, out in enumerate(one_sample(streams, b)):
            want[i] = want[i].index_put((torch.tensor(b), torch.arange(len(out))), out)
    grads = [torch.randn_like(g) for g in got]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    for g, w in zip(
        torch.autograd.grad(got, leaves, grads), torch.autograd.grad(want, leaves, grads), strict=True
    ):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_without_any_key_gives_zeros_and_finite_gradients(backend):
    q, k, v = tensors(2, 4, 2, 8)
    with rfkernels.backend(backend):
        (out,) = rfkernels.joint_attention([Stream(q, k, v, lengths=torch.tensor([0, 4]))])
    assert (out[0] == 0).all() and out[1].abs().min() > 0
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all() and (grad[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_without_queries_gives_keys_and_values_only(backend):
    text, image = tensors(2, 5, 2, 8), tensors(2, 7, 2, 8)
    with rfkernels.backend(backend):
        full = rfkernels.joint_attention([Stream(*text), Stream(*image)])
        some = rfkernels.joint_attention([Stream(None, *text[1:], queries=False), Stream(*image)])
        none = rfkernels.joint_attention([Stream(None, *text[1:], queries=False)])
    assert some[0] is None and none == (None,)
    torch.testing.assert_close(some[1], full[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", (True, False))
def test_rotary_embedding_equals_diffusers(backend, interleaved):
    q, k, v = tensors(2, 6, 2, 8, dtype=torch.float32)
    angles = torch.rand(6, 4) * 3
    rope = Rope(angles.cos(), angles.sin(), interleaved)
    if interleaved:
        wide = tuple(t.repeat_interleave(2, -1) for t in rope[:2])
        turned = [apply_rotary_emb(t.transpose(1, 2), wide).transpose(1, 2) for t in (q, k)]
    else:
        wide = tuple(torch.cat([t, t], -1) for t in rope[:2])
        turned = [apply_rotary_emb(t.transpose(1, 2), wide, use_real_unbind_dim=-2).transpose(1, 2) for t in (q, k)]
    with rfkernels.backend(backend):
        (got,) = rfkernels.joint_attention([Stream(q, k, v, rope=rope)])
        (want,) = rfkernels.joint_attention([Stream(*turned, v)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_projection_and_scale(backend):
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64)
    q, k, v = (t.contiguous() for t in qkv.unbind(2))
    with rfkernels.backend(backend):
        (packed,) = rfkernels.joint_attention([Stream.packed(qkv)], scale=0.3)
        (scaled,) = rfkernels.joint_attention([Stream(q * 0.3 * 8**0.5, k, v)])
    torch.testing.assert_close(packed, scaled)


def test_keys_and_values_may_come_packed_alone():
    kv, q = torch.randn(2, 5, 2, 2, 8, dtype=torch.float64), tensors(2, 4, 2, 8)
    text = Stream.packed(kv, queries=False)
    _, got = rfkernels.joint_attention([text, Stream(*q)])
    _, want = rfkernels.joint_attention([Stream(None, *kv.unbind(2), queries=False), Stream(*q)])
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=r"shape \[2, 5, 2, 2, 8\]; expected \[B, S, 3, H, D\]"):
        Stream.packed(kv)


def test_compiles_whole_on_the_library():
    qkv = torch.randn(2, 5, 3, 2, 8)
    with rfkernels.backend("library"):
        attend = lambda x: rfkernels.joint_attention([Stream.packed(x)])[0]  # noqa: E731
        torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(qkv), attend(qkv))


# --- Statistics -------------------------------------------------------------------------------------------------------


def scores_of(streams):
    """All scores [B, H, queries, keys] and the keys that exist, by definition."""
    q, k = (
        torch.cat([F.rms_norm(x, x.shape[-1:], w, 1e-6) for x, w in pairs], 1)
        for pairs in ([(s.q, s.q_weight) for s in streams], [(s.k, s.k_weight) for s in streams])
    )
    return torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5


def test_statistics_of_all_rows_are_those_of_the_definition():
    make = lambda *shape, count=3: tensors(*shape, count=count, dtype=torch.float32)  # noqa: E731
    streams = [Stream(*make(2, n, 3, 8), *make(8, count=2)) for n in (5, 9)]
    found = rfkernels.attention_statistics(streams, rows=9)
    scores = scores_of(streams)
    p = scores.softmax(-1)
    torch.testing.assert_close(found.max_logit, scores.max().detach())
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(-1).mean().detach())
    assert found.bound >= found.max_logit


def test_statistics_leave_padding_out():
    lengths = torch.tensor([3, 0])
    q, k, v = tensors(2, 6, 2, 8, dtype=torch.float32)
    long = rfkernels.attention_statistics([Stream(q * 1e3, k * 1e3, v, lengths=lengths), Stream(q, k, v)])
    cut = [Stream(q[:1, :3] * 1e3, k[:1, :3] * 1e3, v[:1, :3]), Stream(q[:1], k[:1], v[:1])]
    assert long.max_logit == rfkernels.attention_statistics(cut).max_logit
    nothing = rfkernels.attention_statistics([Stream(q, k, v, lengths=lengths * 0)])
    assert nothing.entropy.isnan() and nothing.max_logit == -torch.inf


def test_uniform_attention_has_the_largest_entropy_and_a_sharp_one_none():
    q, k, v = tensors(1, 16, 1, 8, dtype=torch.float32)
    flat = rfkernels.attention_statistics([Stream(q * 0, k, v)])
    torch.testing.assert_close(flat.entropy, torch.tensor(16.0).log())
    assert rfkernels.attention_statistics([Stream(k * 100, k, v)]).entropy < 1e-3


def test_observing_a_model_gives_one_entry_a_layer():
    from mmdit import MMDiT, presets

    config = presets.by_depth(3, heads=1, qk_norm=True)
    model = MMDiT(config)
    model.init_weights()
    latent = torch.randn(1, config.in_channels, 4, 4)
    inputs = (latent, torch.rand(1), torch.randn(1, 3, config.context_dim), torch.randn(1, config.pooled_dim))
    with torch.no_grad(), rfkernels.observe_attention(rows=4) as layers:
        model(*inputs)
    model(*inputs)
    assert len(layers) == 3 and all(layer.max_logit <= layer.bound * 1.001 for layer in layers)
