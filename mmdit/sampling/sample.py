"""From conditioning to latents, and from prompts to images with a trained model."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmdit import adapters, autoencoder, checkpoint, devices, flow, keyed, numbers
from mmdit.config import MMDiTConfig
from mmdit.encoders import Conditioning, TextEncoder, assemble, build
from mmdit.files import naming
from mmdit.flow.solvers import SCHEDULES, SOLVERS, Constraint, Progress
from mmdit.model import MMDiT
from mmdit.sampling import graphs
from mmdit.sampling.references import Edit, encoded

if TYPE_CHECKING:
    from PIL import Image

WEIGHTS, ADAPTER = "model.safetensors", "adapter.safetensors"     # what a run folder offers for sampling
SHIFTS = 1e-3, 1e3                # beyond, times run together in fp32
MODULATION_BYTES = 1 << 30        # of all steps at once, at most


@dataclass(frozen=True)
class Settings:
    """How a sample is drawn.

    Examples:
        >>> Settings(steps=28, shift=3.0, guidance=4.5).guided
        True
    """

    steps: int = 50
    solver: str = "euler"
    """euler, heun or dpmpp_2m."""
    schedule: str = "paper"
    """paper, or sd3_release with its doubly shifted last time."""
    shift: float = 1.0
    """alpha of the schedule: 3.0 at 1024 pixels."""
    guidance: float = 5.0
    """Classifier-free guidance; up to 1: none, and half the work, as diffusers' pipelines have it."""
    image_guidance: float = 1.5
    """Of a picture to edit; `guidance` is then the instruction's. 1: none, and two evaluations instead of three."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times, ends included, at which guidance acts."""
    skip_blocks: Collection[int] = ()
    """Blocks passed over for skip-layer guidance: (7, 8, 9) for SD3.5 medium."""
    skip_scale: float = 2.8
    """Its scale: v += scale (v_c - v_c without those blocks)."""
    skip_from: float = 0.01
    """Share of the steps after which it acts."""
    skip_until: float = 0.2
    """Share of the steps before which it acts."""
    graph: bool = True
    """On a GPU, replay the model's forward as a CUDA graph: no host time between kernels. What is captured stays in GPU
    memory with the model."""

    def __post_init__(self) -> None:
        for name, allowed in (("solver", tuple(SOLVERS)), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        numbers.whole("steps", self.steps, 1)
        numbers.between("shift", self.shift, *SHIFTS)
        numbers.between("guidance", self.guidance, 0)
        numbers.between("image_guidance", self.image_guidance, 0)
        numbers.between("skip_scale", self.skip_scale)
        for name in ("skip_from", "skip_until"):
            numbers.between(name, getattr(self, name), 0, 1)
        numbers.interval("skip_from, skip_until", (self.skip_from, self.skip_until))
        numbers.interval("interval", self.interval, 0, 1)
        blocks = self.skip_blocks
        object.__setattr__(self, "skip_blocks", tuple(blocks) if isinstance(blocks, Iterable) else (blocks,))
        for block in self.skip_blocks:
            numbers.whole("skip_blocks", block, 0)

    @property
    def guided(self) -> bool:
        """Whether text is compared with none."""
        return self.guidance > 1

    def compares(self, references: bool) -> bool:
        """Whether a field needs to know the text's absence, with a picture to edit or without."""
        return self.guided or (references and self.image_guidance != 1)

    def times(self, formulation: flow.Formulation, start: float = 1.0) -> Tensor:
        """Of the straight path, from `start` down to 0."""
        ts = formulation.times(self.steps, self.shift, self.schedule)                               # type: ignore[arg-type]
        return ts if start == 1.0 else flow.starting_at(ts, start)


def denoise(
    model: MMDiT,
    z: Tensor,
    conditional: Conditioning,
    unconditional: Conditioning | None,
    settings: Settings,
    *,
    formulation: flow.Formulation | None = None,
    start: float = 1.0,
    constrain: Constraint | None = None,
    progress: Progress = iter,
    masked: bool = False,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """Draws latents, on the straight path whatever the formulation.

    Args:
        z: [B, C, h, w], noise, or an image's latent noised to `start`.
        conditional, unconditional: text of B samples; the second may be None without guidance.
        formulation: what the model reads and says, and at which times; rectified flow unless given.
        constrain: applied after each step (inpainting).
        masked: text beyond each sample's length is masked; the released models attend to all of it.
        references: latents of pictures to edit, each of B samples, as the model takes them.
    Returns: [B, C, h, w] fp32.

    >>> model = mmdit.MMDiT(mmdit.presets.tiny())
    >>> text = Conditioning(torch.randn(2, 7, 32), torch.tensor([7, 5]), torch.randn(2, 16))
    >>> denoise(model, torch.randn(2, 4, 16, 16), text, None, Settings(steps=2, guidance=1.0)).shape
    torch.Size([2, 4, 16, 16])
    """
    formulation = formulation or flow.by_name("rf")
    ts = settings.times(formulation, start)
    if start == 1.0:
        z = z * float(ts[0])                                        # a path that does not end at noise begins below it
    field = _Field(model, conditional, unconditional, settings, ts, formulation, masked, references)
    more = {} if constrain is None else {"constrain": constrain}
    return SOLVERS[settings.solver](field, z.to(field.device), ts, progress, **more)


def decoded(decoder: autoencoder.Autoencoder, z: Tensor) -> np.ndarray:
    """Pictures, uint8 [N, H, W, 3]. Raises: ValueError for latents that are not finite: they would be black."""
    if not bool(z.isfinite().all()):
        raise ValueError("what was drawn is not finite: do the weights overflow in their dtype?")
    return autoencoder.to_uint8(decoder.decode(z))


class _Field:
    """The guided velocity of a model for fixed text. The modulations of all times are made at once, if they fit: their
    projections are a third of the parameters, read once instead of once a step."""

    def __init__(
        self, model: MMDiT, conditional: Conditioning, unconditional: Conditioning | None, settings: Settings,
        ts: Tensor, formulation: flow.Formulation, masked: bool, references: Sequence[Tensor],
    ) -> None:  # fmt: skip
        if settings.compares(bool(references)) and unconditional is None:
            raise ValueError(f"guidance is {settings.guidance}, but there is no unconditional text")
        absent = [block for block in settings.skip_blocks if block >= model.config.depth]
        if absent:
            raise ValueError(f"skip_blocks names block {absent[0]}; the model has 0 to {model.config.depth - 1}")
        self.model, self.settings, self.formulation = model, settings, formulation
        weight = model.patch_embed.proj.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.batch = len(conditional.context)
        self.twice = bool(references) and settings.image_guidance != 1
        sides = [conditional] if unconditional is None else _same_length(conditional, unconditional)
        sides += sides[1:] if self.twice else []                          # without text, and without text and picture
        self.references = [
            torch.cat([r] * 2 + [torch.zeros_like(r)] if self.twice else [r] * len(sides)).to(self.device, self.dtype)
            for r in references
        ]
        self.context = torch.cat([side.context for side in sides]).to(self.device, self.dtype)
        self.pooled = torch.cat([side.pooled for side in sides]).to(self.device, self.dtype)
        self.lengths = torch.cat([side.lengths for side in sides]).to(self.device) if masked else None
        count = len(ts) - 1
        within = range(count) if settings.skip_blocks else ()
        self.skipping = {
            float(ts[i]) for i in within if settings.skip_from * count < i < settings.skip_until * count
        }
        times = [float(t) for t in ts]
        # The formulation's times, fp64; the model is told them in fp32. All at once: a copy from the host waits for it.
        own = self.formulation.path.time(torch.tensor(times, dtype=torch.float64)).to(self.device)
        self.own = dict(zip(times, own.split(1), strict=True))
        self.modulations = self._all_at_once(times[:-1])
        self.graphs = graphs.of(model) if settings.graph and graphs.refusal(model) is None else None

    @torch.no_grad()
    def _all_at_once(self, times: list[float]) -> dict[float, Tensor]:
        rows = len(times) * len(self.context)
        if rows * self.model.modulation.linear.out_features * self.dtype.itemsize > MODULATION_BYTES:
            return {}
        own = torch.cat([self.own[t] for t in times]).repeat_interleave(len(self.context))
        made = self.model.condition(own.float(), self.pooled.repeat(len(times), 1))
        return dict(zip(times, made.chunk(len(times)), strict=True))

    def _velocity(self, z: Tensor, t: float, rows: slice, skip: Collection[int] = ()) -> Tensor:
        count = rows.stop - rows.start
        now, found = self.own[t].expand(count), self.modulations.get(t)
        modulation = self.model.condition(now.float(), self.pooled[rows]) if found is None else found[rows]
        lengths = None if self.lengths is None else self.lengths[rows]
        read = self.formulation.read(z, now).to(self.dtype)
        seen = {"references": [r[rows] for r in self.references]} if self.references else {}
        if self.graphs is not None:
            output = self.graphs(self.model, read, self.context[rows], lengths, modulation, skip, **seen)
        else:
            output = self.model(
                read, None, self.context[rows], None, lengths, modulation=modulation, skip_blocks=skip, **seen
            )
        return self.formulation.velocity(output.float(), z, now)

    @torch.no_grad()
    def __call__(self, z: Tensor, t: float) -> Tensor:
        settings, alone = self.settings, slice(0, self.batch)
        low, high = settings.interval
        if not settings.compares(bool(self.references)) or not low <= t <= high:
            return self._velocity(z, t, alone)
        every = slice(0, (3 if self.twice else 2) * self.batch)
        last: list[Tensor] = []

        def sides(repeated: Tensor, t: float) -> Tensor:
            last.append(self._velocity(repeated, t, every))
            return last[0]

        if self.twice:
            v = flow.guided_twice(sides, max(1.0, settings.guidance), settings.image_guidance)(z, t)
        else:
            v = flow.guided(sides, settings.guidance)(z, t)
        if t in self.skipping:
            without = self._velocity(z, t, alone, settings.skip_blocks)
            v = v + settings.skip_scale * (last[0][: self.batch] - without)
        return v


def _same_length(*sides: Conditioning) -> list[Conditioning]:
    """Padded with zeros to one number of tokens."""
    most = max(side.context.shape[1] for side in sides)
    pad = torch.nn.functional.pad
    return [side._replace(context=pad(side.context, (0, 0, 0, most - side.context.shape[1]))) for side in sides]


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Sampler:
    """A trained model with all that is needed to draw with it."""

    model: MMDiT
    encoders: tuple[TextEncoder, ...]
    autoencoder: autoencoder.Autoencoder
    formulation: flow.Formulation
    size: tuple[int, int]
    """Height and width of an image in pixels, unless asked otherwise."""
    shift: float = 1.0
    """alpha of the sampling schedule."""
    steps: int = 50
    """Unless asked otherwise."""
    guidance: float = 5.0
    """Unless asked otherwise."""
    image_guidance: float = 1.5
    """Of a picture to edit, unless asked otherwise."""

    @classmethod
    def load(cls, source: str | os.PathLike[str], device: torch.device | str | None = None) -> Sampler:
        """From a run folder or a file written by training: a model's weights, or an adapter's, whose base lies where it
        was. Raises: FileNotFoundError, ValueError.

        >>> Sampler.load("runs/shapes-0")(["a red circle"], seed=0).shape                               # doctest: +SKIP
        (1, 32, 32, 3)
        """
        path = Path(source)
        if path.is_dir():
            found = next((path / name for name in (WEIGHTS, ADAPTER) if (path / name).is_file()), None)
            if found is None:
                raise FileNotFoundError(f"{path} holds no {WEIGHTS}: is it a run folder, and has the run saved yet?")
            path = found
        device = devices.pick(device)
        if adapters.is_file(path):
            base, extra = adapters.about(path)
            model = checkpoint.open_checkpoint(base).model(device)
            adapters.load(model, adapters.read(path, model.config))
        else:
            opened = checkpoint.open_checkpoint(path)
            model, extra = opened.model(device), opened.extra
        with naming(path):
            return cls.from_extra(model, extra)

    @classmethod
    def from_extra(cls, model: MMDiT, extra: dict[str, Any]) -> Sampler:
        """From the JSON kept beside the weights (see `extra`)."""
        missing = {"encoders", "autoencoder", "formulation", "size", "shift"} - extra.keys()
        if missing:
            raise ValueError(f"these weights do not say how to sample: {sorted(missing)} missing in their metadata")
        vae, device = autoencoder.build(extra["autoencoder"]), model.patch_embed.proj.weight.device
        encoders = tuple(build(spec) for spec in extra["encoders"])
        for part in (vae, *encoders):
            if isinstance(network := getattr(part, "model", None), torch.nn.Module):
                network.to(device)
        return cls(
            model,
            encoders,
            vae,
            flow.by_name(extra["formulation"], extra["shift"]),
            (extra["size"][0], extra["size"][1]),
            extra.get("sampling_shift", extra["shift"]),
            extra.get("steps", 50),
            extra.get("guidance", 5.0),
            extra.get("image_guidance", 1.5),
        )

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 64,
        progress: bool | Progress = False,
        first: int = 0,
        edit: Edit | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Draws one image per prompt.

        Args:
            edit: for a model that edits: a picture, or one for each prompt; see `references.encoded`.
            seed: image i starts from noise keyed by (seed, first + i), whatever the batch.
            steps, guidance, settings: as in `Settings`; the first two as the run draws its samples, unless given.
            size: (height, width) in pixels.
            progress: a bar, or what goes over the steps of a batch.
        Returns: uint8 [len(prompts), height, width, 3].
        Raises: ValueError if size does not fit the model.
        """
        if not prompts:
            raise ValueError("no prompts given; expected at least one")
        height, width = self.size if size is None else size
        for name, value in (("batch", batch), ("height", height), ("width", width)):
            numbers.whole(name, value, 1)
        cell = self.autoencoder.factor * self.model.config.patch_size
        if height % cell or width % cell or height < cell or width < cell:
            raise ValueError(f"size is {height} x {width}; expected multiples of {cell}")
        shape = (self.autoencoder.channels, height // self.autoencoder.factor, width // self.autoencoder.factor)
        steps = self.steps if steps is None else steps
        guidance = self.guidance if guidance is None else guidance
        own = {"steps": steps, "guidance": guidance, "shift": self.shift, "image_guidance": self.image_guidance}
        chosen = Settings(**{**own, **settings})
        references = encoded(edit, len(prompts), (height, width), self.model.config, self.autoencoder)
        images = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            noise = keyed.normals(shape, seed, "sampling noise", [(first + start + i,) for i in range(len(part))])
            label = f"drawing {start + 1}-{start + len(part)} of {len(prompts)}"
            with_text, without = conditioned(
                self.encoders, part, self.model.config, chosen.compares(bool(references))
            )
            z = denoise(
                self.model, noise, with_text, without, chosen, formulation=self.formulation,
                progress=bar(label, progress), masked=True,
                references=[r[start : start + batch] for r in references],
            )  # fmt: skip
            images.append(decoded(self.autoencoder, z))
        return np.concatenate(images)


def conditioned(
    encoders: Sequence[TextEncoder], prompts: Sequence[str], model: MMDiTConfig, guided: bool
) -> tuple[Conditioning, Conditioning | None]:
    """Text of the prompts as a model reads it, and, where guided, of none: with the encoders' outputs zeroed, as in
    training."""
    encoded = [encoder.encode(prompts) for encoder in encoders]
    features = [list(sample) for sample in zip(*encoded, strict=True)]
    beside = [encoder.beside for encoder in encoders]
    joined = lambda keep: assemble(features, model.context_dim, keep, beside, model.text_split)  # noqa: E731
    conditional = joined(None)
    if not guided:
        return conditional, None
    dropped = torch.zeros(len(prompts), len(encoders), dtype=torch.bool)
    return conditional, joined(dropped)


def bar(label: str, shown: bool | Progress) -> Progress:
    """What goes over the steps: a bar, nothing, or what was given."""
    if not isinstance(shown, bool):
        return shown
    return (lambda steps: tqdm(steps, desc=label)) if shown else iter


def grid(images: np.ndarray, columns: int | None = None, margin: int = 2, scale: int = 1) -> Image.Image:
    """uint8 [N, H, W, 3] as one picture, row by row."""
    from PIL import Image

    count, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    page = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = margin + i // columns * (height + margin), margin + i % columns * (width + margin)
        page[top : top + height, left : left + width] = image
    picture = Image.fromarray(page)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
