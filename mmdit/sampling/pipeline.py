"""Text to image with released weights: `Pipeline.from_pretrained(folder)`, then `pipe("a prompt").images`.

The shape is that of diffusers' StableDiffusion3Pipeline, whose folders are read and written; what differs: noise is
keyed by (seed, image), so a batch size changes nothing, and the unconditional text is chosen by name.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmdit import adapters, checkpoint, devices, flow, keyed, numbers, pictures
from mmdit import autoencoder as vae
from mmdit.checkpoint import parts
from mmdit.encoders import T5, Conditioning, OpenClip, Sd3Text, clip
from mmdit.encoders.sd3 import from_folder
from mmdit.files import read_object, replacing, write_atomically
from mmdit.flow.solvers import Constraint, Progress
from mmdit.model import MMDiT
from mmdit.sampling.references import Edit, encoded
from mmdit.sampling.sample import SHIFTS, Settings, bar, decoded, denoise

if TYPE_CHECKING:
    from PIL import Image

UNCONDITIONAL = ("empty", "zeros")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass
class Output:
    """What a pipeline drew."""

    images: list[Image.Image]
    parameters: list[dict[str, Any]]
    """Of each image: all that is needed to draw it again."""

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """PNG files with the parameters embedded (text chunk "parameters", JSON): `path`, or path-0, path-1, ..."""
        path = Path(path)
        names = [path] if len(self.images) == 1 else [
            path.with_name(f"{path.stem}-{i}{path.suffix or '.png'}") for i in range(len(self.images))
        ]  # fmt: skip
        for name, image, parameters in zip(names, self.images, self.parameters, strict=True):
            save_png(image, name, parameters)
        return names


def as_images(pictures: np.ndarray) -> list[Image.Image]:
    """Of uint8 [N, H, W, 3]."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in pictures]


