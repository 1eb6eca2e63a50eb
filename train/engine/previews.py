"""What is looked at now and then in training: losses on held-out data, how sharp attention is, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch

import rfkernels
from mmdit import autoencoder, keyed
from mmdit.encoders import Conditioning, build
from mmdit.model import MMDiT
from mmdit.sampling.sample import Settings, conditioned, denoise
from train.config import Config
from train.data.shards import Bucket, Cache, Sample
from train.engine import parallel
from train.engine.ema import EmaWeights
from train.engine.log import Log
from train.engine.parallel import World
from train.engine.validation import validate
from train.objectives import Objective
from train.objectives.flow import unit_for

OBSERVED = 8
"""Held-out samples whose attention is looked at."""


def sampling_extra(config: Config, cache: Cache) -> dict[str, Any]:
    """What mmdit.Sampler needs beside the weights."""
    settings = cache.settings
    return {
        "encoders": settings["encoders"],
        "autoencoder": autoencoder_of(config, cache),
        "formulation": config.formulation,
        "shift": config.shift,
        "sampling_shift": sampling_shift(config),
        "steps": config.samples.steps,
        "guidance": config.samples.guidance,
        "image_guidance": config.samples.image_guidance,
        "size": settings["sizes"][0],
    }


def sampling_shift(config: Config) -> float:
    return config.shift if config.samples.shift is None else config.samples.shift


def autoencoder_of(config: Config, cache: Cache) -> dict[str, Any]:
    """The spec of what decodes what the model draws."""
    spec: dict[str, Any] = cache.settings["autoencoder"]
    return {"kind": "unit", "of": spec, **asdict(unit_for(config, cache))} if config.unit_latents else spec


class Previews:
    """Validation losses, attention and pictures of a model on all processes, logged.

    Args: computing: the autocast under which the model runs.
    """

    def __init__(
        self, config: Config, cache: Cache, world: World, model: MMDiT, ema: EmaWeights, objective: Objective, log: Log,
        computing: Callable[[], AbstractContextManager[object]],
    ) -> None:  # fmt: skip
        self.config, self.cache, self.world, self.model, self.ema = config, cache, world, model, ema
        self.objective, self.log, self.computing = objective, log, computing
        self.held_out = cache.buckets("val")
        self.edits: list[Sample] = []
        """Held-out ones, to be drawn."""
        if config.objective == "editing" and self.held_out:
            self.edits = [self._edited()[row] for row in range(min(config.samples.count, len(self._edited())))]
        self.settled = False
        """Whether the model has run; see parallel.resharded."""
        self._said: list[str] = []
        self._text: tuple[Conditioning, Conditioning | None] | None = None

    def __call__(self, step: int, *, draw: bool, check: bool) -> float | None:
        """Returns: the validation loss of the average, if it was asked for."""
        self.model.eval()
        found: dict[str, float] = {}
        with self.computing(), self.ema.applied(self.model), self._spread():
            if check and self.held_out:
                found |= {f"validation/{name}": loss for name, loss in self._losses().items()}
            if draw:
                self._draw(step)
        if check and self.held_out:
            with self.computing(), self._spread():
                found |= {f"validation_raw/{name}": loss for name, loss in self._losses().items()}
                found |= {f"attention/{name}": value for name, value in self._attention().items()}
            self.log.write(step, **found)
        self.log.page()
        self.model.train()
        return found.get("validation/loss")

    def _spread(self) -> AbstractContextManager[None]:
        before, self.settled = self.settled, True
        return parallel.resharded(self.model, settle=not before)

    def _losses(self) -> dict[str, float]:
        v = self.config.validation
        return validate(self.model, self.objective, self.held_out, v.grid, v.samples, self.config.batch, self.world)

    @torch.no_grad()
    def _attention(self) -> dict[str, float]:
        """Of the weights in training at t = 1/2, over samples and blocks: the largest logit, and the mean entropy in
        nats (figure 5 of the paper). Of backbones that cross-attend, the attention among the image's tokens."""
        bucket = next(iter(self.held_out.values()))
        count = min(OBSERVED, len(bucket))
        highest, entropy = -math.inf, 0.0
        for first in range(0, count, self.world.size):               # one by one: padding would depend on the company
            mine = first + self.world.rank
            batch = self.objective.at([bucket[mine % count]], 0.5).to(self.world.device)
            with torch.compiler.set_stance("force_eager"), rfkernels.observe_attention() as layers:
                self.objective.loss(self.model, batch)
            highest = max(highest, *(float(layer.max_logit) for layer in layers))
            if mine < count:
                entropy += sum(float(layer.entropy) for layer in layers) / len(layers) / count
        return {"max_logit": self.world.largest(highest)[0], "entropy": self.world.sums(entropy)[0]}

    # --- pictures -----------------------------------------------------------------------------------------------------

    def prompts(self) -> list[str]:
        """Those of the configuration, or captions of the validation split; of edits, which need a picture, always."""
        chosen = self.config.samples
        if self.edits:
            return self._edited().captions()[: len(self.edits)]
        if chosen.prompts:
            return list(chosen.prompts)
        captions = [c for bucket in self.held_out.values() for c in bucket.captions()]
        return list(dict.fromkeys(captions))[: chosen.count]

    def _edited(self) -> Bucket:
        """Held-out edits of one size."""
        return next(iter(self.held_out.values()))

    def _draw(self, step: int) -> None:
        if self._text is None:
            self._text = self.world.shared(self._encoded() if self.world.main else None)
        if self._text is None:
            return
        s, c, settings = self.config.samples, self.config.model, self.cache.settings
        factor = c.token_pixels // c.patch_size
        height, width = settings["sizes"][0]
        shape, count = (c.in_channels, height // factor, width // factor), len(self._text[0].context)
        batch = self.objective.at(self.edits, 0.5) if self.edits else None
        before = [] if batch is None else [batch.reference.float()]
        if before:
            shape = tuple(before[0].shape[1:])
        noise = keyed.normals(shape, 0, "sampling noise", [(i,) for i in range(count)])
        chosen = Settings(
            steps=s.steps, guidance=s.guidance, image_guidance=s.image_guidance, shift=sampling_shift(self.config),
            graph=False,
        )  # fmt: skip
        parallel.gather_root(self.model)
        conditional, unconditional = self._text
        z = denoise(
            self.model, noise, conditional, unconditional, chosen, formulation=self.objective.formulation, masked=True,
            references=before,
        )  # fmt: skip
        if self.world.main:
            decoder = autoencoder.build(settings["autoencoder"])
            shown = [decoder.decode(self.objective.latents.decode(latents.cpu())) for latents in (*before, z)]
            self.log.picture(step, autoencoder.to_uint8(torch.cat(shown, 3)), self._said)

    def _encoded(self) -> tuple[Conditioning, Conditioning | None] | None:
        """The prompts' text; the encoders, which may be large, are there for this only, in the main process."""
        self._said = prompts = self.prompts()
        if not prompts:
            return None
        encoders = [build(spec) for spec in self.cache.settings["encoders"]]
        chosen = Settings(guidance=self.config.samples.guidance, image_guidance=self.config.samples.image_guidance)
        return conditioned(encoders, prompts, self.config.model, chosen.compares(bool(self.edits)))
