"""The modules of rfkernels.nn: the functions of PyTorch's, on parameters with the field's names, by the fused ops."""

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import rfkernels
import rfkernels.nn as rnn
from rfkernels import Rope

pytest.importorskip("diffusers", reason="diffusers is the reference here")
from diffusers.models.embeddings import PatchEmbed as DiffusersPatchEmbed

C, HEADS = 32, 2


def test_each_module_takes_its_op(taken):
    x, v = torch.randn(2, 12, C), torch.randn(2, C)
    embed = rnn.PatchEmbed(4, C, resolution=64, max_height=64, max_width=64)
    calls = {
        "adaln": lambda: rnn.AdaLN()(x, v, v),
        "gated_adaln": lambda: rnn.GatedAdaLN(norm="rms")(x, x, v, v, v),
        "joint_attention": lambda: rnn.JointAttention((C, C), HEADS)([x, x]),
        "gelu_mlp": lambda: rnn.Mlp(C)(x),
        "patch_embed": lambda: embed(torch.randn(2, 4, 6, 8)),
        "patch_unembed": lambda: rnn.PatchUnembed(C, 4)(x, 6, 8),
    }
    for op, call in calls.items():
        taken.clear()
        call()
        assert taken == {op: 1}


def test_names_are_the_fields_and_reprs_say_the_settings():
    names = set(dict(rnn.JointAttention((C, C), HEADS, silent=(0,)).named_parameters()))
    half = {"qkv.weight", "qkv.bias", "q_norm.weight", "k_norm.weight"}
    assert names == {f"streams.0.{n}" for n in half} | {f"streams.1.{n}" for n in half | {"proj.weight", "proj.bias"}}
    assert set(dict(rnn.Mlp(C).named_parameters())) == {f"fc{i}.{n}" for i in (1, 2) for n in ("weight", "bias")}
    ours = rnn.PatchEmbed(4, C, resolution=128, max_height=128, max_width=128)
    theirs = DiffusersPatchEmbed(16, 16, 2, 4, C, pos_embed_max_size=8)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    shown = {
        "AdaLN(norm='rms', eps=1e-06)": rnn.AdaLN(norm="rms"),
        "width=4, vectors=8 for 2 consumers": rnn.Modulation(4, 4, (6, 2)),
        "heads=2, head_dim=16": rnn.StreamAttention(C, HEADS),
        "silent=[0]": rnn.JointAttention((C, C), HEADS, silent=(0,)),
        "patch_size=2, table=8x8": ours,
        "patch_size=2": rnn.PatchUnembed(C, 4),
    }
    for text, module in shown.items():
        assert text in repr(module)


def test_joint_attention_is_attention_on_the_concatenation():
    """Streams of different widths, one of them silent, padded text, rotary embeddings; values and gradients."""
    torch.manual_seed(3)
    module = rnn.JointAttention((24, C, 48), HEADS, silent=(0,), head_dim=16, eps=1e-5).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    xs = [torch.randn(2, n, c, dtype=torch.float64, requires_grad=True) for n, c in ((3, 24), (5, C), (7, 48))]
    lengths = [torch.tensor([3, 1]), None, None]
    angles = torch.rand(7, 8, dtype=torch.float64)
    got = module(xs, lengths, [None, None, Rope(angles.cos(), angles.sin())])
    assert got[0] is None

    parts = []
    for half, x in zip(module.streams, xs, strict=True):
        q, k, v = half.qkv(x).unflatten(-1, (3, HEADS, 16)).unbind(2)
        norms = ((q, half.q_norm), (k, half.k_norm))
        parts.append([*(F.rms_norm(x, (16,), norm.weight, 1e-5) for x, norm in norms), v])
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    for i in (0, 1):
        pairs = torch.view_as_complex(parts[2][i].unflatten(-1, (-1, 2)).contiguous())
        parts[2][i] = torch.view_as_real(pairs * turn).flatten(-2)
    q, k, v = (torch.cat(side, 1).transpose(1, 2) for side in zip(*parts, strict=True))
    seen = torch.ones(2, 15, dtype=torch.bool)
    seen[1, 1:3] = False
    out = F.scaled_dot_product_attention(q, k, v, seen[:, None, None]).transpose(1, 2).flatten(2)
    want = [half.proj(o) for half, o in zip(module.streams[1:], out[:, 3:].split((5, 7), 1), strict=True)]
    torch.testing.assert_close(list(got[1:]), want)
    leaves = [*xs, *(p for name, p in module.named_parameters() if name != "streams.0.q_norm.weight")]
    ours, theirs = (torch.autograd.grad(sum(o.sin().sum() for o in outs), leaves) for outs in (got[1:], want))
    torch.testing.assert_close(ours, theirs)


def test_stacked_modulation_is_a_linear_per_consumer():
    module = rnn.Modulation(8, C, (6, 2, 9))
    c = torch.randn(3, 8)
    rows = module.linear.weight.split([6 * C, 2 * C, 9 * C])
    biases = module.linear.bias.split([6 * C, 2 * C, 9 * C])
    want = [F.linear(F.silu(c), w, b).chunk(n, -1) for w, b, n in zip(rows, biases, (6, 2, 9), strict=True)]
    got = module(c)
    assert [len(vectors) for vectors in got] == [6, 2, 9]
    torch.testing.assert_close(list(itertools.chain(*got)), list(itertools.chain(*want)))


