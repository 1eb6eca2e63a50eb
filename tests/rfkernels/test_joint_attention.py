import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb

import rfkernels
from rfkernels import Rope, Stream

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
