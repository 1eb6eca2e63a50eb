"""Blocks of eight diffusion transformers, written from their equations: once, over a kit of parts that is eager PyTorch
or the ops of this library. A style takes its parameters and inputs by name and returns tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import rfkernels
from rfkernels import Stream

B, S, L, C, H, D = 2, 6, 4, 32, 2, 16
MIXED = 2 * C                                        # of an MLP


class Eager:
    """As the models' own code has it."""

    @staticmethod
    def norm(x, weight=None, bias=None, kind="layer", eps=1e-6):
        if kind == "rms":
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    @classmethod
    def modulate(cls, x, shift=None, scale=None, weight=None, bias=None, kind="layer", eps=1e-6):
        per_sample = weight is not None and weight.ndim > 1
        y = cls.norm(x, None if per_sample else weight, None if per_sample else bias, kind, eps)
        if per_sample:
            y = y * weight + bias
        if scale is not None:
            y = y * (1 + scale)
        return y if shift is None else y + shift

    @staticmethod
    def add(x, branch, gate=None):
        return x + (branch if gate is None else gate * branch)

    @classmethod
    def add_modulate(cls, x, branch, gate, *vectors, **settings):
        h = cls.add(x, branch, gate)
        return h, cls.modulate(h, *vectors, **settings)

    @staticmethod
    def attend(*streams, rope=None, lengths=None):
        """streams: (q, k, v, q_weight, k_weight); lengths: of the first, which is text."""
        qs, ks, vs = [], [], []
        for q, k, v, qw, kw in streams:
            q, k = (t if w is None else F.rms_norm(t, (D,), w, 1e-6) for t, w in ((q, qw), (k, kw)))
            if rope is not None:
                q, k = (rotated(t, *(table[..., : t.shape[1], :] for table in rope)) for t in (q, k))
            qs, ks, vs = [*qs, q.to(v.dtype)], [*ks, k.to(v.dtype)], [*vs, v]
        q, k, v = (torch.cat(ts, 1).transpose(1, 2) for ts in (qs, ks, vs))
        mask = None
        if lengths is not None:
            mask = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
            mask[:, streams[0][1].shape[1] :] = True
            mask = mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        parts = list(out.split([t.shape[1] for t in qs], 1))
        if lengths is not None:
            parts[0] = parts[0] * (torch.arange(parts[0].shape[1], device=k.device) < lengths[:, None])[..., None]
        return parts

    @staticmethod
    def mlp(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


class Ours:
    @staticmethod
    def modulate(x, shift=None, scale=None, weight=None, bias=None, kind="layer", eps=1e-6):
        return rfkernels.adaln(x, shift, scale, weight=weight, bias=bias, norm=kind, eps=eps)

    add = staticmethod(rfkernels.gated_residual)

    @staticmethod
    def add_modulate(x, branch, gate, shift=None, scale=None, weight=None, bias=None, kind="layer", eps=1e-6):
        return rfkernels.gated_adaln(x, branch, gate, shift, scale, weight=weight, bias=bias, norm=kind, eps=eps)

    @staticmethod
    def attend(*streams, rope=None, lengths=None):
        made = [
            Stream(*s, lengths=None if i else lengths, rope=rope and tuple(t[..., : s[0].shape[1], :] for t in rope))
            for i, s in enumerate(streams)
        ]
        return [out.flatten(2) for out in rfkernels.joint_attention(made)]

    mlp = staticmethod(rfkernels.gelu_mlp)


def rotated(x, cos, sin):
    """[B, S, H, D] by tables [S, D/2] or [1, S, D/2], pairs (0, 1), (2, 3), ..."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.reshape(-1, *t.shape[-2:])[:, :, None].to(wide) for t in (cos, sin))
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Style:
    run: Callable[..., object]
    parameters: dict[str, tuple[int, ...]]
    inputs: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (B, S, C), "c": (B, C)})


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def layer(name, n, m, bias=True):
    return {f"{name}.weight": (n, m), **({f"{name}.bias": (n,)} if bias else {})}


def attention(name, norm=True):
    norms = {f"{name}.q_norm": (D,), f"{name}.k_norm": (D,)} if norm else {}
    return {**layer(f"{name}.qkv", 3 * C, C), **layer(f"{name}.proj", C, C), **norms}


def mlp(name):
    return {**layer(f"{name}.fc1", MIXED, C), **layer(f"{name}.fc2", C, MIXED)}


def qkv(p, name, y):
    q, k, v = linear(p, f"{name}.qkv", y).view(*y.shape[:2], 3, H, D).unbind(2)
    return q, k, v, p.get(f"{name}.q_norm"), p.get(f"{name}.k_norm")


def mlp_of(p, name, kit, y):
    return kit.mlp(y, *(p[f"{name}.{part}"] for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")))


def vectors(p, c, count):
    return rfkernels.chunk_modulation(linear(p, "mod", F.silu(c)), count)


def dit(kit, p, x, c):
    """DiT, SiT: adaLN-zero, no norm of queries and keys."""
    m = [v.unsqueeze(1) for v in vectors(p, c, 6)]
    (out,) = kit.attend(qkv(p, "attn", kit.modulate(x, m[0], m[1])))
    h, y = kit.add_modulate(x, linear(p, "attn.proj", out), m[2], m[3], m[4])
    return kit.add(h, mlp_of(p, "mlp", kit, y), m[5])


def joint(kit, p, x, text, c, *, rope=None, lengths=None, dual=False, last=False):
    """A block of two streams; dual: the image has an attention of its own (SD3.5); last: text gives keys and values."""
    image, words = vectors(p, c, 15)[: 9 if dual else 6], vectors(p, c, 15)[9:]
    image, words = ([v.unsqueeze(1) for v in m] for m in (image, words))
    y, z = kit.modulate(x, image[0], image[1]), kit.modulate(text, words[0], words[1])
    out_text, out = kit.attend(qkv(p, "text", z), qkv(p, "attn", y), rope=rope, lengths=lengths)
    branch, gate = linear(p, "attn.proj", out), image[2]
    if dual:
        (own,) = kit.attend(qkv(p, "attn2", kit.modulate(x, image[6], image[7])))
        x = kit.add(x, branch, gate)
        branch, gate = linear(p, "attn2.proj", own), image[8]
    h, y = kit.add_modulate(x, branch, gate, image[3], image[4])
    left = [kit.add(h, mlp_of(p, "mlp", kit, y), image[5])]
    if not last:
        h, y = kit.add_modulate(text, linear(p, "text.proj", out_text), words[2], words[3], words[4])
        left.append(kit.add(h, mlp_of(p, "text.mlp", kit, y), words[5]))
    return left


def flux(kit, p, x, text, c, cos, sin):
    return joint(kit, p, x, text, c, rope=(cos, sin))


def sd35(kit, p, x, text, c):
    return joint(kit, p, x, text, c, dual=True)


def last(kit, p, x, text, c):
    return joint(kit, p, x, text, c, dual=True, last=True)


def padded(kit, p, x, text, c):
    return joint(kit, p, x, text, c, lengths=torch.tensor([L - 1, 1], device=x.device))


def flux_single(kit, p, x, c, cos, sin):
    """FLUX and FLUX.2: attention and MLP side by side, from one projection and into one."""
    shift, scale, gate = (v.unsqueeze(1) for v in vectors(p, c, 3))
    y = kit.modulate(x, shift, scale)
    fused = linear(p, "linear1", y)
    q, k, v = fused[..., : 3 * C].reshape(*fused.shape[:2], 3, H, D).unbind(2)
    (out,) = kit.attend((q, k, v, p["q_norm"], p["k_norm"]), rope=(cos, sin))
    hidden = F.gelu(fused[..., 3 * C :], approximate="tanh")
    return kit.add(x, linear(p, "linear2", torch.cat([out, hidden], -1)), gate)


def shared(kit, p, x, c):
    """Wan 2.1, PixArt: one table for all samples plus a vector per sample, [B, 6, C]; a norm with weight and bias."""
    m = (p["table"] + linear(p, "mod", F.silu(c)).view(-1, 6, C)).chunk(6, 1)
    (out,) = kit.attend(qkv(p, "attn", kit.modulate(x, m[0], m[1])))
    x = kit.add(x, linear(p, "attn.proj", out), m[2])
    y = kit.modulate(x, None, None, p["norm.weight"], p["norm.bias"])
    h, y = kit.add_modulate(x, linear(p, "mix", y), None, m[3], m[4])
    return kit.add(h, mlp_of(p, "mlp", kit, y), m[5])


def minrf(kit, p, x, c):
    """minRF: norms with parameters, eps 1e-5, modulated besides; a gated MLP, which no op has."""
    m = [v.unsqueeze(1) for v in vectors(p, c, 6)]
    y = kit.modulate(x, m[0], m[1], p["norm1.weight"], p["norm1.bias"], eps=1e-5)
    (out,) = kit.attend(qkv(p, "attn", y))
    h, y = kit.add_modulate(
        x, linear(p, "attn.proj", out), m[2], m[3], m[4], p["norm2.weight"], p["norm2.bias"], eps=1e-5
    )
    return kit.add(h, linear(p, "fc3", F.silu(linear(p, "fc1", y)) * linear(p, "fc2", y)), m[5])


def gamma(kit, p, x, c):
    """lucidrains' mmdit: gamma multiplies as it is, per sample; no gate but a second gamma."""
    gamma1, beta1, gate1, gamma2, beta2, gate2 = (v.unsqueeze(1) for v in vectors(p, c, 6))
    (out,) = kit.attend(qkv(p, "attn", kit.modulate(x, weight=gamma1, bias=beta1, eps=1e-5)))
    h, y = kit.add_modulate(x, linear(p, "attn.proj", out), gate1, weight=gamma2, bias=beta2, eps=1e-5)
    return kit.add(h, mlp_of(p, "mlp", kit, y), gate2)


def per_token(kit, p, x, c):
    """A modulation for every token (video models with a time per frame), and RMSNorm."""
    m = vectors(p, c[:, None] + x, 3)
    y = kit.modulate(x, m[0], m[1], kind="rms")
    return kit.add(x, mlp_of(p, "mlp", kit, y), m[2])


def tokens(kit, p, z, c):
    """The start of most of them: a convolution's output turned to tokens, whose channels are S apart."""
    x = F.conv2d(z, p["conv"], stride=2).flatten(2).transpose(1, 2)
    m = [v.unsqueeze(1) for v in vectors(p, c, 2)]
    return linear(p, "out", kit.modulate(x, m[0], m[1]))


ONE = {**layer("mod", 6 * C, C), **attention("attn", norm=False), **mlp("mlp")}
TWO = {
    **layer("mod", 15 * C, C), **attention("attn"), **attention("text"), **attention("attn2"), **mlp("mlp"),
    **mlp("text.mlp"),
}  # fmt: skip
PAIR = {"x": (B, S, C), "text": (B, L, C), "c": (B, C)}
TABLES = {"cos": (1, S, D // 2), "sin": (1, S, D // 2)}
NORMS = {f"norm{i}.{n}": (C,) for i in (1, 2) for n in ("weight", "bias")}
STYLES = {
    "dit": Style(dit, ONE),
    "flux": Style(flux, TWO, PAIR | TABLES),
    "flux-single": Style(
        flux_single,
        {**layer("mod", 3 * C, C), **layer("linear1", 3 * C + MIXED, C), **layer("linear2", C, C + MIXED),
         "q_norm": (D,), "k_norm": (D,)},
        {"x": (B, S, C), "c": (B, C)} | TABLES,
    ),
    "sd35": Style(sd35, TWO, PAIR),
    "last": Style(last, TWO, PAIR),
    "lengths": Style(padded, TWO, PAIR),
    "shared": Style(
        shared,
        {**layer("mod", 6 * C, C), "table": (1, 6, C), **attention("attn"), **layer("mix", C, C), **mlp("mlp"),
         "norm.weight": (C,), "norm.bias": (C,)},
    ),
    "minrf": Style(
        minrf,
        {**layer("mod", 6 * C, C), **NORMS, **attention("attn"), **layer("fc1", MIXED, C), **layer("fc2", MIXED, C),
         **layer("fc3", C, MIXED)},
    ),
    "gamma": Style(gamma, {**ONE, **attention("attn")}),
    "per-token": Style(per_token, {**layer("mod", 3 * C, C), **mlp("mlp")}),
    "tokens": Style(
        tokens, {"conv": (C, 3, 2, 2), **layer("mod", 2 * C, C), **layer("out", C, C)}, {"z": (B, 3, 4, 6), "c": (B, C)}
    ),
}  # fmt: skip