@pytest.fixture
def where_kernels_run():
    """New tensors are made there."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.mark.usefixtures("where_kernels_run")
@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("backend", ("reference", "triton"))
def test_the_gradient_of_a_stack_is_one_tensor(backend, batch):
    """Vectors used once, twice and never; with the kernels they are written in place."""
    from rfkernels.adaln import chunks
    from rfkernels.triton_support import INSTALLED

    if backend == "triton" and not INSTALLED:
        pytest.skip("Triton is not installed on this platform")
    module, c, x = rnn.Modulation(8, C, (3, 3)), torch.randn(batch, 8), torch.randn(batch, 5, C)
    written = []
    original = chunks._Gradient.take

    def loss(vectors):
        (gate, shift, scale), (_, shift2, _) = vectors
        h, y = rfkernels.gated_adaln(x, x, gate, shift, scale)
        return (h.sin() + y.sin() + rfkernels.adaln(h, shift2, scale)).sum()

    want = torch.autograd.grad(loss([v.chunk(3, -1) for v in module.project(c).chunk(2, -1)]), module.linear.weight)
    with pytest.MonkeyPatch.context() as patch, rfkernels.backend(backend, "adaln", "gated_adaln"):
        patch.setattr(chunks._Gradient, "take", lambda self, *a: written.append(original(self, *a)) or written[-1])
        got = torch.autograd.grad(loss(module(c)), module.linear.weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert sum(part is not None for part in written) == (4 if backend == "triton" else 0)


@pytest.mark.usefixtures("where_kernels_run")
def test_chunks_of_one_modulation_taken_twice_have_their_own_gradients():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    m, x = torch.randn(2, 4 * C, requires_grad=True), torch.randn(2, 5, C)

    def loss(chunk, first):
        whole = m * 1.0
        a, b = chunk(whole), chunk(whole)
        y, z = rfkernels.adaln(x, a[0], a[1]), rfkernels.adaln(x, b[2], b[3])
        return ((y.sin() + z.cos()) if first else (z.cos() + y.sin())).sum()

    for first in (True, False):
        want = torch.autograd.grad(loss(lambda w: w.chunk(4, -1), first), m)
        with rfkernels.backend("triton", "adaln"):
            got = torch.autograd.grad(loss(lambda w: rfkernels.chunk_modulation(w, 4), first), m)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_layers_with_hooks_or_adapters_are_called():
    x = torch.randn(2, 12, C)
    modules = {
        "fc1": (rnn.Mlp(C), lambda m: m(x)),
        "proj": (rnn.PatchEmbed(4, C, resolution=64, max_height=64, max_width=64), lambda m: m(torch.ones(2, 4, 6, 8))),
        "linear": (rnn.PatchUnembed(C, 4), lambda m: m(x, 6, 8)),
        "qkv": (rnn.StreamAttention(C, HEADS), lambda m: m.stream(x, queries=False).k),
    }
    for name, (module, call) in modules.items():
        before, called = call(module), []
        getattr(module, name).register_forward_hook(lambda *a, called=called: called.append(a))
        torch.testing.assert_close(call(module), before)
        assert len(called) == 1, name


@pytest.mark.usefixtures("where_kernels_run")
def test_resolutions_do_not_recompile_and_export():
    class Through(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = rnn.PatchEmbed(4, C, resolution=128, max_height=128, max_width=128)
            self.unembed = rnn.PatchUnembed(C, 4)

        def forward(self, latent):
            return self.unembed(self.embed(latent).sin(), *latent.shape[2:])

    model, counted = Through(), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counted, dynamic=True, fullgraph=True)
    with torch.no_grad(), rfkernels.backend("triton", "patch_embed", "patch_unembed"):
        for side in (4, 6, 8, 12):
            latent = torch.randn(2, 4, side, side + 2)
            torch.testing.assert_close(compiled(latent), model(latent), rtol=1e-4, atol=1e-5)
    assert counted.frame_count <= 2


def test_a_position_table_stays_fp32_and_crops_the_centre():
    module = rnn.PatchEmbed(4, C, resolution=128, max_height=128, max_width=192)
    table = module.pos_embed.clone()
    module.bfloat16()
    assert module.proj.weight.dtype == torch.bfloat16 and torch.equal(module.pos_embed, table)
    with torch.device("meta"):
        other = rnn.PatchEmbed(4, C, resolution=128, max_height=128, max_width=192).half()
    other.to_empty(device="cpu")
    other.fill_positions()
    assert other.pos_embed.dtype == torch.float32 and torch.equal(other.pos_embed, table)
    torch.testing.assert_close(module.crop(2, 4).view(2, 4, C), table.view(8, 12, C)[3:5, 4:8])
    with pytest.raises(ValueError, match="latent has 9 x 4 patches; the position table holds 8 x 12"):
        module.crop(9, 4)


def test_bad_arguments_are_named():
    for error, match, call in (
        (ValueError, "AdaLN: norm is 'group'", lambda: rnn.AdaLN(norm="group")),
        (ValueError, "GatedAdaLN: eps is 0", lambda: rnn.GatedAdaLN(eps=0)),
        (ValueError, "dim is 30; expected a multiple of heads = 4", lambda: rnn.StreamAttention(30, 4)),
        (ValueError, r"silent names streams \[2\]", lambda: rnn.JointAttention((C, C), HEADS, silent=(2,))),
        (ValueError, "xs has 1 entries; expected 2",
         lambda: rnn.JointAttention((C, C), HEADS)([torch.randn(1, 2, C)])),
        (ValueError, r"counts\[1\] is 0; expected at least 1", lambda: rnn.Modulation(4, 4, (1, 0))),
        (ValueError, "heads is 0; expected at least 1", lambda: rnn.JointAttention((C, C), 0)),
        (ValueError, "dims is empty", lambda: rnn.JointAttention((), 8)),
        (ValueError, "counts is empty", lambda: rnn.Modulation(4, 4, ())),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
