"""A page in the browser that draws with a trained run or with released weights: python -m mmdit serve SOURCE.

Everybody who opens it has a gallery of their own. One picture is drawn at a time; the others wait in a queue.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmdit.sampling.pipeline import Pipeline, as_images
from mmdit.sampling.sample import Sampler

if TYPE_CHECKING:
    from PIL import Image

LOCAL = "127.0.0.1"
KEPT = 48                    # pictures of a gallery
FILES = (3600, 24 * 3600)    # seconds between two looks at pictures on disk, and their age from which on they go
SEEDS = 1 << 32


class Cancelled(Exception):
    """Somebody pressed the button while their picture was drawn."""


@dataclass(frozen=True)
class Wanted:
    """What a page asks for."""

    prompt: str
    negative: str
    steps: int
    guidance: float
    image_guidance: float
    seed: int
    height: int
    width: int
    picture: Image.Image | None
    strength: float


class Drawer:
    """A run's sampler or a pipeline, behind one call.

    Args: source: what `python -m mmdit sample` draws with.
    """

    def __init__(self, source: Sampler | Pipeline) -> None:
        self.source, self._alone = source, threading.Lock()
        self.is_pipeline = isinstance(source, Pipeline)
        self.edits = source.model.config.takes_references
        self.reads_pictures = self.is_pipeline or self.edits
        self.size: tuple[int, int] = source.size
        self.cell = source.autoencoder.factor * source.model.config.patch_size

    def defaults(self) -> dict[str, float]:
        """Steps and guidance that pictures are drawn with unless asked otherwise."""
        if isinstance(self.source, Sampler):
            return {name: getattr(self.source, name) for name in ("steps", "guidance", "image_guidance")}
        return {"steps": 28, "guidance": 7.0, "image_guidance": 1.5}

    def __call__(
        self, wanted: Wanted, progress: Callable[[Iterable[int]], Iterator[int]]
    ) -> tuple[Image.Image, dict[str, Any]]:
        """One picture and its parameters. Raises: ValueError for what cannot be drawn."""
        if not wanted.prompt.strip():
            raise ValueError("there is no prompt; write what you want to see")
        edit = wanted.picture if self.edits else None
        with self._alone:
            if isinstance(self.source, Sampler):
                settings = {"steps": wanted.steps, "guidance": wanted.guidance, "image_guidance": wanted.image_guidance}
                size = (wanted.height, wanted.width)
                drawn = self.source(
                    [wanted.prompt], seed=wanted.seed, size=size, progress=progress, edit=edit, **settings               # type: ignore[arg-type]
                )
                said = {"prompt": wanted.prompt, "seed": wanted.seed, "height": size[0], "width": size[1], **settings}
                return as_images(drawn)[0], said
            made = self.source(
                wanted.prompt, negative_prompt=wanted.negative, height=wanted.height, width=wanted.width,
                num_inference_steps=wanted.steps, guidance_scale=wanted.guidance, seed=wanted.seed, edit=edit,
                image_guidance=wanted.image_guidance, image=None if self.edits else wanted.picture,
                strength=wanted.strength, progress=progress,
            )  # fmt: skip
            return made.images[0], made.parameters[0]


def page(drawer: Drawer, title: str) -> Any:
    """The page, as gradio.Blocks. Raises: ImportError without the package."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        wanted = "pip install 'rfkernels-mmdit[serve]'"
        raise ImportError(f"python -m mmdit serve needs gradio: {wanted} ({error})") from error
    stopped: dict[str, threading.Event] = {}
    given = drawer.defaults()

    def draw(
        prompt: str, negative: str, steps: float, guidance: float, image_guidance: float, seed: float, height: float,
        width: float, picture: Image.Image | None, strength: float, gallery: list[Any], request: gr.Request,
        told: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[list[Any], list[Any], str]:
        session = request.session_hash or ""
        event = stopped.setdefault(session, threading.Event())

        def progress(rest: Iterable[int]) -> Iterator[int]:
            for step in told.tqdm(list(rest), desc="drawing"):
                if event.is_set():
                    raise Cancelled
                yield step

        wanted = Wanted(prompt, negative, int(steps), guidance, image_guidance, int(seed), int(height), int(width),
                        picture, strength)  # fmt: skip
        try:
            image, parameters = drawer(wanted, progress)
        except Cancelled:
            raise gr.Error("Cancelled: nothing was drawn.", duration=4, print_exception=False) from None
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            stopped.pop(session, None)
        told_as = json.dumps(parameters, indent=1, default=str)
        gallery = [(image, f"{prompt} (seed {int(seed)})"), *gallery][:KEPT]
        return gallery, gallery, told_as

    def begin(request: gr.Request) -> None:
        """Before the queue, so that who waits there can cancel too."""
        stopped[request.session_hash or ""] = threading.Event()

    def cancel(request: gr.Request) -> None:
        if (event := stopped.get(request.session_hash or "")) is not None:
            event.set()

    for function in (begin, draw, cancel):              # Gradio evaluates annotations, which are text in this file
        function.__annotations__ = {"request": gr.Request}

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=FILES) as made:
        gr.Markdown(f"# {title}")
        own = gr.State([])
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(label="Instruction" if drawer.edits else "Prompt", lines=2, elem_id="prompt")
                negative = gr.Textbox(label="Negative prompt", visible=drawer.is_pipeline)
                with gr.Row():
                    run = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Cancel", elem_id="cancel")
                picture = gr.Image(
                    label="Picture to edit" if drawer.edits else "Start from this picture", type="pil", image_mode=None,
                    visible=drawer.reads_pictures,
                )  # fmt: skip
                strength = gr.Slider(
                    0.05, 1.0, 0.6, label="Share of the steps taken from it",
                    visible=drawer.reads_pictures and not drawer.edits,
                )  # fmt: skip
                with gr.Row():
                    steps = gr.Slider(1, 100, given["steps"], step=1, label="Steps")
                    guidance = gr.Slider(0, 15, given["guidance"], label="Guidance; up to 1: none")
                image_guidance = gr.Slider(
                    0, 5, given["image_guidance"], label="Guidance by the picture; 1: none", visible=drawer.edits
                )
                with gr.Row():
                    seed = gr.Number(0, precision=0, minimum=0, maximum=SEEDS, label="Seed", elem_id="seed")
                    height, width = (
                        gr.Number(side, precision=0, minimum=1, label=f"{name} / pixels", elem_id=name,
                                  info=f"a multiple of {drawer.cell}")
                        for name, side in zip(("Height", "Width"), drawer.size, strict=True)
                    )  # fmt: skip
            with gr.Column(scale=3):
                gallery = gr.Gallery(label="Yours, the newest first", columns=3, format="png", elem_id="gallery")
                parameters = gr.Code(label="Parameters of the newest", language="json")
        inputs = [prompt, negative, steps, guidance, image_guidance, seed, height, width, picture, strength, own]
        asked = gr.on([run.click, prompt.submit], begin, queue=False, api_visibility="private")
        asked.then(draw, inputs, [own, gallery, parameters], api_name="draw", concurrency_limit=1)
        stop.click(cancel, queue=False, api_name="cancel")
    return made


def launch(made: Any, host: str, port: int | None, *, blocking: bool = True) -> str:
    """Serves a page. Returns: its address, when it ends or, not blocking, at once."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])     # no other server is asked
    _, address, _ = made.queue().launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=not blocking, theme=theme,
        quiet=not blocking,
    )  # fmt: skip
    return str(address)
