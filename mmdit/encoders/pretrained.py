"""CLIP and T5 from local folders and released single files, through transformers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.checkpoint.tensors import variant
from mmdit.encoders import single_file
from mmdit.encoders.features import TextFeatures, batched
from mmdit.files import copied, naming, sampled_digest

CLIP_TOKENS = 77
SETTINGS = (".json", ".txt", ".model")
"""What files of a network's and a tokenizer's folder end in, besides weights."""


def transformers() -> Any:
    """The package, or an ImportError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("CLIP and T5 need the extra: pip install 'rfkernels[encoders]'") from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report of what it loaded: what matters of it is in the error."""
    log = logging.getLogger("transformers")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def settings_of(*folders: str | Path) -> str:
    """Of what else decides a network's output: its configuration, and a tokenizer's files."""
    digest = hashlib.sha256()
    for path in sorted({path for folder in folders for path in Path(folder).glob("*") if path.suffix in SETTINGS}):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def fingerprint_of(folder: Path) -> str:
    """Of the weights in a folder, or of a file: their headers and a thousandth of their bytes, evenly spread."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors; pickles are never loaded")
    return sampled_digest(files)


class _Pretrained:
    """What the encoders share: a model and a tokenizer from folders, or a model out of a single file."""

    kind = ""
    beside = False
    _told = False
    dim: int
    pooled_dim: int

    def __init__(
        self, folder: str, tokenizer: str, max_tokens: int, dtype: str | None, weights: str | None,
        settings: str | None,
    ) -> None:  # fmt: skip
        self.folder, self.tokenizer_folder, self.max_tokens, self._dtype = folder, tokenizer, max_tokens, dtype
        path = Path(folder)
        self._weights = fingerprint_of(path)
        if weights is not None and weights != self._weights:
            raise ValueError(f"text encoder {self.kind}: the weights in {folder} are {self._weights}, not {weights}")
        if tokenizer and not Path(tokenizer).is_dir():
            raise FileNotFoundError(f"text encoder {self.kind}: {tokenizer} is no folder with a tokenizer")
        self._settings = settings_of(*(f for f in (folder, tokenizer) if f and Path(f).is_dir()))
        if settings is not None and settings != self._settings:
            raise ValueError(f"text encoder {self.kind}: the configuration or tokenizer of {folder} is another")
        package, wanted = transformers(), getattr(torch, dtype) if dtype else None
        with naming(tokenizer or folder):
            self._tokenizer = self._own_tokenizer(package) if not tokenizer else package.AutoTokenizer.from_pretrained(
                tokenizer, local_files_only=True, trust_remote_code=False
            )
        with naming(folder), quiet():
            self.model: Any = self._from_file(package, path, wanted) if path.is_file() else single_file.loaded(
                self._model_class(package), folder, local_files_only=True, use_safetensors=True,
                dtype=wanted or "auto", variant=variant(path),
            )  # fmt: skip
        self.model.eval().requires_grad_(False)

    def _model_class(self, package: Any) -> Any:
        raise NotImplementedError

    def _from_file(self, package: Any, file: Path, dtype: torch.dtype | None) -> nn.Module:
        raise NotImplementedError

    def _own_tokenizer(self, package: Any) -> Any:
        """Where no folder is named."""
        raise ValueError(f"text encoder {self.kind}: its tokenizer is in no file; name the folder that holds it")

    def save(self, folder: Path, tokenizer: Path) -> None:
        """Into a folder each, as transformers reads them."""
        copied(self.folder, folder, self.model)
        copied(self.tokenizer_folder, tokenizer, self._tokenizer)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """[B, max_tokens]; padded as the tokenizer's configuration says, cut where too long, which is said once."""
        whole = [] if self._told else self._tokenizer(list(captions), verbose=False).input_ids
        length = max(map(len, whole), default=0)
        if length > self.max_tokens:
            self._told = True
            logging.getLogger(__name__).warning(
                "%s reads %d tokens; a prompt of %d is cut there", self.kind, self.max_tokens, length
            )
        encoded = self._tokenizer(
            list(captions), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        found: Tensor = encoded.input_ids
        return found

    def features(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens [B, max_tokens, dim], pooled [B, pooled_dim]) in the model's dtype."""
        raise NotImplementedError

    def encode(self, captions: Sequence[str], batch: int = 64) -> list[TextFeatures]:
        return batched(self.features, captions, batch)

    def spec(self) -> dict[str, Any]:
        where = {"kind": self.kind, "folder": self.folder, "tokenizer": self.tokenizer_folder}
        sizes = {"dim": self.dim, "pooled_dim": self.pooled_dim, "max_tokens": self.max_tokens}
        return where | {"weights": self._weights, "settings": self._settings, "dtype": self._dtype} | sizes


class Clip(_Pretrained):
    """A CLIP text encoder: penultimate hidden states without the final norm, and the pooled vector.

    Args:
        folder: of a CLIPTextModelWithProjection, or a single file that holds one.
        tokenizer: folder of its tokenizer, whose padding differs (CLIP-L pads with the end token, CLIP-G with 0); empty
            for open_clip's vocabulary.
        part: "clip_l" or "clip_g": which of a single file, and how open_clip's tokenizer pads.
        projected: the pooled vector after the text projection, as diffusers has it; False: before, as the reference
            code has CLIP-L's. The same if the projection is the identity.
        beside: for CLIP-G, whose tokens stand beside CLIP-L's.
    """

    kind = "clip"

    def __init__(
        self, folder: str, tokenizer: str = "", *, projected: bool = True, beside: bool = False,
        max_tokens: int = CLIP_TOKENS, dtype: str | None = None, weights: str | None = None,
        settings: str | None = None, part: str = "",
    ) -> None:  # fmt: skip
        self.part = part
        if part not in single_file.PADDING and (part or not tokenizer or Path(folder).is_file()):
            raise ValueError(f"text encoder clip: part is {part!r}; expected one of {', '.join(single_file.PADDING)}")
        super().__init__(folder, tokenizer, max_tokens, dtype, weights, settings)
        config: Any = self.model.config
        self.projected, self.beside = projected, beside
        self.dim = config.hidden_size
        self.pooled_dim = config.projection_dim if projected else config.hidden_size

    def _model_class(self, package: Any) -> Any:
        return package.CLIPTextModelWithProjection

    def _from_file(self, package: Any, file: Path, dtype: torch.dtype | None) -> nn.Module:
        return single_file.clip(package, file, self.part, dtype)

    def _own_tokenizer(self, package: Any) -> Any:
        return single_file.clip_tokenizer(package, self.part)

    def features(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        out = model.text_model(self.ids(captions).to(model.device), output_hidden_states=True)
        pooled = model.text_projection(out.pooler_output) if self.projected else out.pooler_output
        return out.hidden_states[-2], pooled

    def spec(self) -> dict[str, Any]:
        found = super().spec() | {"projected": self.projected, "beside": self.beside}
        return found | ({"part": self.part} if self.part else {})


class T5(_Pretrained):
    """A T5 encoder: final hidden states, padding attended to, no pooled vector.

    Args:
        folder: of a T5EncoderModel, or a single file that holds one. tokenizer: folder of its tokenizer.
        max_tokens: 77 in the paper, 256 in diffusers.
    """

    kind, pooled_dim = "t5", 0

    def __init__(
        self, folder: str, tokenizer: str, *, max_tokens: int = 256, dtype: str | None = None,
        weights: str | None = None, settings: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(folder, tokenizer, max_tokens, dtype, weights, settings)
        config: Any = self.model.config
        self.dim = config.d_model

    def _model_class(self, package: Any) -> Any:
        return package.T5EncoderModel

    def _from_file(self, package: Any, file: Path, dtype: torch.dtype | None) -> nn.Module:
        return single_file.t5(package, file, dtype)

    def features(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        ids = self.ids(captions).to(model.device)
        return model(ids)[0], torch.zeros(len(ids), 0)
