"""patch_embed's and patch_unembed's kernels in Triton's interpreter (on the device where there is one)."""

import pytest
import torch
import torch.nn.functional as F

import rfkernels
from rfkernels.testing import assert_within_rule, nan_filled, traffic
from rfkernels.triton_support import INSTALLED
from tests.rfkernels.paths import kernels

pytestmark = [pytest.mark.skipif(not INSTALLED, reason="Triton is not installed"), pytest.mark.usefixtures("path")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (B, C, H, W, dim, patch): the released models' 64 elements a patch, odd sizes, more than a tile, one pixel a patch
SHAPES = ((2, 16, 8, 12, 96, 2), (1, 3, 6, 6, 20, 3), (3, 33, 4, 10, 136, 2), (2, 5, 3, 7, 24, 1), (1, 16, 2, 2, 8, 2))


def embed(latent, weight, bias, positions, patch):
    return F.conv2d(latent, weight, bias, stride=patch).flatten(2).transpose(1, 2) + positions.to(latent.dtype)


def unembed(x, weight, bias, height, width, patch):
    patches = F.linear(x, weight, bias).transpose(1, 2)                        # [B, (p, p, C), h*w]
    channels = weight.shape[0] // patch**2
    order = torch.arange(weight.shape[0], device=x.device).view(patch, patch, channels).permute(2, 0, 1).flatten()
    return F.fold(patches[:, order], (height, width), patch, stride=patch)


def fused(op, *args, **kwargs):
    with kernels(), nan_filled():
        return op(*args, **kwargs)


def fused_embed(latent, weight, bias, positions, patch):
    return fused(rfkernels.patch_embed, latent, weight, bias, positions, patch_size=patch)


def fused_unembed(x, weight, bias, height, width, patch):
    return fused(rfkernels.patch_unembed, x, weight, bias, height=height, width=width, patch_size=patch)


def gradients(call, inputs, grad):
    out = call(*inputs)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, grad)]


def leaf(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape)).to(DEVICE, dtype).requires_grad_()


def wide(inputs):
    return [t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs]


