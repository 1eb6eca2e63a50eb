"""Recipes: functions that return a configuration. Flags of `python -m train run RECIPE` change single fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdit import presets
from mmdit.adapters import Lora
from mmdit.config import MMDiTConfig
from train.config import Config, Ema, Optimizer, Parallel, Preference, Samples, Validation

UNCONDITIONAL = 0.1          # with one encoder, the share that 0.464 leaves unconditional with the paper's three


def small_model(depth: int, head_dim: int, text_dim: int) -> MMDiTConfig:
    """Four heads on 32 x 32 pixels: pixel space of factor 2, so 12 channels and 64 tokens."""
    return MMDiTConfig(
        depth=depth,
        heads=4,
        head_dim=head_dim,
        in_channels=12,
        context_dim=text_dim,
        pooled_dim=text_dim,
        qk_norm=True,
        resolution=32,
        max_height=32,
        max_width=32,
        position_base=96,
        token_pixels=4,
    )


def fast_optimizer(warmup: int) -> Optimizer:
    """Muon inside blocks, large steps elsewhere: few minutes have few steps."""
    return Optimizer(
        kind="muon", muon_lr=0.03, lr=4e-3, betas=(0.9, 0.99), warmup=warmup, decay="linear", weight_decay=0.01
    )


def shapes() -> Config:
    """Captioned shapes, 32 x 32 pixels, on two CPU cores (make demo)."""
    return Config(
        run=Path("runs/shapes"),
        cache=Path("cache/shapes"),
        model=small_model(depth=4, head_dim=16, text_dim=64),
        formulation="x/lognorm(1.00,1.00)",
        unit_latents=True,
        batch=16,
        minutes=2,
        optimizer=fast_optimizer(warmup=30),
        ema=Ema(decay=0.9, every=5),
        encoder_dropout=UNCONDITIONAL,
        validation=Validation(every=1000, samples=64),
        samples=Samples(every=0, steps=12, guidance=2.0, shift=2.0),
        checkpoint_every=1000,
        threads=1,                  # a second one gains nothing on matrices as small as these
    )


def openmoji() -> Config:
    """OpenMoji with MiniLM text features, 32 x 32 pixels, on two CPU cores (make demo-emoji)."""
    seen = ("red heart", "grinning face", "crescent moon", "red apple", "dog face", "sailboat", "umbrella", "pizza")
    unseen = ("a purple apple", "a green heart", "a blue book", "a face with a hat", "two red circles", "a black cat",
              "an orange boat", "moon and stars")  # fmt: skip
    return Config(
        run=Path("runs/openmoji"),
        cache=Path("cache/openmoji"),
        model=small_model(depth=6, head_dim=48, text_dim=384),
        formulation="x/lognorm(1.00,1.00)",
        unit_latents=True,
        batch=16,
        minutes=20,
        optimizer=fast_optimizer(warmup=100),
        ema=Ema(decay=0.9, every=10),
        encoder_dropout=UNCONDITIONAL,
        validation=Validation(every=1000),
        samples=Samples(every=2000, guidance=2.0, shift=2.0, prompts=seen + unseen),
        checkpoint_every=1000,
    )


def _tuned_shapes(run: str, cache: str, rank: int, lr: float) -> Config:
    """A LoRA of the demo's model, on every linear layer, in 400 steps."""
    return replace(
        shapes(),
        run=Path(run),
        cache=Path(cache),
        initial=Path("runs/shapes-0/model.safetensors"),
        adapter=Lora(rank=rank, targets=("all",)),
        minutes=None,
        steps=400,
        optimizer=Optimizer(lr=lr, betas=(0.9, 0.99), warmup=20, decay="linear"),
        checkpoint_every=200,
    )


def shapes_word() -> Config:
    """A new colour from 20 pictures, as a LoRA of the demo's model (make demo-tune)."""
    config = _tuned_shapes("runs/word", "cache/new-colour", rank=8, lr=3e-3)
    return replace(config, prior=Path("cache/shapes"), batch=8)


