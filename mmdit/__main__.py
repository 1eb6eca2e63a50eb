"""python -m mmdit: sample from models, convert and inspect weights."""

from __future__ import annotations

import inspect as inspection
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

try:
    from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction
except ImportError:
    sys.exit("error: python -m mmdit needs tyro: pip install 'rfkernels-mmdit[cli]'")

from mmdit import checkpoint, commands, numbers, pictures
from mmdit.adapters.commands import lora as lora_command
from mmdit.adapters.commands import put_on, weighted
from mmdit.checkpoint import parts
from mmdit.checkpoint.report import left_behind, report
from mmdit.checkpoint.tensors import MAX_SHARD_BYTES
from mmdit.commands import DTYPES, Dtype
from mmdit.sampling.pipeline import Pipeline, save_png
from mmdit.sampling.sample import Sampler, grid
from mmdit.serving import LOCAL, Drawer, launch, page


@dataclass(frozen=True)
class Files:
    """Beside a released single file."""

    autoencoder: Path | None = None
    """The autoencoder, where the single file holds none or another is wanted."""
    clip_l: Path | None = None
    """CLIP-L, likewise."""
    clip_g: Path | None = None
    """CLIP-G, likewise."""
    t5xxl: Path | None = None
    """T5, likewise."""
    t5_tokenizer: Path | None = None
    """Folder of T5's tokenizer, which no file holds; without it T5 is left out."""


