"""What tells how well pictures fit captions, and makes features of them for a distance between sets of pictures."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.encoders import openclip
from mmdit.encoders.pretrained import quiet
from mmdit.files import naming, read_object

BATCH = 64         # pictures or captions at a time


class Critic(Protocol):
    """Of pictures uint8 [N, H, W, 3]."""

    def score(self, images: np.ndarray, captions: Sequence[str]) -> float:
        """How well pictures fit their captions; higher is better."""
        ...

    def embedded(self, images: np.ndarray) -> np.ndarray:
        """Features, fp64 [N, D]."""
        ...


class _Embeddings:
    """CLIP score and CLIP features, of what makes embeddings of pictures and of captions."""

    def _pictures(self, images: np.ndarray) -> Tensor:
        raise NotImplementedError

    def _captions(self, captions: Sequence[str]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def score(self, images: np.ndarray, captions: Sequence[str]) -> float:
        """Mean cosine of a picture's and its caption's embeddings, in [-1, 1] (Hessel et al. 2021, without their factor
        2.5 and floor of 0)."""
        pictures = F.normalize(_batched(images, self._pictures), dim=-1)
        texts = F.normalize(_batched(captions, self._captions), dim=-1)
        return float((pictures * texts).sum(-1).mean())

    @torch.no_grad()
    def embedded(self, images: np.ndarray) -> np.ndarray:
        """The projected image features, not normalised."""
        return _batched(images, self._pictures).numpy()


class Clip(_Embeddings):
    """CLIP score and CLIP features, of a CLIPModel that transformers reads: ViT-L/14 in the paper.

    Args: folder: model, tokenizer and image processor, as `save_pretrained` leaves them; nothing is fetched.
    """

    def __init__(self, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        try:
            import transformers
        except ImportError as error:
            raise ImportError("CLIP as a critic needs transformers: pip install transformers") from error
        # without torchvision the name without Pil is the same class, and says so each time
        pil = "CLIPImageProcessorPil"
        processor = getattr(transformers, pil if hasattr(transformers, pil) else "CLIPImageProcessor")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder} is no folder of a CLIPModel")
        self.model = _loaded(transformers.CLIPModel, folder, use_safetensors=True).eval().to(device)
        self.tokenizer = _loaded(transformers.CLIPTokenizer, folder)
        self.processor = _loaded(processor, folder)
        self.device = device

    def _pictures(self, images: np.ndarray) -> Tensor:
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        out: Tensor = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return out

    def _captions(self, captions: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(self.device)
        out: Tensor = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        return out


class OpenClip(_Embeddings):
    """CLIP score and CLIP features, of a CLIP in open_clip's files.

    Args: folder: open_clip_config.json, whose preprocess_cfg is followed, and open_clip_model.safetensors.
    """

    def __init__(self, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        package, path = openclip.open_clip(), Path(folder)
        self.model = openclip.network(path, pictures=True).to(device)
        settings = read_object(path / openclip.CONFIG).get("preprocess_cfg", {})
        with naming(path / openclip.CONFIG):
            known = {"size": self.model.visual.image_size, **settings}
            from open_clip.transform import PreprocessCfg, image_transform_v2

            self._shown = image_transform_v2(PreprocessCfg(**known), is_train=False)
        self.tokenizer = package.SimpleTokenizer(context_length=self.model.context_length)
        self.device = device

    def _pictures(self, images: np.ndarray) -> Tensor:
        from PIL import Image

        pixels = torch.stack([self._shown(Image.fromarray(image)) for image in images]).to(self.device)
        out: Tensor = self.model.encode_image(pixels)
        return out

    def _captions(self, captions: Sequence[str]) -> Tensor:
        out: Tensor = self.model.encode_text(self.tokenizer(list(captions)).to(self.device))
        return out


def clip(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Critic:
    """CLIP from a folder of transformers or of open_clip."""
    return (OpenClip if openclip.is_one(Path(folder)) else Clip)(folder, device)


def _loaded(kind: Any, folder: str | os.PathLike[str], **more: Any) -> Any:
    """From a folder; no pickle, no code that lies in it. Raises: an error that names it."""
    with naming(folder), quiet():
        return kind.from_pretrained(folder, local_files_only=True, **more)


def _batched(items: Sequence[Any] | np.ndarray, of: Callable[[Any], Tensor]) -> Tensor:
    """fp64 on the CPU."""
    parts = [of(items[start : start + BATCH]).double().cpu() for start in range(0, len(items), BATCH)]
    return torch.cat(parts)


def feature_network(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function of the user's: uint8 [N, H, W, 3] -> features [N, D].

    Args: name: "package.module:function"; it is called with BATCH pictures at most.
    Raises: ValueError if there is none of that name.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"features is {name!r}; expected package.module:function ({error})") from error

    def features(images: np.ndarray) -> np.ndarray:
        parts = [found(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])

    return features
