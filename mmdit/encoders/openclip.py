"""CLIP from local folders, through open_clip: open_clip_config.json and safetensors, as its `local-dir:` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdit.encoders.features import TextFeatures, batched
from mmdit.files import naming, read_object, sampled_digest

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
OTHERS = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "no_causal_mask", "embed_cls")
"""Of a text tower: what makes it another network than CLIP's, or reads with another tokenizer."""


def is_one(folder: Path) -> bool:
    """Whether a folder is open_clip's. Many hold transformers' files too: those are taken then."""
    theirs = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    return (folder / CONFIG).is_file() and not theirs


def open_clip() -> Any:
    """The package, or an ImportError that says how to get it."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("this CLIP needs the extra: pip install 'rfkernels[openclip]'") from error
    return open_clip


def network(folder: Path, *, pictures: bool) -> Any:
    """open_clip's CLIP in evaluation mode, in fp32; without its picture tower unless that is asked for.

    Raises: FileNotFoundError; ValueError for another architecture, or tensors that are missing or unknown."""
    package, config = open_clip(), read_object(folder / CONFIG)
    settings = config.get("model_cfg", config)
    text = settings.get("text_cfg")
    if not isinstance(text, dict) or "vision_cfg" not in settings:
        raise ValueError(f"{folder / CONFIG} describes no CLIP: it has no vision_cfg and text_cfg")
    if others := [n for n in OTHERS if text.get(n)] + ["pool_type"] * (text.get("pool_type", "argmax") != "argmax"):
        raise ValueError(f"{folder / CONFIG} describes no CLIP as OpenAI's: text_cfg has {', '.join(others)}")
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}; pickles are never loaded")
    names = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    with naming(folder / CONFIG), torch.device("meta"):
        model = package.CLIP(**{name: settings[name] for name in names if name in settings})
    with naming(folder / WEIGHTS):
        state = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
    if not pictures:
        del model.visual
        state = {name: value for name, value in state.items() if not name.startswith("visual.")}
    found = model.load_state_dict(state, strict=False, assign=True)
    for what, names in (("misses", found.missing_keys), ("has unknown", found.unexpected_keys)):
        if names:
            raise ValueError(f"{folder / WEIGHTS} {what} {', '.join(sorted(names)[:5])}")
    size = len(model.positional_embedding)
    model.attn_mask = torch.full((size, size), float("-inf")).triu_(1)          # the one buffer that is in no file
    return model.eval().requires_grad_(False)


class OpenClip:
    """A CLIP text encoder as `Clip`, through open_clip: penultimate hidden states without the final norm, and the
    pooled vector. Its tokenizer is open_clip's own, which differs from the released folders' in two points: it undoes
    HTML's entities, and it reads "!" as a word, which for CLIP-G's in those folders is padding.

    Args:
        folder: open_clip_config.json and open_clip_model.safetensors, of CLIP-L or bigG/14.
        part: "clip_l" or "clip_g": CLIP-L is padded with the end token and not projected, CLIP-G padded with 0 and
            projected, and its tokens stand beside CLIP-L's.
    Raises: ImportError without open_clip; FileNotFoundError; ValueError for other weights than `weights` names.
    """

    kind = "openclip"

    def __init__(self, folder: str, part: str, *, weights: str | None = None) -> None:
        path = Path(folder)
        self.folder, self.part, self.beside = folder, part, part == "clip_g"
        self.model: Any = network(path, pictures=False)
        self._weights = sampled_digest([path / CONFIG, path / WEIGHTS])
        if weights is not None and weights != self._weights:
            raise ValueError(f"text encoder {self.kind}: the weights in {folder} are {self._weights}, not {weights}")
        self.max_tokens, self.dim = self.model.positional_embedding.shape
        self._tokenizer = open_clip().SimpleTokenizer(context_length=self.max_tokens)
        self.pooled_dim = self.model.text_projection.shape[1] if self.beside else self.dim

    def ids(self, captions: Sequence[str]) -> Tensor:
        """[B, max_tokens]"""
        found: Tensor = self._tokenizer(list(captions))
        end = self._tokenizer.eot_token_id
        padded = torch.arange(self.max_tokens) > (found == end).int().argmax(-1, keepdim=True)
        return found.masked_fill(padded, 0 if self.beside else end)

    def features(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens [B, max_tokens, dim], pooled [B, pooled_dim])"""
        model, ids = self.model, self.ids(captions)
        ids = ids.to(model.positional_embedding.device)
        mask = model.attn_mask.to(ids.device)
        hidden = model.token_embedding(ids) + model.positional_embedding
        *blocks, last = model.transformer.resblocks
        for block in blocks:
            hidden = block(hidden, attn_mask=mask)
        ends = (ids == self._tokenizer.eot_token_id).int().argmax(-1)
        pooled = model.ln_final(last(hidden, attn_mask=mask))[torch.arange(len(ids)), ends]
        return hidden, pooled @ model.text_projection if self.beside else pooled

    def encode(self, captions: Sequence[str], batch: int = 64) -> list[TextFeatures]:
        return batched(self.features, captions, batch)

    def spec(self) -> dict[str, Any]:
        sizes = {"dim": self.dim, "pooled_dim": self.pooled_dim, "max_tokens": self.max_tokens}
        return {"kind": self.kind, "folder": self.folder, "part": self.part, "weights": self._weights, **sizes}
