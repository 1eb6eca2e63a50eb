"""The three layouts of MM-DiT weights on disk, as a table: ours, that of the released files, and diffusers'.

A `Piece` is what a conversion moves: some rows of a parameter of ours. In the released layout it is one tensor, in
diffusers' one or three (q, k, v apart), and where diffusers keeps (scale, shift) instead of (shift, scale) the halves
of its rows change places. Nothing else differs and no value is touched: every conversion is exact, both ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch

from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT

LAYOUTS = ("native", "sd3", "diffusers")
SD3_PREFIX = "model.diffusion_model."
OTHER_PARTS = ("first_stage_model.", "text_encoders.", "conditioner.", "model_ema.", "control")
"""What else a released file may hold: autoencoder, text encoders; a ControlNet is another model."""

# (ours, released, diffusers'); each stands for a weight and a bias
MODULES = (
    ("patch_embed.proj", "x_embedder.proj", "pos_embed.proj"),
    ("time_embed.fc1", "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("time_embed.fc2", "t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("pooled_embed.fc1", "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("pooled_embed.fc2", "y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embed.0", "context_embedder", "context_embedder"),
    ("final_layer.unembed.linear", "final_layer.linear", "proj_out"),
)
POSITIONS = ("patch_embed.pos_embed", "pos_embed", "pos_embed.pos_embed")
# Of half a block: (ours and released, diffusers' for the image, diffusers' for the text)
HALF_MODULES = (
    ("attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("attn.proj", ("attn.to_out.0",), ("attn.to_add_out",)),
    ("attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v"), ()),
    ("attn2.proj", ("attn2.to_out.0",), ()),
    ("mlp.fc1", ("ff.net.0.proj",), ("ff_context.net.0.proj",)),
    ("mlp.fc2", ("ff.net.2",), ("ff_context.net.2",)),
)
# (ours, released, diffusers' for the image, for the text); a weight alone
HALF_NORMS = (
    ("attn.q_norm", "attn.ln_q", "attn.norm_q", "attn.norm_added_q"),
    ("attn.k_norm", "attn.ln_k", "attn.norm_k", "attn.norm_added_k"),
    ("attn2.q_norm", "attn2.ln_q", "attn2.norm_q", ""),
    ("attn2.k_norm", "attn2.ln_k", "attn2.norm_k", ""),
)
HALVES = {"image": ("x_block", "norm1.linear"), "context": ("context_block", "norm1_context.linear")}
"""The released name of half a block, and diffusers' of its modulation."""
MODULATION, FINAL_MODULATION = "modulation.linear", ("final_layer.adaLN_modulation.1", "norm_out.linear")


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter of ours and where they stand in the other layouts."""

    native: str
    shape: tuple[int, ...]
    sd3: str
    diffusers: tuple[str, ...]
    first: int = 0
    """Row of the native parameter where it begins."""
    swapped: bool = False
    """diffusers has (scale, shift)."""

    def names(self, layout: str) -> tuple[str, ...]:
        return {"native": (self.native,), "sd3": (self.sd3,), "diffusers": self.diffusers}[layout]

    def part_shape(self, layout: str) -> tuple[int, ...]:
        """Of each tensor that it is in this layout."""
        return (self.shape[0] // len(self.names(layout)), *self.shape[1:])


def pieces(config: MMDiTConfig) -> tuple[list[Piece], dict[str, tuple[int, ...]]]:
    """All pieces of a model, in our order, and the shapes of our parameters.

    A model that no other layout knows has pieces with our names alone."""
    with torch.device("meta"):
        model = MMDiT(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.weight_sets != 2 or config.backbone != "joint" or config.reference_tokens:
        return [Piece(name, shape, "", ()) for name, shape in shapes.items()], shapes
    table = dict(_table(config))
    found: list[Piece] = []
    for name, shape in shapes.items():
        if name.startswith(MODULATION):
            found += _modulation(model, name, shape, config)
        else:
            sd3, diffusers = table[name]
            found.append(Piece(name, shape, sd3, diffusers))
    return found, shapes


def _table(config: MMDiTConfig) -> Iterator[tuple[str, tuple[str, tuple[str, ...]]]]:
    """(our name, (released, diffusers'))"""
    yield POSITIONS[0], (POSITIONS[1], (POSITIONS[2],))
    for part in (".weight", ".bias"):
        for ours, sd3, diffusers in MODULES:
            yield ours + part, (sd3 + part, (diffusers + part,))
    for i in range(config.depth):
        for half, (released, _) in HALVES.items():
            ours, theirs, blocks = f"blocks.{i}.{half}.", f"joint_blocks.{i}.{released}.", f"transformer_blocks.{i}."
            for name, image, text in HALF_MODULES:
                names = image if half == "image" else text
                for part in (".weight", ".bias"):
                    yield f"{ours}{name}{part}", (f"{theirs}{name}{part}", tuple(f"{blocks}{n}{part}" for n in names))
            for name, sd3, image_norm, text_norm in HALF_NORMS:
                norm = image_norm if half == "image" else text_norm
                yield f"{ours}{name}.weight", (f"{theirs}{sd3}.weight", (f"{blocks}{norm}.weight",))


def _modulation(model: MMDiT, name: str, shape: tuple[int, ...], config: MMDiTConfig) -> Iterator[Piece]:
    """The stacked projection, half a block after half a block, the final layer last."""
    part, first, counts = name.removeprefix(MODULATION), 0, iter(model.modulation.counts)
    for i, block in enumerate(model.blocks):
        for half, _ in block.named_children():
            count, (released, theirs) = next(counts), HALVES[half]
            yield Piece(
                name, (count * config.width, *shape[1:]), f"joint_blocks.{i}.{released}.adaLN_modulation.1{part}",
                (f"transformer_blocks.{i}.{theirs}{part}",), first, swapped=count == 2,
            )  # fmt: skip
            first += count * config.width
    sd3, diffusers = FINAL_MODULATION
    yield Piece(name, (2 * config.width, *shape[1:]), sd3 + part, (diffusers + part,), first, swapped=True)


# --- which layout, which configuration -------------------------------------------------------------------------------


LORA = re.compile(r"\.lora_(A|B|down|up)\b|\.lora\.(down|up)\.|^lora_(unet|te\d?)_|\.alpha$")


def detect(names: Mapping[str, Any], where: str) -> tuple[str, str]:
    """(layout, prefix) of the model's tensors in a file that may hold other parts too.

    Raises: ValueError if it is none, or several at once."""
    signs = {
        "native": r"modulation\.linear\.weight",
        "sd3": r"joint_blocks\.\d+\.",
        "diffusers": r"transformer_blocks\.\d+\.",
    }
    if names and all(LORA.search(name) for name in names):
        raise ValueError(f"{where} holds low-rank adapters (LoRA), not a model's weights: they go on top of a model")
    found: dict[str, tuple[str, str]] = {}
    for layout, sign in signs.items():
        for name in names:
            if (match := re.search(sign, name)) and not name.startswith(OTHER_PARTS):
                found[layout] = (name, name[: match.start()])
                break
    if len(found) > 1:
        listed = " and ".join(f"{layout} ({name})" for layout, (name, _) in found.items())
        raise ValueError(f"{where} mixes layouts: {listed}")
    if not found:
        first = ", ".join(list(names)[:3]) or "no tensors at all"
        raise ValueError(f"{where} holds no MM-DiT in a layout that is known ({', '.join(LAYOUTS)}); it has {first}")
    ((layout, (_, prefix)),) = found.items()
    return layout, prefix


def infer(layout: str, shapes: Mapping[str, tuple[int, ...]], known: dict[str, Any], where: str) -> MMDiTConfig:
    """The configuration of a model in the released layout or diffusers', from the shapes of its tensors.

    Args: known: what else is known: heads and head_dim of a model without QK-norm, whose tensors do not tell.
    Raises: ValueError that names the tensor that is missing or odd."""

    def shape(sd3: str, diffusers: str) -> tuple[int, ...]:
        name = sd3 if layout == "sd3" else diffusers
        if name not in shapes:
            raise ValueError(f"{where} has no {name}, from which its configuration is told")
        return shapes[name]

    block = r"joint_blocks\.(\d+)\." if layout == "sd3" else r"transformer_blocks\.(\d+)\."
    # by number: "10" sorts before "9", and a set has no order
    depth = 1 + max(int(match[1]) for name in shapes if (match := re.match(block, name)))
    dual = r"x_block\.attn2\.qkv\.weight" if layout == "sd3" else r"attn2\.to_q\.weight"
    dual_blocks = sorted(int(match[1]) for name in shapes if (match := re.fullmatch(block + dual, name)))
    width, channels, patch, _ = shape("x_embedder.proj.weight", "pos_embed.proj.weight")
    in_channels = shape("final_layer.linear.weight", "proj_out.weight")[0] // patch**2
    if in_channels > channels:
        raise ValueError(f"{where}: it reads {channels} channels and gives {in_channels}; expected at most as many")
    _, count, _ = shape("pos_embed", "pos_embed.pos_embed")
    side = isqrt(count)
    if side * side != count:
        raise ValueError(f"{where}: its position table has {count} places, which is no square")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight", "transformer_blocks.0.attn.norm_q.weight"
    qk_norm = norm[layout == "diffusers"] in shapes
    hidden = shape("joint_blocks.0.x_block.mlp.fc1.weight", "transformer_blocks.0.ff.net.0.proj.weight")[0]
    values: dict[str, Any] = {
        "depth": depth, "in_channels": in_channels, "reference_channels": channels - in_channels,
        "patch_size": patch, "qk_norm": qk_norm,
        "dual_attention": tuple(dual_blocks), "resolution": 1024, "max_height": 8 * patch * side,
        "max_width": 8 * patch * side, "token_pixels": 8 * patch,
        "context_dim": shape("context_embedder.weight", "context_embedder.weight")[1],
        "pooled_dim": shape("y_embedder.mlp.0.weight", "time_text_embed.text_embedder.linear_1.weight")[1],
        "mlp_ratio": hidden // width,
    }  # fmt: skip
    if qk_norm:
        values["head_dim"] = shape(*norm)[0]
        values["heads"] = width // values["head_dim"]
    elif "heads" not in known:
        values["heads"], values["head_dim"] = depth, width // depth          # the released models' rule
        if width % depth:
            raise ValueError(f"{where}: heads are not told by its tensors: width {width}, depth {depth}; give heads")
    config = MMDiTConfig(**{**values, **known})
    if config.width != width:
        raise ValueError(f"{where}: {config.heads} heads of {config.head_dim} channels; its width is {width}")
    if 8 * patch * side < config.resolution:
        config = replace(config, resolution=8 * patch * side)
    return config
