"""The CUDA kernels, compiled for the host: against fp64, in several orders of threads, and with every access of shared
memory looked at. What a GPU makes of them has not been tried."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from rfkernels import build, native
from rfkernels.testing import assert_within_rule

try:
    CXX = build.compiler()
except build.CannotBuild as error:
    pytest.skip(str(error), allow_module_level=True)

SOURCES = build.sources() / "cuda"
KINDS = {"fp32": (0, torch.float32), "bf16": (1, torch.bfloat16), "fp16": (2, torch.float16)}
WAYS = {None: 0, "summed": 1, "stored": 2}
P, I64, I32, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def structure(*fields):
    return type("Structure", (ctypes.Structure,), {"_fields_": list(fields)})


Rows = structure(("data", P), ("batch", I64), ("token", I64))
Vector = structure(("rows", Rows), ("kind", I32), ("way", I32), ("gradient", P))
AdalnBackward = structure(
    ("dy", Rows), ("dh", Rows), ("x", Rows), ("branch", Rows), ("shift", Vector), ("scale", Vector), ("gate", Vector),
    ("mean", P), ("rstd", P), ("dx", P), ("dbranch", P), ("bias", P), ("length", I32), ("span", I32), ("channels", I32),
    ("one", FLOAT), ("rms", ctypes.c_bool),
)  # fmt: skip
Heads = structure(("data", P), ("batch", I64), ("token", I64), ("head", I64))
QkNorm = structure(
    ("x", Heads), ("dy", Heads), ("weight", P), ("out", P), ("dx", P), ("partials", P), ("rows", I64), ("length", I32),
    ("heads", I32), ("dim", I32), ("weight_kind", I32), ("eps", FLOAT),
)  # fmt: skip
Pair = structure(("of", QkNorm * 2))
GeluBackward = structure(
    ("h", P), ("da", P), ("a", P), ("dh", P), ("partials", P), ("rows", I64), ("span", I64), ("channels", I32)
)  # fmt: skip


def emulated(sources, folder):
    library = folder / "emulated.so"
    command = [CXX, "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-x", "c++"]
    subprocess.run([*command, str(sources / "emulated.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated(SOURCES, tmp_path_factory.mktemp("cuda"))


def run(library, name, arguments, grid, order):
    """Runs a kernel; returns the races."""
    function = getattr(library, f"run_{name}")
    function.restype = ctypes.c_char_p
    return function(ctypes.byref(arguments), *grid, order).decode()


def rows(t):
    if t is None:
        return Rows()
    return Rows(t.data_ptr(), t.stride(0) if t.ndim > 1 else 0, t.stride(1) if t.ndim == 3 else 0)


def kind_of(t):
    return next(number for number, dtype in KINDS.values() if dtype == t.dtype)


class Family:
    """A backward of the family: arguments, and where its results lie."""

    def __init__(self, kind, batch, length, channels, shapes, norm, splits, gated):
        dtype = KINDS[kind][1]
        self.gated, self.norm, self.splits, self.kind = gated, norm, splits, kind
        self.x, self.dy, self.branch, self.dh = (torch.randn(batch, length, channels).to(dtype) for _ in range(4))
        shape = {"sample": (batch, channels), "token": (batch, length, channels), "shared": (channels,)}
        self.vectors = {n: s and torch.randn(shape[s]).to(dtype) for n, s in shapes.items()}
        wide = self.x.float()
        mean = wide.mean(-1) if norm == "layer" else torch.zeros(batch, length)
        self.mean = mean.contiguous()
        self.rstd = ((wide - mean[..., None]).square().mean(-1) + 1e-6).rsqrt()
        self.dx, self.dbranch = torch.full_like(self.x, float("nan")), torch.full_like(self.x, float("nan"))
        self.gradients = {n: self.target(v, (batch * splits, channels)) for n, v in self.vectors.items()}
        self.bias = torch.full((batch * splits, channels), float("nan")) if gated else None

    @staticmethod
    def target(vector, partials):
        if vector is None:
            return None
        return torch.full_like(vector, float("nan")) if vector.ndim == 3 else torch.full(partials, float("nan"))

    def arguments(self):
        def vector(name):
            v, gradient = self.vectors[name], self.gradients[name]
            if v is None:
                return Vector()
            return Vector(rows(v), kind_of(v), WAYS["stored" if v.ndim == 3 else "summed"], gradient.data_ptr())

        _, length, channels = self.x.shape
        other = rows if self.gated else (lambda t: Rows())
        return AdalnBackward(
            rows(self.dy), other(self.dh), rows(self.x), other(self.branch), vector("shift"), vector("scale"),
            vector("gate"), self.mean.data_ptr(), self.rstd.data_ptr(), self.dx.data_ptr(), self.dbranch.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(), length, -(-length // self.splits), channels, 1.0,
            self.norm == "rms",
        )  # fmt: skip

    def results(self):
        batch, _, channels = self.x.shape
        found = {"dx": self.dx}
        for name, v in self.vectors.items():
            if v is not None and v.ndim == 3:
                found[name] = self.gradients[name]
            elif v is not None:
                sums = self.gradients[name].view(batch, -1, channels).sum(1)
                found[name] = sums if v.ndim == 2 else sums.sum(0)
        if self.gated:
            found |= {"dbranch": self.dbranch, "bias": self.bias.sum(0)}
        return found

    def exact(self, dtype=torch.float64):
        """By PyTorch's autograd, of x as the op sees it."""
        x, branch = (t.to(dtype).requires_grad_() for t in (self.x, self.branch))
        vectors = {n: v if v is None else v.to(dtype).requires_grad_() for n, v in self.vectors.items()}
        per_token = lambda v: v[:, None] if v.ndim == 2 else v  # noqa: E731
        shape = (x.shape[-1],)
        y = F.layer_norm(x, shape, eps=1e-6) if self.norm == "layer" else F.rms_norm(x, shape, eps=1e-6)
        if (scale := vectors["scale"]) is not None:
            y = y * (1 + per_token(scale))
        if (shift := vectors["shift"]) is not None:
            y = y + per_token(shift)
        leaves = {"dx": x} | {n: v for n, v in vectors.items() if v is not None and n != "gate"}
        made = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype)), strict=True))
        if self.gated:
            made["dx"] = made["dx"] + self.dh.to(dtype)
            gate = vectors["gate"]
            h = branch if gate is None else per_token(gate) * branch
            inner = {"dbranch": branch} | ({} if gate is None else {"gate": gate})
            made |= dict(zip(inner, torch.autograd.grad(h, list(inner.values()), made["dx"]), strict=True))
            made["bias"] = made["dbranch"].sum((0, 1))
        return made