def sample(
    source: Positional[Path],
    prompts: Positional[tuple[str, ...]],
    out: Path = Path("sample.png"),
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    solver: Literal["euler", "heun", "dpmpp_2m"] = "euler",
    schedule: Literal["paper", "sd3_release"] | None = None,
    shift: float | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    skip_blocks: tuple[int, ...] = (),
    graph: bool = True,
    device: str | None = None,
    lora: UseAppendAction[tuple[str, ...]] = (),
    weights: Path | None = None,
    files: OmitArgPrefixes[Files] = Files(),
    dtype: Dtype | None = None,
    negative: str = "",
    unconditional: Literal["empty", "zeros"] = "empty",
    image: Path | None = None,
    strength: float = 0.6,
    mask: Path | None = None,
    edit: tuple[Path, ...] = (),
    image_guidance: float | None = None,
    t5: bool = True,
    t5_tokens: int = 256,
    offload: bool = False,
    tiled: bool = False,
    batch: int = 4,
) -> None:
    """Draw prompts with a trained run or with released weights; the parameters are embedded in the PNG.

    Args:
        source: Run folder or weights file of a run; or a pipeline: a released single file, or diffusers' folder.
        prompts: One or more prompts.
        out: PNG to write. Several prompts of a run make a grid, of a pipeline numbered files.
        seed: Image i is a function of (seed, i).
        steps: As a run draws its samples, 28 for a pipeline.
        guidance: Classifier-free guidance; up to 1 it is none. As a run draws its samples, 7 for a pipeline.
        size: Height and width in pixels; the training size unless given.
        solver: Integrator of the flow.
        schedule: paper for a run, sd3_release for a pipeline.
        shift: alpha of the schedule; as a run draws its samples, or of the scheduler's configuration, unless given.
        interval: Times at which guidance acts.
        skip_blocks: Skip-layer guidance: 7 8 9 for SD3.5 medium.
        graph: On a GPU, replay the model as a CUDA graph; --no-graph saves the memory that it keeps.
        device: cpu, cuda, ...; a GPU if there is one.
        lora: LoRA file, or FILE:STRENGTH, on top of the weights; may be given several times.
        weights: Folder: the model's weights from another file, in any layout.
        files: What a single file does not hold.
        dtype: Pipeline: of the model; as stored unless given.
        negative: Pipeline: negative prompt.
        unconditional: Pipeline: the encoded negative prompt, or zeros as in the paper.
        image: Pipeline: start from this picture.
        strength: Pipeline: share of the steps taken from it.
        mask: Pipeline: of the picture white is drawn anew.
        edit: For a model that edits: the picture to edit; up to three if the model has reference_tokens.
        image_guidance: Guidance by that picture; 1: off. As a run draws its samples, 1.5 for a pipeline.
        t5: Pipeline: --no-t5 leaves T5 out.
        t5_tokens: Pipeline: length of T5's part.
        offload: Pipeline: text encoders wait on the CPU.
        tiled: Pipeline: decode in tiles.
        batch: Pipeline: images at a time.
    """
    settings: dict[str, Any] = {"solver": solver, "interval": interval, "skip_blocks": skip_blocks, "graph": graph}
    told = {"schedule": schedule, "shift": shift, "image_guidance": image_guidance}
    settings |= {k: v for k, v in told.items() if v is not None}
    if image_guidance is not None and not edit:
        raise ValueError(f"image_guidance is {image_guidance:g}; it is for --edit")
    if edit:
        settings["edit"] = [[pictures.opened(path) for path in edit]]
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f"out is {out}{', a folder' if out.is_dir() else ''}; expected a file that ends in .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    if steps is not None:
        numbers.whole("steps", steps, 1)
    pipe = _pipeline(
        source, files, weights, lora, dtype=DTYPES[dtype] if dtype else None, device=device, t5=t5, t5_tokens=t5_tokens,
        offload=offload, tiled=tiled,
    )  # fmt: skip
    if pipe is not None:
        height, width = size or (None, None)
        drawn = pipe(
            prompts, negative_prompt=negative, unconditional=unconditional, height=height, width=width, seed=seed,
            num_inference_steps=28 if steps is None else steps, batch=batch,
            guidance_scale=7.0 if guidance is None else guidance,
            image=pictures.opened(image) if image else None, strength=strength,
            mask_image=pictures.opened(mask) if mask else None, **settings,
        )  # fmt: skip
        for parameters in drawn.parameters if edit else ():
            parameters["edit"] = list(map(str, edit))
        print("wrote " + ", ".join(map(str, drawn.save(out))))
        return
    _refuse(
        source, sample, weights=weights, dtype=dtype, negative=negative, unconditional=unconditional, image=image,
        strength=strength, mask=mask, t5=t5, t5_tokens=t5_tokens, offload=offload, tiled=tiled, batch=batch,
    )  # fmt: skip
    sampler = Sampler.load(source, device)
    for note in put_on(sampler.model, lora):
        print(f"note: {note}", file=sys.stderr)
    settings |= {"steps": sampler.steps if steps is None else steps}
    settings |= {"guidance": sampler.guidance if guidance is None else guidance}
    images = sampler(prompts, seed=seed, size=size, progress=True, **settings)
    scale = max(1, (256 if len(images) == 1 else 128) // images.shape[1])
    picture = grid(images, scale=scale, margin=0 if len(images) == 1 else 2)
    settings |= {"edit": list(map(str, edit))} if edit else {}
    save_png(picture, out, {"prompts": prompts, "seed": seed, "size": list(images.shape[1:3]), "lora": list(lora),
                           **settings})  # fmt: skip
    print(f"wrote {out}")


def _pipeline(
    source: Path, files: Files, weights: Path | None, lora: tuple[str, ...], **settings: Any
) -> Pipeline | None:
    """Of a released single file or a pipeline's folder; None of what is neither."""
    if (source / "model_index.json").is_file():
        if given := [name for name, path in vars(files).items() if path is not None]:
            raise ValueError(f"{source} is a pipeline's folder; {', '.join(given)} are for a released single file")
        pipe = Pipeline.from_pretrained(source, weights=weights, **settings)
    elif parts.held(source) or files != Files():
        if weights is not None:
            raise ValueError(f"{source} is a single file, which holds the model; weights are for a pipeline's folder")
        pipe = Pipeline.from_single_file(source, **vars(files), **settings)
    else:
        return None
    for file, weight in map(weighted, lora):
        pipe.load_lora(file, weight)
    return pipe


def _refuse(source: Path, command: Callable[..., None], **given: Any) -> None:
    """Flags of pipelines. Raises: ValueError if one was given for a run, which would not heed it."""
    defaults = inspection.signature(command).parameters
    flags = ["--" + name.replace("_", "-") for name, value in given.items() if value != defaults[name].default]
    if flags:
        raise ValueError(f"{source} is no pipeline; for a run there is no {', '.join(flags)}")


def serve(
    source: Positional[Path],
    host: str = LOCAL,
    port: int | None = None,
    device: str | None = None,
    lora: UseAppendAction[tuple[str, ...]] = (),
    weights: Path | None = None,
    files: OmitArgPrefixes[Files] = Files(),
    dtype: Dtype | None = None,
    t5: bool = True,
    offload: bool = False,
    tiled: bool = False,
) -> None:
    """Show a page in the browser that draws with a trained run or with released weights.

    Args:
        source: Run folder or weights file of a run; or a pipeline: a released single file, or diffusers' folder.
        host: Address to listen on; only this machine sees the default.
        port: Port; the first free one from 7860 on unless given.
        device: cpu, cuda, ...; a GPU if there is one.
        lora: LoRA file, or FILE:STRENGTH, on top of the weights; may be given several times.
        weights: Folder: the model's weights from another file, in any layout.
        files: What a single file does not hold.
        dtype: Pipeline: of the model; as stored unless given.
        t5: Pipeline: --no-t5 leaves T5 out.
        offload: Pipeline: text encoders wait on the CPU.
        tiled: Pipeline: decode in tiles.
    """
    drawn: Pipeline | Sampler | None = _pipeline(
        source, files, weights, lora, dtype=DTYPES[dtype] if dtype else None, device=device, t5=t5, offload=offload,
        tiled=tiled,
    )  # fmt: skip
    if drawn is None:
        _refuse(source, serve, weights=weights, dtype=dtype, t5=t5, offload=offload, tiled=tiled)
        drawn = Sampler.load(source, device)
        for note in put_on(drawn.model, lora):
            print(f"note: {note}", file=sys.stderr)
    launch(page(Drawer(drawn), source.resolve().name), host, port)


def info(run: Positional[Path]) -> None:
    """Say what a run folder or weights file holds.

    Args:
        run: Run folder, or a weights file.
    """
    sampler = Sampler.load(run, "cpu")
    parameters = sum(p.numel() for p in sampler.model.parameters())
    print(f"{parameters:,} parameters, {sampler.size[0]} x {sampler.size[1]} pixels, {sampler.formulation}")
    print(sampler.model.config)


def convert(
    source: Positional[Path],
    destination: Positional[Path],
    layout: Literal["native", "sd3", "diffusers"],
    dtype: Dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    heads: int | None = None,
) -> None:
    """Convert weights from one layout to another, tensor by tensor, in little memory.

    Args:
        source: A .safetensors file, an index of shards, or a folder, in any of the three layouts.
        destination: A .safetensors file; a folder for diffusers.
        layout: native (ours), sd3 (the released single file) or diffusers.
        dtype: Of the result; as stored unless given.
        max_shard_bytes: Beyond, shards and an index are written.
        heads: Attention heads, where the tensors do not tell (no QK-norm, not the released models' one per block).
    """
    if destination.is_dir() != (layout == "diffusers") and destination.exists():
        kinds = ("a file", "a folder") if layout == "diffusers" else ("a folder", "a file")
        raise ValueError(f"destination is {destination}, {kinds[0]}; expected {kinds[1]} for layout {layout}")
    numbers.whole("max_shard_bytes", max_shard_bytes, 1)
    for line in left_behind(checkpoint.open_checkpoint(source).extra) if layout != "native" else ():
        print(f"warning: {line}, which layout {layout} cannot say", file=sys.stderr)
    known = {} if heads is None else {"heads": heads}
    kind = DTYPES[dtype] if dtype else None
    written = checkpoint.convert(
        source, destination, layout=layout, dtype=kind, max_shard_bytes=max_shard_bytes, progress=True, **known
    )
    print("wrote " + ", ".join(map(str, written)))


def inspect(source: Positional[Path], config: bool = False) -> None:
    """Say what a checkpoint holds: layout, configuration, parameters by part, dtypes, and anomalies such as NaN.

    Args:
        source: A .safetensors file, an index of shards, or a folder.
        config: Print the configuration as JSON and nothing else.
    """
    opened = checkpoint.open_checkpoint(source)
    if config:
        print(json.dumps(opened.config.to_dict(), indent=1))
        return
    lines, anomalies = report(opened)
    print("\n".join(lines))
    if anomalies:
        sys.exit("\n".join(f"anomaly: {line}" for line in anomalies))


PROG = "python -m mmdit"
COMMANDS = {f.__name__: commands.flags(f, f"{PROG} {f.__name__}") for f in (sample, serve, info, convert, inspect)}
COMMANDS["lora"] = lora_command


def main() -> None:
    commands.dispatch(PROG, "Sample from MM-DiTs; convert and inspect their weights.", COMMANDS)


if __name__ == "__main__":
    main()
