"""An own joint block on rfkernels' ops: two streams, each with its weights, meeting in one attention."""

import torch
from torch import nn

import rfkernels
from rfkernels import Stream


class Half(nn.Module):
    """One stream's norms, projections and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def stream(self, x, shift, scale):
        qkv = self.qkv(rfkernels.adaln(x, shift, scale))
        return Stream.packed(qkv.unflatten(-1, (3, self.heads, -1)), self.q_norm, self.k_norm)

    def update(self, x, attended, gate, shift, scale, gate_mlp):
        h, y = rfkernels.gated_adaln(x, self.proj(attended.flatten(2)), gate, shift, scale)
        mlp = rfkernels.gelu_mlp(y, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return rfkernels.gated_residual(h, mlp, gate_mlp)


class Block(nn.Module):
    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.halves = nn.ModuleList(Half(width, heads) for _ in range(2))

    def forward(self, text, image, c):
        xs = (text, image)
        m = [rfkernels.chunk_modulation(half.modulation(c), 6) for half in self.halves]
        streams = [half.stream(x, *m[i][:2]) for i, (half, x) in enumerate(zip(self.halves, xs, strict=True))]
        outs = rfkernels.joint_attention(streams)
        return tuple(half.update(xs[i], outs[i], *m[i][2:]) for i, half in enumerate(self.halves))


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = Block().to(device)
    text, image, c = (torch.randn(s, device=device) for s in ((2, 77, 256), (2, 256, 256), (2, 256)))
    outs = block(text, image, c)
    sum(out.square().mean() for out in outs).backward()
    print(rfkernels.explain("adaln", image, c, c))
    print("text", list(outs[0].shape), "image", list(outs[1].shape))