def embed_inputs(shape, dtype, bias=True):
    b, c, height, width, dim, p = shape
    latent, weight = leaf(b, c, height, width, dtype=dtype), leaf(dim, c, p, p, dtype=dtype, scale=0.2)
    positions = leaf((height // p) * (width // p), dim)
    return [latent, weight, leaf(dim, dtype=dtype) if bias else None, positions, p]


def unembed_inputs(shape, dtype, bias=True):
    b, c, height, width, dim, p = shape
    x = leaf(b, (height // p) * (width // p), dim, dtype=dtype)
    weight = leaf(p * p * c, dim, dtype=dtype, scale=0.2)
    return [x, weight, leaf(p * p * c, dtype=dtype) if bias else None, height, width, p]


OPS = {"embed": (embed_inputs, embed, fused_embed), "unembed": (unembed_inputs, unembed, fused_unembed)}


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "plain"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_agrees_with_fp64(op, shape, dtype, bias):
    made, plain, ours = OPS[op]
    inputs = made(shape, DTYPES[dtype], bias)
    grad = torch.randn_like(plain(*inputs))
    exact = gradients(plain, wide(inputs), grad.double())
    eager, got = gradients(plain, inputs, grad), gradients(ours, inputs, grad)
    for i, (a, b, c) in enumerate(zip(got, exact, eager, strict=True)):
        # Sums over all tokens in fp32: convolution's order on a CPU was up to 2.3 times luckier
        assert_within_rule(f"tensor {i}", a, b, c, factor=3.0 if DTYPES[dtype] == torch.float32 else 2.0)


@pytest.mark.parametrize("op", OPS)
def test_any_strides_in_and_out(op):
    """A latent as an autoencoder leaves it, tokens cut from the joint sequence, expanded and permuted gradients."""
    shape = (2, 16, 8, 12, 96, 2)
    made, plain, ours = OPS[op]
    inputs = made(shape, torch.float32)
    first = inputs[0].detach()
    if op == "embed":
        last = first.to(memory_format=torch.channels_last)
        views = (last, torch.cat([first, first], 1)[:, 8:24], first.mT.clone().mT)
    else:
        views = (torch.cat([first[:, :5], first], 1)[:, 5:], first.transpose(0, 1).contiguous().transpose(0, 1))
    for view in views:
        inputs[0] = view.requires_grad_()
        for use in (lambda y: y.sum(), lambda y: y.mT.sin().cumsum(-1).mean()):
            got, want = (gradients(lambda *a, f=f, use=use: use(f(*a)), inputs, None) for f in (ours, plain))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", range(4))
def test_only_the_gradients_that_are_wanted(frozen):
    inputs = embed_inputs((2, 16, 8, 12, 96, 2), torch.float32)
    grad = torch.randn(2, 24, 96, device=DEVICE)
    want = gradients(fused_embed, inputs, grad)
    inputs[frozen] = inputs[frozen].detach()
    got = gradients(fused_embed, inputs, grad)
    del want[frozen + 1]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)     # without the weight's, PyTorch sums for the bias
    inputs = unembed_inputs((2, 16, 8, 12, 96, 2), torch.float32)
    if frozen < 3:
        grad = torch.randn(2, 16, 8, 12, device=DEVICE)
        want = gradients(fused_unembed, inputs, grad)
        inputs[frozen] = inputs[frozen].detach()
        del want[frozen + 1]
        assert all(torch.equal(a, b) for a, b in zip(gradients(fused_unembed, inputs, grad), want, strict=True))


def test_the_inverse_undoes_an_orthogonal_embedding():
    """dim = K and an orthogonal weight: unembedding with its transpose, in the other order, gives the latent back."""
    latent, p = torch.randn(2, 4, 6, 8, device=DEVICE), 2
    q, _ = torch.linalg.qr(torch.randn(16, 16))
    q = q.to(DEVICE)
    tokens = fused_embed(latent, q.view(16, 4, p, p), None, torch.zeros(12, 16, device=DEVICE), p)
    back = q.t().reshape(4, p, p, 16).permute(1, 2, 0, 3).reshape(16, 16)
    torch.testing.assert_close(fused_unembed(tokens, back, None, 6, 8, p), latent, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter moves")
@pytest.mark.triton_only
def test_tokens_move_once():
    """Of the large side nothing is read or written twice, forward or backward."""
    latent, weight, bias, positions, p = (t.detach() if isinstance(t, torch.Tensor) else t for t in
                                          embed_inputs((2, 16, 8, 16, 256, 2), torch.float32))  # fmt: skip
    embed_op, unembed_op = torch.ops.rfkernels.patch_embed, torch.ops.rfkernels.patch_unembed
    with traffic() as moved:
        y = embed_op(latent, weight, bias, positions, p, torch.float32)
    assert moved.stored(y) == y.numel() and moved.loaded(positions) == y.numel()
    dy = torch.randn_like(y)
    with traffic() as moved:
        torch.ops.rfkernels.patch_embed_backward(dy, latent, weight, False, True, True, p)
    assert moved.loaded(dy) == dy.numel()
    out = weight.flatten(1).t().contiguous()
    with traffic() as moved:
        z = unembed_op(y, out, None, 8, 16, p)
    assert moved.loaded(y) == y.numel() and moved.stored(z) == z.numel()
    with traffic() as moved:
        dx, _ = torch.ops.rfkernels.patch_unembed_backward(z, y, out, True, True, p)
    assert moved.loaded(y) == y.numel() and moved.stored(dx) == dx.numel()


def test_autocast_and_the_same_bits_when_repeated():
    inputs = embed_inputs((2, 16, 8, 12, 96, 2), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        first, again = (gradients(lambda *a: fused_embed(*a).float().sum(), inputs, None) for _ in range(2))
        assert fused_embed(*inputs).dtype == torch.float32, "the positions are, as after a convolution"
        assert fused_embed(*inputs[:3], inputs[3].bfloat16(), inputs[4]).dtype == torch.bfloat16
        assert fused_unembed(*unembed_inputs((2, 16, 8, 12, 96, 2), torch.float32)).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [t.dtype for t in first] == [torch.float32] * 5


@pytest.mark.filterwarnings("ignore:The .grad attribute")       # opcheck's own
def test_operators_compile_and_are_registered_rightly():
    inputs, other = embed_inputs((2, 4, 4, 6, 16, 2), torch.float32), unembed_inputs((2, 4, 4, 6, 16, 2), torch.float32)
    torch.library.opcheck(torch.ops.rfkernels.patch_embed.default, (*inputs, torch.bfloat16))
    torch.library.opcheck(torch.ops.rfkernels.patch_unembed.default, tuple(other))

    def through(latent, weight, bias, positions, patch):
        with kernels():
            y = rfkernels.patch_embed(latent, weight, bias, positions, patch_size=patch)
            return rfkernels.patch_unembed(y.sin(), weight.flatten(1).t(), None, height=4, width=6, patch_size=patch)

    compiled = torch.compile(through, backend="aot_eager", fullgraph=True)
    grad = torch.randn(2, 4, 4, 6, device=DEVICE)
    for a, b in zip(gradients(compiled, inputs, grad), gradients(through, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input_is_named():
    latent, weight, bias, positions, p = embed_inputs((2, 4, 4, 6, 16, 2), torch.float32)
    with pytest.raises(TypeError, match=r"weight has dtype torch\.bfloat16; expected torch\.float32"):
        rfkernels.patch_embed(latent, weight.bfloat16(), bias, positions, patch_size=p)
    x, weight, bias, height, width, p = unembed_inputs((2, 4, 4, 6, 16, 2), torch.float32)
    for match, change in (
        ("x has 6 tokens; expected 4, the patches of 4 x 4", {"width": 4}),
        ("width is 5; expected a multiple of patch_size = 2", {"width": 5}),
        ("weight has shape .16, 15.; expected a multiple of 4 rows and 16 columns", {"weight": weight[:, :15]}),
        ("bias has shape .15.; expected .16.", {"bias": bias[:15]}),
    ):
        given = {"x": x, "weight": weight, "bias": bias, "height": height, "width": width, "patch_size": p, **change}
        with pytest.raises(ValueError, match=match):
            rfkernels.patch_unembed(**given)