def check(library, name, family, batch):
    for order in (0, 1, 5):
        races = run(library, name, family.arguments(), (batch, family.splits), order)
        assert not races, races
    exact, eager = family.exact(), family.exact(family.x.dtype)
    for key, got in family.results().items():
        assert_within_rule(key, got.to(eager[key].dtype), exact[key], eager[key], 3 if key != "dx" else 2)


SHAPES = {**{way: (way,) * 3 for way in ("sample", "token", "shared")}, "mixed": ("token", None, "sample")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("gated", (False, True), ids=("adaln", "gated"))
def test_family(gated, shapes, norm, kind, library):
    given = dict(zip(("shift", "scale", "gate"), SHAPES[shapes], strict=True))
    family = Family(kind, 2, 5, 100, given if gated else {**given, "gate": None}, norm, 2, gated)
    check(library, f"{'gated_' * gated}adaln_backward_{kind}_any", family, 2)


@pytest.mark.parametrize("width", (960, 1152, 1536, 1920, 2432, 3072))
def test_widths(width, library):
    given = {"shift": "sample", "scale": "sample", "gate": "sample"}
    check(library, f"gated_adaln_backward_bf16_{width}", Family("bf16", 1, 3, width, given, "layer", 2, True), 1)


class Normed:
    """Queries or keys: one of three in a packed tensor, and where their results lie."""

    def __init__(self, kind, batch, length, heads, dim, blocks):
        self.number, dtype = KINDS[kind]
        self.x = torch.randn(batch, length, 3, heads, dim).to(dtype)[:, :, 1]
        self.dy = torch.randn(batch, length, heads, dim).to(dtype)
        self.weight = torch.rand(dim).to(dtype)
        self.out, self.dx = (torch.full_like(self.dy, float("nan")) for _ in range(2))
        self.partials = torch.full((blocks, dim), float("nan"))

    def arguments(self):
        heads = lambda t: Heads(t.data_ptr(), *t.stride()[:3])  # noqa: E731
        batch, length, count, dim = self.x.shape
        pointers = (t.data_ptr() for t in (self.weight, self.out, self.dx, self.partials))
        rows = batch * length * count
        return QkNorm(heads(self.x), heads(self.dy), *pointers, rows, length, count, dim, self.number, 1e-6)

    def exact(self, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (self.x, self.weight)]
        made = F.rms_norm(leaves[0], self.weight.shape, leaves[1], 1e-6)
        return [made, *torch.autograd.grad(made, leaves, self.dy.to(dtype))]

    def check(self):
        labels, dtype = ("out", "dx", "dweight"), self.x.dtype
        found = self.out, self.dx, self.partials.sum(0).to(dtype)
        for label, got, exact, eager in zip(labels, found, self.exact(torch.float64), self.exact(dtype), strict=True):
            assert_within_rule(label, got, exact, eager, 4 if label == "dweight" else 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", (64, 128, 40, 7))
def test_qk_norm(dim, kind, library):
    """Queries and keys of other lengths and heads in one launch."""
    q, k = Normed(kind, 2, 9, 3, dim, 3), Normed(kind, 2, 5, 2, dim, 3)
    name = dim if dim in (64, 128) else "any"
    for way in ("forward", "backward"):
        for order in (0, 1, 5):
            pair = Pair((QkNorm * 2)(q.arguments(), k.arguments()))
            races = run(library, f"qk_norm_{way}_{kind}_{name}", pair, (3, 2), order)
            assert not races, races
    q.check()
    k.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", (64, 100))
def test_gelu(channels, kind, library):
    dtype = KINDS[kind][1]
    h, da = (3 * torch.randn(7, channels)).to(dtype), torch.randn(7, channels).to(dtype)
    a, dh = (torch.full_like(h, float("nan")) for _ in range(2))
    partials = torch.full((3, channels), float("nan"))
    arguments = GeluBackward(*(t.data_ptr() for t in (h, da, a, dh, partials)), 7, 3, channels)
    assert not run(library, f"gelu_backward_{kind}_{'exact' if channels == 64 else 'any'}", arguments, (1, 3), 0)

    def torchs(dtype):
        leaf = h.to(dtype).requires_grad_()
        made = F.gelu(leaf, approximate="tanh")
        return [made, *torch.autograd.grad(made, leaf, da.to(dtype))]

    for label, got, exact, eager in zip(("a", "dh"), (a, dh), torchs(torch.float64), torchs(dtype), strict=True):
        assert_within_rule(label, got, exact, eager)
    torch.testing.assert_close(partials.sum(0), dh.float().sum(0), rtol=1e-5, atol=1e-5)


# --- planted faults ---------------------------------------------------------------------------------------------------

PLANTED = {
    "a missing barrier": ("  barrier();\n  a = b = 0.f;", "  a = b = 0.f;"),
    "one buffer for two uses": ("(use & 1) * 2 * WARPS", "0 * use"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(fault, tmp_path):
    copy = tmp_path / "cuda"
    shutil.copytree(SOURCES, copy)
    right, wrong = PLANTED[fault]
    text = (copy / "device.h").read_text()
    assert text.count(right) == 1
    (copy / "device.h").write_text(text.replace(right, wrong))
    library = emulated(copy, tmp_path)
    family = Family("fp32", 1, 4, 100, {"shift": "sample", "scale": "sample", "gate": None}, "layer", 1, False)
    races = run(library, "adaln_backward_fp32_any", family.arguments(), (1, 1), 0)
    assert races.startswith("room[") and "without a barrier between them" in races


# --- what the launcher hands over -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launches():
    if native.missing() or build.cuda_binary(90) is None:
        pytest.skip(native.missing() or "the CUDA kernels are not built")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.rfkernels.cuda_launches"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("channels, width, threads", ((100, "any", 256), (1536, "1536", 192), (3000, "any_wide", 512)))
@pytest.mark.parametrize("kind", ("bf16", "fp32"))
@pytest.mark.parametrize("op", ("adaln", "gated_adaln"))
def test_the_launcher_hands_over_the_arguments(op, kind, channels, width, threads, launches):
    found = launches[f"{op}-{kind}-{channels}"]
    (name, grid, block, _, arguments), summing = found["launches"]
    assert name == f"{op}_backward_{kind}_{width}" and block == f"{threads},1,1" and summing[0] == "sum_partials"
    a = AdalnBackward.from_buffer_copy(bytes.fromhex(arguments)[::-1])
    assert (a.dy.data, a.dx) == (found["dy"], found["dx"])
    assert (a.length, a.channels, a.one, a.rms) == (70, channels, 1.0, False)
    assert (a.dy.batch, a.dy.token) == (70 * channels, channels)
    splits = int(grid.split(",")[1])
    assert grid == f"2,{splits},1" and a.span * splits >= 70 > a.span * (splits - 1)
    assert a.scale.kind == KINDS[kind][0] and a.scale.way == WAYS["summed"] and a.scale.rows.batch == channels
    gated = op == "gated_adaln"
    assert a.shift.way == WAYS["stored" if gated else "summed"] and a.gate.way == (WAYS["summed"] if gated else 0)
    assert bool(a.branch.data) == bool(a.dh.data) == bool(a.dbranch) == gated


@pytest.mark.parametrize("dim, name, rows", ((64, "64", 16), (40, "any", 4)))
@pytest.mark.parametrize("kind", ("bf16", "fp32"))
def test_the_launcher_hands_over_queries_and_keys(kind, dim, name, rows, launches):
    found = launches[f"qk_norm-{kind}-{dim}"]
    ((forward, grid, block, _, given),) = found["forward"]
    assert forward == f"qk_norm_forward_{kind}_{name}" and (grid, block) == (f"{-(-2 * 70 * 3 // rows)},2,1", "128,1,1")
    (backward, grid, _, _, given_backward), *sums = found["launches"]
    assert backward == f"qk_norm_backward_{kind}_{name}" and len(sums) == 1
    for words in (given, given_backward):
        q, k = Pair.from_buffer_copy(bytes.fromhex(words)[::-1]).of
        assert q.x.data == found["x"] and (q.x.batch, q.x.token, q.x.head) == (70 * 6 * dim, 6 * dim, dim)
        assert k.x.data - q.x.data == 3 * dim * torch.finfo(KINDS[kind][1]).bits // 8
        assert (q.rows, q.length, q.heads, q.dim, q.weight_kind) == (2 * 70 * 3, 70, 3, dim, KINDS[kind][0])
    assert Pair.from_buffer_copy(bytes.fromhex(given)[::-1]).of[0].out == found["out"]
    q, k = Pair.from_buffer_copy(bytes.fromhex(given_backward)[::-1]).of
    assert q.dx == found["dx"] and k.partials - q.partials == 4 * dim * int(grid.split(",")[0])


@pytest.mark.parametrize("channels, name", ((96, "exact"), (100, "any")))
@pytest.mark.parametrize("kind", ("bf16", "fp32"))
def test_the_launcher_hands_over_gelu(kind, channels, name, launches):
    (kernel, grid, block, _, given), _ = launches[f"gelu-{kind}-{channels}"]["launches"]
    assert kernel == f"gelu_backward_{kind}_{name}" and block == "128,1,1"
    g = GeluBackward.from_buffer_copy(bytes.fromhex(given)[::-1])
    splits = int(grid.split(",")[1])
    assert grid == f"1,{splits},1" and (g.rows, g.channels) == (140, channels) and g.a and g.dh and g.partials
    assert g.span * splits >= 140 > g.span * (splits - 1)


def test_a_misaligned_tensor_is_tritons(launches):
    assert launches["odd"]["launches"][0][0] == "adaln_bwd"