def shapes_preference() -> Config:
    """Clean edges over ragged ones, by the demo's own pictures in pairs (make demo-tune)."""
    config = _tuned_shapes("runs/preference", "cache/edges", rank=16, lr=1e-3)
    chosen = Preference(beta=200.0, safeguard=0.9)                   # without the safeguard everything gets worse
    return replace(config, objective="preference", preference=chosen, encoder_dropout=0.0)


def shapes_edit() -> Config:
    """Instruction editing: the demo's model learns ten tasks on its shapes (make demo-tune)."""
    base = shapes()
    return replace(
        base,
        run=Path("runs/edit"),
        cache=Path("cache/shapes-edits"),
        initial=Path("runs/shapes-0/model.safetensors"),
        model=replace(base.model, reference_channels=base.model.in_channels),
        objective="editing",
        formulation="x/lognorm(2.00,1.00)",   # nearer to noise than the demo: .96 instead of .93 is kept
        minutes=None,
        steps=8000,
        encoder_dropout=0.0,
        samples=replace(base.samples, image_guidance=1.5),
    )


# --- the paper's ------------------------------------------------------------------------------------------------------

DEPTHS = (15, 18, 21, 24, 30, 38)


def pretraining(depth: int) -> Config:
    """Pretraining of the paper's scaling study (sections 5.3 and 5.4).

    256 pixels, batch 4096, 500,000 steps, logit-normal times. Its cache:
    `precompute --pipeline FOLDER --encoders clip_l clip_g t5 --sizes 256 256`.
    """
    return Config(
        run=Path(f"runs/d{depth}-256"),
        cache=Path("cache/256"),
        model=presets.by_depth(depth),
        batch=4096,
        steps=500_000,
        validation=Validation(every=5000, samples=1024),
        samples=Samples(every=10_000, steps=50, guidance=5.0),
        checkpoint_every=2500,
    )


MIXED = {512: (768, 768), 1024: (1536, 1536)}
"""The tallest and widest buckets at a resolution: aspect ratios of one area up to 2.25."""


def finetuning(depth: int, resolution: int) -> Config:
    """Fine-tuning at a higher resolution with mixed aspect ratios (section 5.3.2).

    From the weights of the resolution below: positions centred for the largest bucket, QK-norm added where the start
    has none, times shifted (3.0 at 1024, as in the paper; 2.0 at 512, by equation 23). Batch and steps are not the
    paper's, which does not give them.
    """
    below, (tallest, widest) = {512: 256, 1024: 512}[resolution], MIXED[resolution]
    return Config(
        run=Path(f"runs/d{depth}-{resolution}"),
        cache=Path(f"cache/{resolution}"),
        model=presets.by_depth(depth, resolution=resolution, max_height=tallest, max_width=widest),
        shift=3.0 if resolution == 1024 else 2.0,
        initial=Path(f"runs/d{depth}-{below}/model.safetensors"),
        batch=1024,
        steps=100_000,
        validation=Validation(every=5000, samples=512),
        samples=Samples(every=10_000, steps=50, guidance=5.0),
        checkpoint_every=1000,
        parallel=Parallel(checkpointing="selective"),
    )


def preferences(depth: int) -> Config:
    """The paper's preferences (appendix C): DPO with LoRA of rank 128 on every linear layer.

    From the weights at 1024 pixels, 4,000 steps of the 2B model and 2,000 of the 8B one. The paper does not give beta,
    batch and learning rate; nor did anybody try these here.
    """
    return replace(
        finetuning(depth, 1024),
        run=Path(f"runs/dpo-d{depth}"),
        cache=Path("cache/pairs"),
        initial=Path(f"runs/d{depth}-1024/model.safetensors"),
        adapter=Lora(rank=128, targets=("all",)),
        objective="preference",
        preference=Preference(beta=500.0),
        encoder_dropout=0.0,
        batch=128,
        steps={24: 4000, 38: 2000}[depth],
        optimizer=Optimizer(lr=1e-5, warmup=200),
        ema=Ema(decay=0.99, every=1),
        parallel=Parallel(checkpointing="full"),
    )


# --- fine-tuning of released weights ----------------------------------------------------------------------------------

