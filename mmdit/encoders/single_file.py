"""CLIP and T5 out of a released single file, or a file of their own: what a folder's config.json says, tensors tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.checkpoint import parts

ACTIVATIONS, PADDING = {"clip_l": "quick_gelu", "clip_g": "gelu"}, {"clip_l": "<|endoftext|>", "clip_g": "!"}
"""What no tensor tells."""
HEAD_DIM = 64


def clip(package: Any, file: Path, part: str, dtype: torch.dtype | None) -> nn.Module:
    """A CLIPTextModelWithProjection of transformers. CLIP-L's projection, which the reference code does not use, is the
    identity where it is absent."""
    state, dtype = parts.read(file, part, dtype)
    vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
    if part == "clip_l":
        state.setdefault("text_projection.weight", torch.eye(width, dtype=dtype))
    config = package.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=max(1, width // HEAD_DIM),
        num_hidden_layers=_layers(state, "text_model.encoder.layers."), hidden_act=ACTIVATIONS[part],
        intermediate_size=len(_of(state, file, "text_model.encoder.layers.0.mlp.fc1.weight")),
        max_position_embeddings=len(_of(state, file, "text_model.embeddings.position_embedding.weight")),
        projection_dim=len(_of(state, file, "text_projection.weight")), bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )  # fmt: skip
    return loaded(package.CLIPTextModelWithProjection, None, config=config, state_dict=state, dtype=dtype)


def t5(package: Any, file: Path, dtype: torch.dtype | None) -> nn.Module:
    """A T5EncoderModel of transformers."""
    state, dtype = parts.read(file, "t5xxl", dtype)
    state.pop("encoder.embed_tokens.weight", None)                                                # shared.weight again
    first = "encoder.block.0.layer."
    buckets, heads = _of(state, file, f"{first}0.SelfAttention.relative_attention_bias.weight").shape
    gated = f"{first}1.DenseReluDense.wi_1.weight" in state
    config = package.T5Config(
        vocab_size=len(state["shared.weight"]), d_model=state["shared.weight"].shape[1], num_heads=heads,
        num_layers=_layers(state, "encoder.block."), relative_attention_num_buckets=buckets,
        d_kv=len(_of(state, file, f"{first}0.SelfAttention.q.weight")) // heads,
        d_ff=len(_of(state, file, f"{first}1.DenseReluDense.wi{'_0' if gated else ''}.weight")),
        feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    return loaded(package.T5EncoderModel, None, config=config, state_dict=state, dtype=dtype)


def clip_tokenizer(package: Any, part: str) -> Any:
    """The tokenizer of CLIP-L or CLIP-G, its vocabulary that of the package open_clip: the same for every CLIP."""
    try:
        from open_clip import SimpleTokenizer
    except ImportError as error:
        raise ImportError(
            "CLIP's tokenizer comes from open_clip: pip install 'rfkernels[openclip]', or name a folder that holds one"
        ) from error
    known = SimpleTokenizer()
    words = [*list(known.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    return package.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=list(known.bpe_ranks), pad_token=PADDING[part],
        model_max_length=known.context_length,
    )  # fmt: skip


def loaded(kind: Any, *source: Any, **more: Any) -> nn.Module:
    """`from_pretrained`, which draws at random what it does not find or what has another shape.

    Raises: ValueError that names both."""
    model, report = kind.from_pretrained(*source, output_loading_info=True, ignore_mismatched_sizes=True, **more)
    problems = [f"missing {name}" for name in sorted(report["missing_keys"])]
    problems += [
        f"{name} has shape {list(stored)}, expected {list(wanted)}"
        for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    if problems:
        raise ValueError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else ""))
    return model


def _of(state: dict[str, Tensor], file: Path, name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"{file}: missing {name}")
    return state[name]


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max((int(n.removeprefix(prefix).split(".")[0]) for n in state if n.startswith(prefix)), default=-1)
