"""The text encoders of Stable Diffusion 3: CLIP-L, CLIP bigG/14 and T5-XXL, from local folders through transformers,
and how their features are put together.

Context: [CLIP-L | CLIP-G | zeros] in the channels of the first 77 tokens, then T5's tokens; no mask, padding is
attended to, as in training. Pooled: CLIP-L, CLIP-G. Any of the three may be left out; zeros stand in its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.text import ENCODERS, Conditioning, TextFeatures, assemble

CLIP_TOKENS = 77


def transformers() -> Any:
    """The package, or an ImportError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("CLIP and T5 need the extra: pip install 'rfkernels[encoders]'") from error
    return transformers


def fingerprint_of(folder: Path) -> str:
    """Of the weights in a folder: their headers and a thousandth of their bytes, evenly spread."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors; pickles are never loaded")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            for start in range(1 << 20, size, 1 << 22):
                file.seek(start)
                digest.update(file.read(1 << 12))
    return digest.hexdigest()[:16]


class _Pretrained:
    """What the encoders share: a model and a tokenizer from folders."""

    kind = ""
    beside = False
    dim: int
    pooled_dim: int

    def __init__(self, folder: str, tokenizer: str, max_tokens: int, dtype: str | None, weights: str | None) -> None:
        self.folder, self.tokenizer_folder, self.max_tokens, self._dtype = folder, tokenizer, max_tokens, dtype
        self._weights = fingerprint_of(Path(folder))
        if weights is not None and weights != self._weights:
            raise ValueError(f"text encoder {self.kind}: the weights in {folder} are {self._weights}, not {weights}")
        package = transformers()
        wanted = getattr(torch, dtype) if dtype else "auto"
        self.model: nn.Module = self._model_class(package).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=wanted
        )
        self.model.eval().requires_grad_(False)
        self._tokenizer = package.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)

    def _model_class(self, package: Any) -> Any:
        raise NotImplementedError

    def ids(self, captions: Sequence[str]) -> Tensor:
        """[B, max_tokens]; padded as the tokenizer's configuration says, cut where too long."""
        encoded = self._tokenizer(
            list(captions), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        found: Tensor = encoded.input_ids
        return found

    def features(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens [B, max_tokens, dim], pooled [B, pooled_dim]) in the model's dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, captions: Sequence[str], batch: int = 64) -> list[TextFeatures]:
        found = []
        for start in range(0, len(captions), batch):
            tokens, pooled = self.features(captions[start : start + batch])
            found += [TextFeatures(t, p) for t, p in zip(tokens.float().cpu(), pooled.float().cpu(), strict=True)]
        return found

    def spec(self) -> dict[str, Any]:
        where = {"kind": self.kind, "folder": self.folder, "tokenizer": self.tokenizer_folder}
        sizes = {"dim": self.dim, "pooled_dim": self.pooled_dim, "max_tokens": self.max_tokens}
        return where | {"weights": self._weights, "dtype": self._dtype} | sizes


class Clip(_Pretrained):
    """A CLIP text encoder: penultimate hidden states without the final norm, and the pooled vector.

    Args:
        folder: of a CLIPTextModelWithProjection. tokenizer: folder of its tokenizer, whose padding differs (CLIP-L pads
            with the end token, CLIP-G with 0).
        projected: the pooled vector after the text projection, as diffusers has it; False: before, as the reference
            code has CLIP-L's. The same if the projection is the identity.
        beside: for CLIP-G, whose tokens stand beside CLIP-L's.
    """

    kind = "clip"

    def __init__(
        self, folder: str, tokenizer: str, *, projected: bool = True, beside: bool = False,
        max_tokens: int = CLIP_TOKENS, dtype: str | None = None, weights: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(folder, tokenizer, max_tokens, dtype, weights)
        config: Any = self.model.config
        self.projected, self.beside = projected, beside
        self.dim = config.hidden_size
        self.pooled_dim = config.projection_dim if projected else config.hidden_size

    def _model_class(self, package: Any) -> Any:
        return package.CLIPTextModelWithProjection

    def features(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        out = model.text_model(self.ids(captions).to(model.device), output_hidden_states=True)
        pooled = model.text_projection(out.pooler_output) if self.projected else out.pooler_output
        return out.hidden_states[-2], pooled

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"projected": self.projected, "beside": self.beside}


class T5(_Pretrained):
    """A T5 encoder: final hidden states, padding attended to, no pooled vector.

    Args:
        folder: of a T5EncoderModel. tokenizer: folder of its tokenizer. max_tokens: 77 in the paper, 256 in diffusers.
    """

    kind, pooled_dim = "t5", 0

    def __init__(
        self, folder: str, tokenizer: str, *, max_tokens: int = 256, dtype: str | None = None,
        weights: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(folder, tokenizer, max_tokens, dtype, weights)
        config: Any = self.model.config
        self.dim = config.d_model

    def _model_class(self, package: Any) -> Any:
        return package.T5EncoderModel

    def features(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        ids = self.ids(captions).to(model.device)
        return model(ids)[0], torch.zeros(len(ids), 0)


def _from_spec(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Sizes are in a spec so that they can be told without loading the weights."""
    return lambda dim=0, pooled_dim=0, **arguments: kind(**arguments)


ENCODERS |= {"clip": _from_spec(Clip), "t5": _from_spec(T5)}


class Sd3Text:
    """The three encoders together, any of them absent.

    Args:
        clip_l, clip_g, t5: encoders, or None.
        context_dim, pooled_dim: of the model that reads them.
        t5_tokens: length of T5's part, present or not.
        device: where encoders run. offload: they wait on the CPU and visit the device one at a time.
    """

    def __init__(
        self,
        clip_l: Clip | None,
        clip_g: Clip | None,
        t5: T5 | None,
        *,
        context_dim: int = 4096,
        pooled_dim: int = 2048,
        t5_tokens: int = 256,
        device: torch.device | str = "cpu",
        offload: bool = False,
    ) -> None:
        self.encoders: tuple[_Pretrained | None, ...] = (clip_l, clip_g, t5)
        self.context_dim, self.device, self.offload = context_dim, torch.device(device), offload
        known = {0: clip_l, 1: clip_g}
        pooled = [None if e is None else e.pooled_dim for e in known.values()]
        if pooled.count(None) == 2:
            pooled = [768 * pooled_dim // 2048, None]
        widths = [p if p is not None else pooled_dim - sum(q or 0 for q in pooled) for p in pooled]
        if sum(widths) != pooled_dim:
            raise ValueError(f"Sd3Text: pooled vectors of {widths} channels; the model reads {pooled_dim}")
        dims = [w if e is None else e.dim for w, e in zip(widths, known.values(), strict=True)]
        if sum(dims) > context_dim or (t5 is not None and t5.dim > context_dim):
            given = [*dims, None if t5 is None else t5.dim]
            raise ValueError(f"Sd3Text: the encoders have {given} channels; the model reads {context_dim}")
        if t5 is not None:
            t5.max_tokens = t5_tokens
        shapes = [(CLIP_TOKENS, dims[0], widths[0]), (CLIP_TOKENS, dims[1], widths[1]), (t5_tokens, context_dim, 0)]
        self._absent = [TextFeatures(torch.zeros(n, d), torch.zeros(p)) for n, d, p in shapes]
        if not offload:
            for encoder in self.encoders:
                if encoder is not None:
                    encoder.model.to(self.device)

    @contextmanager
    def _visiting(self, encoder: _Pretrained) -> Iterator[None]:
        if self.offload:
            encoder.model.to(self.device)
        try:
            yield
        finally:
            if self.offload:
                encoder.model.to("cpu")

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """[B, 77 + t5_tokens, context_dim], the lengths, and [B, pooled_dim]; fp32 on the CPU."""
        columns = []
        for encoder, absent in zip(self.encoders, self._absent, strict=True):
            if encoder is None:
                columns.append([absent] * len(prompts))
                continue
            with self._visiting(encoder):
                columns.append(encoder.encode(prompts))
        return assemble(list(zip(*columns, strict=True)), self.context_dim, beside=(False, True, False))

    def zeros(self, count: int) -> Conditioning:
        """Every encoder's output zeroed: the paper's unconditional."""
        return assemble([self._absent] * count, self.context_dim, beside=(False, True, False))


def from_folder(folder: Path, names: Sequence[str], make: Callable[..., Any]) -> Any:
    """An encoder of a pipeline's folder, or None where it, or its entry in the index, is absent."""
    encoder, tokenizer = names
    index = folder / "model_index.json"
    listed = json.loads(index.read_text()) if index.is_file() else {}
    if not (folder / encoder).is_dir() or listed.get(encoder, [""])[0] is None:
        return None
    return make(str(folder / encoder), str(folder / tokenizer))