def _plain(value: Any) -> Any:
    """A number or numbers of NumPy or PyTorch as Python's."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def save_png(image: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """Atomically, with the parameters as JSON in the text chunk "parameters"."""
    from PIL import PngImagePlugin

    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("parameters", json.dumps(parameters, default=_plain))
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=chunk)


def texts(name: str, given: Any) -> list[str]:
    """One or several. Raises: TypeError."""
    found: list[str] = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(isinstance(text, str) for text in found):
        raise TypeError(f"Pipeline: {name} is {given!r}; expected text, or several")
    return found


def _text(encoders: Sequence[Any], model: MMDiT, **settings: Any) -> Sd3Text:
    config = model.config
    return Sd3Text(*encoders, context_dim=config.context_dim, pooled_dim=config.pooled_dim, **settings)


class Pipeline:
    """A model with SD3's text encoders and autoencoder.

    Args:
        model: reads 16-channel latents in the released models.
        text: the encoders, any of them absent.
        autoencoder: between images and latents.
        shift: alpha of the schedule. size: (height, width) in pixels, unless asked otherwise.
    """

    def __init__(
        self, model: MMDiT, text: Sd3Text, autoencoder: vae.KL, *, shift: float = 3.0,
        size: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        numbers.between("Pipeline: shift", shift, *SHIFTS)
        self.model, self.text, self.autoencoder, self.shift = model, text, autoencoder, shift
        self.size = size or (model.config.resolution, model.config.resolution)
        self.loras: list[tuple[str, float]] = []
        """Files that were put on the model, with their strengths."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        weights: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        t5: bool = True,
        t5_tokens: int = 256,
        offload: bool = False,
        vae_dtype: str = "float32",
        tiled: bool = False,
    ) -> Pipeline:
        """From a folder of diffusers' StableDiffusion3Pipeline on disk; nothing is downloaded, no pickle is loaded.

        Args:
            weights: of the model from elsewhere: a released single file, a fine-tuned one in any layout.
            dtype: of the model; as stored unless given. device: a GPU if there is one.
            t5: False leaves T5 out, and with it most of the memory. t5_tokens: 77 in the paper, 256 in diffusers.
            offload: text encoders wait on the CPU and visit the device one at a time.
            vae_dtype, tiled: of the autoencoder.
        Raises: FileNotFoundError; ValueError for what does not fit; ImportError without transformers or diffusers.

        >>> pipe = Pipeline.from_pretrained("stable-diffusion-3.5-medium")                              # doctest: +SKIP
        >>> pipe("a lighthouse at dawn", seed=0).images[0].save("lighthouse.png")                       # doctest: +SKIP
        """
        root = Path(folder)
        if not (root / "vae").is_dir():
            raise FileNotFoundError(f"{root} is no pipeline's folder: it has no vae; expected diffusers' layout")
        device = devices.pick(device)
        model = checkpoint.load(root / "transformer" if weights is None else weights, device=device, dtype=dtype)
        kinds = (partial(clip, part="clip_l"), partial(clip, part="clip_g"), T5 if t5 else None)
        found = [
            None if kind is None else from_folder(root, names, kind)
            for names, kind in zip(zip(ENCODERS, TOKENIZERS, strict=True), kinds, strict=True)
        ]
        text = _text(found, model, t5_tokens=t5_tokens, device=device, offload=offload)
        kl = vae.KL(str(root / "vae"), dtype=vae_dtype, tiled=tiled, device=str(device))
        scheduler = root / "scheduler" / "scheduler_config.json"
        shift = read_object(scheduler).get("shift", 3.0) if scheduler.is_file() else 3.0
        numbers.above(f"{scheduler}: shift", shift, 0)
        file = root / "transformer" / "config.json"
        side = read_object(file).get("sample_size") if file.is_file() else None
        if side is not None:
            numbers.whole(f"{file}: sample_size", side, 1)
        return cls(model, text, kl, shift=shift, size=None if side is None else (side * kl.factor, side * kl.factor))

    @classmethod
    def from_single_file(
        cls,
        file: str | os.PathLike[str],
        *,
        autoencoder: str | os.PathLike[str] | None = None,
        clip_l: str | os.PathLike[str] | None = None,
        clip_g: str | os.PathLike[str] | None = None,
        t5xxl: str | os.PathLike[str] | None = None,
        t5_tokenizer: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        t5: bool = True,
        t5_tokens: int = 256,
        offload: bool = False,
        vae_dtype: str = "float32",
        tiled: bool = False,
    ) -> Pipeline:
        """From a released single file. What it does not hold comes from files of their own (or folders): weights in
        fp16, bf16 or fp8, scaled or not. CLIP's tokenizer is open_clip's; the schedule's shift is 3, as released.

        Args:
            autoencoder, clip_l, clip_g, t5xxl: where the file does not hold the part, or another is wanted.
            t5_tokenizer: folder of T5's tokenizer, which no file holds; without it T5 is left out, with a warning.
            dtype: of the model; as stored unless given, bf16 of fp8 alone.
            device, t5, t5_tokens, offload, vae_dtype, tiled: as in `from_pretrained`.
        Raises: FileNotFoundError; ValueError that names the parts that are missing; ImportError without transformers,
            diffusers or open_clip.

        >>> pipe = Pipeline.from_single_file("sd3_medium_incl_clips.safetensors", t5=False)             # doctest: +SKIP
        """
        given = {"autoencoder": autoencoder, "clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5xxl}
        for name, path in {"the single file": file, **given, "t5_tokenizer": t5_tokenizer}.items():
            if path is not None and not Path(path).exists():
                raise FileNotFoundError(f"{name}: nothing at {path}")
        if t5 and t5xxl is not None and t5_tokenizer is None:
            raise ValueError("t5xxl is given without t5_tokenizer, a folder: no file holds T5's tokenizer")
        held = parts.held(file)
        where = {part: str(path or file) for part, path in given.items() if path is not None or part in held}
        if missing := [part for part in ("autoencoder", "clip_l", "clip_g") if part not in where]:
            listed = ", ".join(f"{part} ({parts.PARTS[part][0]}*)" for part in missing)
            raise ValueError(f"{file} holds no {listed}; give {', '.join(missing)}: a file or folder each")
        device = devices.pick(device)
        model = checkpoint.load(file, device=device, dtype=dtype)
        if t5 and (t5_tokenizer is None or "t5xxl" not in where):
            lacks = "T5 is not in it (t5xxl=)" if "t5xxl" not in where else "T5 lacks its tokenizer (t5_tokenizer=)"
            logging.getLogger(__name__).warning("%s: %s; drawing without T5", file, lacks)
            t5 = False
        encoders = [
            *(clip(where[part], part=part) for part in ("clip_l", "clip_g")),
            T5(where["t5xxl"], str(t5_tokenizer)) if t5 else None,
        ]
        text = _text(encoders, model, t5_tokens=t5_tokens, device=device, offload=offload)
        return cls(model, text, vae.KL(where["autoencoder"], dtype=vae_dtype, tiled=tiled, device=str(device)))

    def load_lora(self, source: str | os.PathLike[str], weight: float = 1.0) -> None:
        """Puts a LoRA on the model, on top of those that are there: a file of diffusers, kohya, ComfyUI or ours. The
        weights are not touched; `mmdit.adapters.remove(pipe.model)` takes all of them off.

        Args: weight: its strength; any number, 1 as it was trained.
        Raises: FileNotFoundError; ValueError for a file that is not understood, whole.

        >>> pipe.load_lora("style.safetensors", 0.8)                                                    # doctest: +SKIP
        """
        numbers.between("Pipeline: weight", weight)
        adapter = adapters.read(source, self.model.config)
        for note in adapter.notes:
            logging.getLogger(__name__).warning("%s: %s", source, note)
        adapters.load(self.model, adapter.times(weight))
        self.loras.append((str(source), weight))

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """A folder that diffusers' StableDiffusion3Pipeline.from_pretrained reads: the model in diffusers' layout, the
        other parts as their folders have them; what came out of a single file is written as it was read.

        Raises: ValueError for a CLIP in open_clip's files, which has no place there."""
        root = Path(folder)
        if foreign := [encoder.folder for encoder in self.text.encoders if isinstance(encoder, OpenClip)]:
            raise ValueError(f"{foreign[0]} is a CLIP in open_clip's files, which have no place in diffusers' folder")
        checkpoint.save(self.model, root / "transformer", layout="diffusers", dtype=dtype)
        index: dict[str, Any] = {
            "_class_name": "StableDiffusion3Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        classes = (("CLIPTextModelWithProjection", "CLIPTokenizer"),) * 2 + (("T5EncoderModel", "T5TokenizerFast"),)
        for encoder, names, (own, tokenizer) in zip(
            self.text.encoders, zip(ENCODERS, TOKENIZERS, strict=True), classes, strict=True
        ):
            for name, kind in zip(names, (own, tokenizer), strict=True):
                index[name] = [None, None] if encoder is None else ["transformers", kind]
            if encoder is not None:
                assert not isinstance(encoder, OpenClip)
                encoder.save(*(root / name for name in names))
        self.autoencoder.save(root / "vae")
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": self.shift}
        (root / "scheduler").mkdir(exist_ok=True)
        write_atomically(root / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2).encode())
        write_atomically(root / "model_index.json", json.dumps(index, indent=2).encode())       # last: then it is whole

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = "",
        unconditional: str = "empty",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: Tensor | None = None,
        image: Image.Image | None = None,
        strength: float = 0.6,
        mask_image: Image.Image | None = None,
        edit: Edit | None = None,
        image_guidance: float = 1.5,
        batch: int = 4,
        progress: bool | Progress = True,
        **settings: Any,
    ) -> Output:
        """Draws.

        Args:
            prompt, negative_prompt: one or as many as there are images to draw.
            unconditional: "empty": the encoded negative prompt (empty unless given), as the released pipelines do;
                "zeros": the encoders' outputs zeroed, as in the paper.
            height, width: in pixels, multiples of 16, any aspect ratio the position table holds.
            seed: image i starts from noise keyed by (seed, i); an integer of 64 bits, with or without sign.
            latents: [N, C, h, w], the noise itself, instead.
            guidance_scale: classifier-free guidance; up to 1: none, as in diffusers.
            image: start from this picture, read as `pictures.shown` does: `strength`, in (0, 1], is the share of the
                steps that are taken.
            mask_image: with image: white is drawn anew, black is kept; what is transparent counts as white.
            edit: for a model that edits: a picture that prompts are instructions for, or one for each image; see
                `references.encoded`. image_guidance: how close to it, beside guidance_scale; 1: none.
            batch: images at a time. progress: a bar, or what goes over the steps of a batch.
            settings: solver, schedule (sd3_release unless given), shift, interval, skip_blocks, ...: see `Settings`.
        Returns: images and the parameters of each.
        Raises: ValueError that names the argument.
        """
        prompts, negatives = texts("prompt", prompt), texts("negative_prompt", negative_prompt or "")
        for name, it, has in (("image", image, "load"), ("mask_image", mask_image, "load"), ("latents", latents, "to")):
            if it is not None and not hasattr(it, has):
                raise TypeError(f"Pipeline: {name} is of {type(it)}; expected a PIL image, or a tensor of latents")
        height, width = self.size[0] if height is None else height, self.size[1] if width is None else width
        least_one = {"num_images_per_prompt": num_images_per_prompt, "batch": batch, "height": height, "width": width}
        for name, value in least_one.items():
            numbers.whole(f"Pipeline: {name}", value, 1)
        numbers.between("Pipeline: strength", strength, 0, 1)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        self._check(prompts, negatives, height, width, unconditional, latents, image, mask_image, strength)
        values = {"steps": num_inference_steps, "guidance": guidance_scale, "shift": self.shift}
        values |= {"image_guidance": image_guidance}
        chosen = Settings(**{**values, "schedule": "sd3_release", **settings})
        factor = self.autoencoder.factor
        shape = (self.model.config.in_channels, height // factor, width // factor)
        references = encoded(edit, len(prompts), (height, width), self.model.config, self.autoencoder)
        start = 1.0
        if image is not None and strength < 1:
            ts = chosen.times(flow.by_name("rf"))
            start = float(ts[min(len(ts) - 2, max(0, int(chosen.steps - chosen.steps * strength)))])
        drawn = []
        for first in range(0, len(prompts), batch):
            rows = slice(first, first + batch)
            count = len(prompts[rows])
            noise = keyed.normals(shape, seed, "sampling noise", [(first + i,) for i in range(count)])
            noise = (noise if latents is None else latents[rows].float()).to(self.model.patch_embed.proj.weight.device)
            z, constrain = self._started(noise, image, mask_image, start)
            guided = chosen.compares(bool(references))
            conditional, other = self._text(prompts[rows], negatives[rows], guided, unconditional)
            label = f"drawing {first + 1}-{first + count} of {len(prompts)}"
            z = denoise(
                self.model, z, conditional, other, chosen, start=start, constrain=constrain,
                progress=bar(label, progress), references=[r[rows] for r in references],
            )  # fmt: skip
            drawn.append(decoded(self.autoencoder, z))
        common = {**asdict(chosen), "height": height, "width": width, "seed": seed, "unconditional": unconditional}
        common |= {"lora": [list(pair) for pair in self.loras]} if self.loras else {}
        common |= {"strength": strength if image is not None else None, "own_latents": latents is not None,
                   "edit": edit is not None}  # fmt: skip
        parameters = [
            {"prompt": p, "negative_prompt": n, "image": i, **common, "skip_blocks": list(chosen.skip_blocks)}
            for i, (p, n) in enumerate(zip(prompts, negatives, strict=True))
        ]
        return Output(as_images(np.concatenate(drawn)), parameters)

    def _text(
        self, prompts: list[str], negatives: list[str], guided: bool, unconditional: str
    ) -> tuple[Conditioning, Conditioning | None]:
        conditional = self.text.encode(prompts)
        if not guided:
            return conditional, None
        return conditional, self.text.zeros(len(prompts)) if unconditional == "zeros" else self.text.encode(negatives)

    def _started(
        self, noise: Tensor, image: Image.Image | None, mask: Image.Image | None, start: float
    ) -> tuple[Tensor, Constraint | None]:
        """Where sampling begins, and what is held fixed on the way."""
        if image is None:
            return noise, None
        from PIL.Image import Resampling

        factor = self.autoencoder.factor
        height, width = noise.shape[2] * factor, noise.shape[3] * factor
        pixels = np.array(pictures.shown(image).resize((width, height), Resampling.LANCZOS))
        x0 = self.autoencoder.encode(vae.to_float(pixels[None])).to(noise.device)
        z = ((1 - start) * x0 + start * noise).contiguous()           # as without a picture: the same bits at start = 1
        if mask is None:
            return z, None
        small = pictures.shown(mask).convert("L").resize((noise.shape[3], noise.shape[2]), Resampling.NEAREST)
        anew = torch.from_numpy(np.array(small) >= 128).to(noise.device)
        return z, lambda z, t: torch.where(anew, z, (1 - t) * x0 + t * noise)

    def _check(
        self, prompts: list[str], negatives: list[str], height: int, width: int, unconditional: str,
        latents: Tensor | None, image: Image.Image | None, mask: Image.Image | None, strength: float,
    ) -> None:  # fmt: skip
        cell, op = self.autoencoder.factor * self.model.config.patch_size, "Pipeline"
        if not prompts:
            raise ValueError(f"{op}: no prompt given; expected at least one")
        if len(negatives) != len(prompts):
            counts = f"{len(negatives)} negative prompts for {len(prompts)} images"
            raise ValueError(f"{op}: {counts}; expected one, or as many")
        if height % cell or width % cell or height < cell or width < cell:
            raise ValueError(f"{op}: size is {height} x {width}; expected multiples of {cell}")
        if unconditional not in UNCONDITIONAL:
            raise ValueError(f"{op}: unconditional is {unconditional!r}; expected one of {', '.join(UNCONDITIONAL)}")
        shape = [len(prompts), self.model.config.in_channels, *(s // self.autoencoder.factor for s in (height, width))]
        if latents is not None and list(latents.shape) != shape:
            raise ValueError(f"{op}: latents have shape {list(latents.shape)}; expected {shape}")
        if mask is not None and image is None:
            raise ValueError(f"{op}: mask_image is given without image")
        if not 0 < strength <= 1:
            raise ValueError(f"{op}: strength is {strength}; expected a number in (0, 1]")
