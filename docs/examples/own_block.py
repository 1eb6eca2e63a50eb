"""An own joint block on rfkernels' modules and ops: two streams, each with its weights, meeting in one attention."""

import torch
from torch import nn

import rfkernels
from rfkernels.nn import AdaLN, GatedAdaLN, JointAttention, Mlp, Modulation


class Block(nn.Module):
    """text [B, L, width] and image [B, S, width], conditioned on c [B, width]."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.modulation = Modulation(width, width, counts=(6, 6))
        self.norm, self.gate = AdaLN(), GatedAdaLN()
        self.attn = JointAttention((width, width), heads)
        self.mlps = nn.ModuleList(Mlp(width) for _ in range(2))

    def forward(self, text, image, c):
        xs, vectors = (text, image), self.modulation(c)
        attended = self.attn([self.norm(x, shift, scale) for x, (shift, scale, *_) in zip(xs, vectors, strict=True)])
        outs = []
        for x, branch, mlp, (_, _, gate, shift, scale, gate_mlp) in zip(xs, attended, self.mlps, vectors, strict=True):
            h, y = self.gate(x, branch, gate, shift, scale)
            outs.append(rfkernels.gated_residual(h, mlp(y), gate_mlp))
        return outs


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = Block().to(device)
    text, image, c = (torch.randn(s, device=device) for s in ((2, 77, 256), (2, 256, 256), (2, 256)))
    outs = block(text, image, c)
    sum(out.square().mean() for out in outs).backward()
    print(rfkernels.explain("adaln", image, c, c))
    print("text", list(outs[0].shape), "image", list(outs[1].shape))