RELEASED: dict[str, tuple[Callable[[], MMDiTConfig], Path]] = {
    "sd3-medium": (presets.sd3_medium, Path("models/stable-diffusion-3-medium-diffusers")),
    "sd35-medium": (presets.sd35_medium, Path("models/stable-diffusion-3.5-medium")),
    "sd35-large": (presets.sd35_large, Path("models/stable-diffusion-3.5-large")),
}
"""Architecture, and where --initial looks for the weights, in any layout, unless told."""


def _of_released(name: str, run: str) -> Config:
    """What both kinds of fine-tuning share. Times are those of the paper at 1024 pixels; text is dropped whole, at the
    rate that others use for few pictures (the paper's 0.464 for each encoder is for pretraining)."""
    architecture, weights = RELEASED[name]
    return Config(
        run=Path(f"runs/{run}"),
        cache=Path("cache/1024"),
        model=architecture(),
        shift=3.0,
        initial=weights,
        batch=4,
        steps=2000,
        encoder_dropout=0.0,
        caption_dropout=0.1,
        validation=Validation(every=500, samples=16),
        samples=Samples(every=500, steps=28, guidance=5.0, count=4),
        checkpoint_every=250,
        keep=4,
        parallel=Parallel(checkpointing="full", accumulate=4),
    )


def lora(name: str) -> Config:
    """A LoRA of released weights, from a few pictures, in 24 GB.

    Rank 16 of the attention of all streams. Its cache: `precompute --pipeline FOLDER --encoders clip_l clip_g t5
    --sizes 1024 1024`.
    """
    config = _of_released(name, f"lora-{name}")
    optimizer = Optimizer(lr=1e-4, warmup=100, weight_decay=0.01)
    return replace(config, adapter=Lora(rank=16), optimizer=optimizer, ema=Ema(decay=0.99, every=1))


def full(name: str) -> Config:
    """Fine-tuning of all weights of a released model.

    A small learning rate and clipping: the 8B model diverges at 4e-5. Its cache as for a LoRA.
    """
    config = _of_released(name, f"full-{name}")
    optimizer = Optimizer(lr=5e-6 if name == "sd35-large" else 1e-5, warmup=500, clip=0.5)
    return replace(config, batch=32, optimizer=optimizer, ema=Ema(decay=0.99, every=10))


def edit(name: str) -> Config:
    """Instruction editing by a released model, whose input takes the picture to edit beside the latent.

    Settings of InstructPix2Pix and UltraEdit (512 pixels, 5 % of each dropout); the paper (appendix D) gives none, and
    nobody tried these here. Its cache: `precompute --pipeline FOLDER --encoders clip_l clip_g t5 --sizes 512 512`.
    """
    config = _of_released(name, f"edit-{name}")
    model = replace(config.model, reference_channels=config.model.in_channels)
    samples = replace(config.samples, guidance=7.0, image_guidance=1.5)
    optimizer = Optimizer(lr=5e-5, warmup=500, decay="cosine")
    return replace(
        config, cache=Path("cache/edits"), model=model, objective="editing", batch=256, steps=20_000, shift=2.0,
        caption_dropout=0.0, samples=samples, optimizer=optimizer, ema=Ema(decay=0.99, every=10),
    )  # fmt: skip


def _named(recipe: Callable[..., Config], *arguments: Any) -> Callable[[], Config]:
    def named() -> Config:
        return recipe(*arguments)

    named.__doc__ = recipe.__doc__
    return named


RECIPES: dict[str, Callable[[], Config]] = {
    "shapes": shapes,
    "openmoji": openmoji,
    "shapes-word": shapes_word,
    "shapes-preference": shapes_preference,
    "shapes-edit": shapes_edit,
    **{f"d{depth}-256": _named(pretraining, depth) for depth in DEPTHS},
    **{f"d{depth}-{size}": _named(finetuning, depth, size) for depth in DEPTHS for size in MIXED},
    **{f"dpo-d{depth}": _named(preferences, depth) for depth in (24, 38)},
    **{f"lora-{name}": _named(lora, name) for name in RELEASED},
    **{f"full-{name}": _named(full, name) for name in RELEASED},
    **{f"edit-{name}": _named(edit, name) for name in RELEASED},
}
