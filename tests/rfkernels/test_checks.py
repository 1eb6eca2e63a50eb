"""Bad arguments raise an error that names the argument; good ones never do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rfkernels
from rfkernels import Stream

sizes = st.integers(1, 5)


@settings(max_examples=150, deadline=None)
@given(b=sizes, s=sizes, c=sizes, shape=st.lists(sizes, max_size=4), name=st.sampled_from(["shift", "scale"]))
def test_modulation_is_accepted_exactly_when_its_rank_and_shape_fit(b, s, c, shape, name):
    x = torch.randn(b, s, c)
    vectors = {"shift": torch.randn(b, c), "scale": torch.randn(b, c), name: torch.randn(shape)}
    if tuple(shape) in ((c,), (1, c), (b, c), (1, 1, c), (b, 1, c), (1, s, c), (b, s, c)):
        assert rfkernels.adaln(x, **vectors).shape == x.shape
    else:
        with pytest.raises(ValueError, match=rf"adaln: {name} has shape .*; expected"):
            rfkernels.adaln(x, **vectors)


@settings(max_examples=100, deadline=None)
@given(
    b=sizes, s=sizes, h=sizes, d=sizes, which=st.sampled_from("qkv"), axis=st.integers(0, 3), change=st.integers(-1, 2)
)
def test_stream_wants_q_k_v_of_one_shape(b, s, h, d, which, axis, change):
    shape = [b, s, h, d]
    tensors = {name: torch.randn(shape) for name in "qkv"}
    shape[axis] = max(0, shape[axis] + change)
    tensors[which] = torch.randn(shape)
    if tensors[which].shape == (b, s, h, d):
        Stream(**tensors)
    else:
        with pytest.raises(ValueError, match=r"Stream: [qv] has shape"):
            Stream(**tensors)


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(-16, 80), width=st.integers(-16, 80), dim=st.integers(0, 24), most=st.sampled_from([16, 32, 64])
)
def test_position_grid_is_accepted_exactly_when_it_fits(height, width, dim, most):
    def grid():
        return rfkernels.position_grid(height, width, dim, resolution=32, max_height=most, max_width=most)

    fits = all(0 < v <= most and v % 16 == 0 for v in (height, width)) and dim > 0 and dim % 4 == 0
    if fits:
        assert grid().shape == (height // 16 * (width // 16), dim)
    else:
        with pytest.raises(ValueError, match=r"position_grid: (height|width|dim) is"):
            grid()


X, V, H = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 3, 2, 4)
W = torch.randn(4)
BAD = {
    "x-int": (lambda: rfkernels.adaln(X.long(), V, V), TypeError, "adaln: x has dtype torch.int64"),
    "x-list": (lambda: rfkernels.adaln([1.0], V, V), TypeError, "adaln: x is list"),
    "x-rank": (lambda: rfkernels.adaln(X[0], V, V), ValueError, r"adaln: x has shape \[3, 8\]; expected \[B, S, C\]"),
    "x-device": (lambda: rfkernels.adaln(X.to("meta"), V, V), ValueError, "adaln: shift is on cpu; expected meta"),
    "norm": (lambda: rfkernels.adaln(X, V, V, norm="batch"), ValueError, "adaln: norm is 'batch'; expected one of"),
    "eps": (lambda: rfkernels.adaln(X, V, V, eps=0.0), ValueError, "adaln: eps is 0.0"),
    "eps-type": (lambda: rfkernels.adaln(X, V, V, eps="1"), TypeError, "adaln: eps is str"),
    "branch": (lambda: rfkernels.gated_residual(X, X[:, :2], V), ValueError, "gated_residual: branch has shape"),
    "branch-dtype": (lambda: rfkernels.gated_adaln(X, X.long(), V, V, V), TypeError, "gated_adaln: branch has dtype"),
    "dtype": (lambda: rfkernels.adaln(X, V, V, dtype=torch.int8), ValueError, "adaln: dtype is torch.int8; expected"),
    "norm-weight": (lambda: rfkernels.adaln(X, V, V, weight=V[:, :3]), ValueError, "adaln: weight has shape"),
    "k-dim": (lambda: rfkernels.qk_norm(H, H[..., :2], W, W), ValueError, "qk_norm: k has head dimension 2"),
    "weight": (lambda: rfkernels.qk_norm(H, H, W, W[:2]), ValueError, "qk_norm: k_weight has shape"),
    "no-q": (lambda: Stream(None, H, H), ValueError, "Stream: q is None"),
    "lengths": (lambda: Stream(H, H, H, lengths=torch.ones(2)), TypeError, "Stream: lengths has dtype torch.float32"),
    "packed": (lambda: Stream.packed(H), ValueError, r"Stream.packed: qkv has shape .* expected \[B, S, 3, H, D\]"),
    "streams": (lambda: rfkernels.joint_attention(Stream(H, H, H)), TypeError, "joint_attention: streams is Stream"),
    "streams-0": (lambda: rfkernels.joint_attention([]), ValueError, "joint_attention: streams has 0 entries"),
    "heads": (
        lambda: rfkernels.joint_attention([Stream(H, H, H), Stream(*[H[:, :, :1]] * 3)]),
        ValueError,
        r"joint_attention: streams\[1\] has k of shape",
    ),
    "turned": (
        lambda: rfkernels.joint_attention([Stream(H, H, H), Stream(*[H[:, :, :1]] * 3)]),
        ValueError,
        r"expected batch 2, 2 heads of 4, as streams\[0\]; if these are \[B, H, S, D\], transpose\(1, 2\) them",
    ),
    "turned-rope": (
        lambda: Stream(*[H.transpose(1, 2)] * 3, rope=(torch.ones(3, 2), torch.ones(3, 2))),
        ValueError,
        r"rope.cos has shape \[3, 2\]; expected \[2, 2\] .*; k has shape .*, which looks like \[B, H, S, D\]",
    ),
    "rope-twice": (
        lambda: Stream(H, H, H, rope=(torch.ones(3, 4), torch.ones(3, 4))),
        ValueError,
        r"of a table that has each angle twice, pass \[..., ::2\] \(interleaved\)",
    ),
    "rope-kind": (lambda: Stream(H, H, H, rope=W), TypeError, "Stream: rope is Tensor; expected a Rope or its"),
    "dtypes": (
        lambda: rfkernels.joint_attention([Stream(H, H, H), Stream(*[H.half()] * 3)]),
        TypeError,
        r"joint_attention: streams\[1\].k has dtype",
    ),
    "patch": (
        lambda: rfkernels.patch_embed(torch.randn(1, 3, 5, 4), torch.randn(8, 3, 2, 2), None, torch.randn(4, 8)),
        ValueError,
        "patch_embed: latent has shape",
    ),
    "positions": (
        lambda: rfkernels.patch_embed(torch.randn(1, 3, 4, 4), torch.randn(8, 3, 2, 2), None, torch.randn(3, 8)),
        ValueError,
        "patch_embed: positions has shape",
    ),
    "w2": (lambda: rfkernels.gelu_mlp(X, X[0].new_ones(16, 8), None, torch.ones(8, 15), None), ValueError, "mlp: w2"),
    "fc1": (lambda: rfkernels.gelu_mlp(X, W, W), TypeError, "gelu_mlp: fc1 is Tensor; expected a linear layer"),
    "mlp-arguments": (lambda: rfkernels.gelu_mlp(X, W), TypeError, "gelu_mlp: got 1 arguments after x"),
    "noise": (lambda: rfkernels.rectified_flow(X, X[:1], V[:, 0]), ValueError, "rectified_flow: noise has shape"),
    "t-bf16": (lambda: rfkernels.rectified_flow(X, X, V[:, 0].bfloat16()), TypeError, "rectified_flow: t has dtype"),
    "loss-weight": (lambda: rfkernels.weighted_mse(X, X, torch.ones(3)), ValueError, "weighted_mse: weight has shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_message_names_the_argument(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
