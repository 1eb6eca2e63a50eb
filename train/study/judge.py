"""What a small network trained on the captioned shapes says of pictures, in place of CLIP: how well they fit their
captions, and features for a Frechet distance. It is trained where it is needed, in half a minute, from its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdit import keyed
from mmdit.autoencoder import to_float
from mmdit.files import naming, replacing
from train.data import shapes

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(shapes.SIZES),
    "colour": tuple(shapes.COLOURS),
    "shape": tuple(shapes.SHAPES),
    "position": tuple(shapes.POSITIONS),
}
CAPTIONED = {what.caption: what for what in shapes.everything()}
STEPS, BATCH, NOISE = 500, 64, 0.1
FILE = "judge.safetensors"


class Judge(nn.Module):
    """Images [N, 3, h, w] in [-1, 1], resized to 32 x 32 -> 32 features, and from them the logits of each attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in ((3, 16), (16, 32), (32, 64))
        )
        self.features = nn.Linear(64 * 16, 32)
        self.heads = nn.ModuleDict({name: nn.Linear(32, len(values)) for name, values in ATTRIBUTES.items()})

    def embed(self, images: Tensor) -> Tensor:
        x = resized(images, shapes.SIDE)
        for stage in self.stages:
            x = F.gelu(stage(x))
        out: Tensor = self.features(x.flatten(1))
        return out

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """{attribute: logits [N, values]}"""
        features = F.gelu(self.embed(images))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def score(self, images: np.ndarray, captions: Sequence[str]) -> float:
        """Mean probability of what the captions name, in [0, 1]. images: uint8 [N, h, w, 3]. Raises: ValueError for a
        caption that is none of a shape."""
        unknown = [caption for caption in captions if caption not in CAPTIONED]
        if unknown:
            raise ValueError(f"judge: caption {unknown[0]!r} is none of the shapes'")
        wanted = [CAPTIONED[caption] for caption in captions]
        logits = self(to_float(images))
        rows = torch.arange(len(wanted))
        found = [
            values.softmax(-1)[rows, torch.tensor([ATTRIBUTES[name].index(getattr(w, name)) for w in wanted])]
            for name, values in logits.items()
        ]
        return float(torch.stack(found).mean())

    @torch.no_grad()
    def embedded(self, images: np.ndarray) -> np.ndarray:
        """fp64 [N, 32]."""
        return self.embed(to_float(images)).double().numpy()


def resized(images: Tensor, side: int) -> Tensor:
    """[N, 3, h, w] -> [N, 3, side, side]."""
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def trained(folder: Path, seed: int = 0) -> Judge:
    """The judge that folder keeps, or a new one, kept there."""
    path = folder / FILE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge()
    if path.is_file():
        with naming(path):
            judge.load_state_dict(load_file(path))
        return judge.eval()
    everything = shapes.everything()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    for step in range(STEPS):
        rng = keyed.generator(seed, "judge", step)
        chosen = [everything[i] for i in rng.integers(0, len(everything), BATCH)]
        images = to_float(np.stack([shapes.draw(what, rng) for what in chosen]))
        images[::2] = resized(resized(images[::2], shapes.SIDE // 2), shapes.SIDE)       # it is to know small ones too
        noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
        logits = judge(images + NOISE * rng.random() * noise)
        loss = sum(
            F.cross_entropy(logits[name], torch.tensor([values.index(getattr(w, name)) for w in chosen]))
            for name, values in ATTRIBUTES.items()
        )
        optimizer.zero_grad()
        loss.backward()                                                                              # type: ignore[union-attr]
        optimizer.step()
    with replacing(path) as partial:
        save_file(judge.state_dict(), partial)
    return judge.eval()
