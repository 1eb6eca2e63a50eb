"""The page that draws: by its interface as a client calls it, and in a browser as people use it."""

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit import Sampler, presets
from mmdit.model import MMDiT
from mmdit.serving import LOCAL, Cancelled, Drawer, Wanted, launch, page
from tests.browsing import chromium

# Gradio leaves event loops and sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning:gradio"
)
EXTRA = {
    "encoders": [{"kind": "words", "dim": 64, "max_tokens": 77}], "autoencoder": {"kind": "pixels", "factor": 2},
    "formulation": "rf", "shift": 1.0, "size": [32, 32], "steps": 3, "guidance": 2.0,
}  # fmt: skip


def sampler(**changes):
    torch.manual_seed(0)
    model = MMDiT(presets.tiny(in_channels=12, context_dim=64, pooled_dim=64, token_pixels=4, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Sampler.from_extra(model.eval(), EXTRA)


def wanted(prompt="a red ring", **changes):
    values = {
        "negative": "", "steps": 3, "guidance": 2.0, "image_guidance": 1.5, "seed": 4, "height": 32, "width": 32,
        "picture": None, "strength": 0.6,
    }  # fmt: skip
    return Wanted(prompt, **{**values, **changes})


# --- what draws -------------------------------------------------------------------------------------------------------


def test_a_run_is_drawn_with_as_by_its_sampler():
    source = sampler()
    image, parameters = Drawer(source)(wanted(), iter)
    assert np.array_equal(np.asarray(image), source(["a red ring"], seed=4, steps=3, guidance=2.0)[0])
    assert (parameters["seed"], parameters["steps"], parameters["prompt"]) == (4, 3, "a red ring")


def test_an_editor_edits_the_picture():
    source = sampler(reference_channels=12)
    drawer, picture = Drawer(source), Image.new("RGB", (40, 40), "red")
    image, _ = drawer(wanted(picture=picture), iter)
    assert drawer.edits and np.array_equal(np.asarray(image), source(["a red ring"], seed=4, edit=picture)[0])


def test_a_pipeline_is_drawn_with():
    from tests.mmdit.pipelines import made

    pytest.importorskip("diffusers", reason="diffusers is not installed")
    import tempfile

    from mmdit import Pipeline

    with tempfile.TemporaryDirectory() as folder:
        made().save_pretrained(folder)
        pipe = Pipeline.from_pretrained(folder)
        picture = Image.new("RGB", (32, 32), "blue")
        drawer = Drawer(pipe)
        image, parameters = drawer(wanted(negative="dull", picture=picture, steps=2), iter)
        expected = pipe("a red ring", negative_prompt="dull", height=32, width=32, num_inference_steps=2,
                        guidance_scale=2.0, seed=4, image=picture, progress=False)  # fmt: skip
    assert drawer.is_pipeline and np.array_equal(np.asarray(image), np.asarray(expected.images[0]))
    assert parameters["negative_prompt"] == "dull"


@pytest.mark.parametrize(("changes", "told"), [
    ({"prompt": "  "}, "there is no prompt"), ({"height": 30}, "size is 30 x 32; expected multiples of 4"),
    ({"steps": 0}, "steps is 0"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said(changes, told):
    with pytest.raises(ValueError, match=told):
        Drawer(sampler())(wanted(**changes), iter)


def test_cancelled_between_two_steps_the_next_can_draw():
    drawer, seen = Drawer(sampler()), []

    def progress(steps):
        for step in steps:
            seen.append(step)
            if len(seen) == 2:
                raise Cancelled
            yield step

    with pytest.raises(Cancelled):
        drawer(wanted(), progress)
    assert len(seen) == 2 and drawer(wanted(), iter)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("gradio", reason="gradio is not installed")
    source = sampler()
    made = page(Drawer(source), "a test")
    yield source, launch(made, LOCAL, None, blocking=False)
    made.close()
    gc.collect()


def ask(address, prompt, seed, **more):
    """One person's request: (pictures of their gallery, parameters of the newest)."""
    from gradio_client import Client

    client = Client(address, verbose=False)
    values = {"prompt": prompt, "negative": "", "steps": 3, "guidance": 2.0, "image_guidance": 1.5, "seed": seed,
              "height": 32, "width": 32, "picture": None, "strength": 0.6, **more}  # fmt: skip
    gallery, parameters = client.predict(**values, api_name="/draw")
    return [np.asarray(Image.open(item["image"])) for item in gallery], json.loads(_text(parameters))


def _text(parameters):
    return parameters["value"] if isinstance(parameters, dict) else parameters


def test_two_people_at_once_get_their_own_pictures(served):
    source, address = served
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda seed: ask(address, f"picture {seed}", seed), (1, 2))
    for (pictures, parameters), seed in ((one, 1), (two, 2)):
        expected = source([f"picture {seed}"], seed=seed, steps=3, guidance=2.0)[0]
        assert len(pictures) == 1 and np.array_equal(pictures[0], expected)
        assert (parameters["seed"], parameters["prompt"]) == (seed, f"picture {seed}")


def test_an_error_is_a_message(served):
    with pytest.raises(Exception, match="size is 30 x 32; expected multiples of 4"):
        ask(served[1], "a ring", 1, height=30)


def test_only_this_machine_sees_it(served):
    assert served[1].startswith(f"http://{LOCAL}:")


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    with chromium() as opened:
        yield opened


def test_people_draw_and_are_refused(served, browser):
    _, address = served
    asked = []
    view = browser.new_page()
    view.on("request", lambda request: asked.append(request.url))
    view.goto(address)
    view.locator("#prompt textarea").fill("a red ring")
    view.locator("#draw").click()
    image = view.locator("#gallery img").first
    image.wait_for(timeout=60_000)
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 32
    view.locator("#Height input").fill("30")
    view.locator("#draw").click()
    view.get_by_text("size is 30 x 32; expected multiples of 4").first.wait_for(timeout=60_000)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def test_people_cancel_what_is_drawn_and_what_waits(served, browser):
    """The first one's picture waits in its first step, the second one's in the queue."""
    source, address = served
    begun, on = threading.Event(), threading.Event()

    def wait(*_):
        begun.set()
        on.wait(60)

    hook = source.model.register_forward_pre_hook(wait)
    views = [browser.new_page() for _ in range(2)]
    for view in views:
        view.goto(address)
        view.locator("#prompt textarea").fill("a red ring")
        view.locator("#draw").click()
        assert begun.wait(60)
    for view in views:
        view.wait_for_timeout(500)                   # until the clicks have arrived
        view.locator("#cancel").click()
        view.wait_for_timeout(500)
    on.set()
    for view in views:
        view.get_by_text("Cancelled: nothing was drawn.").first.wait_for(timeout=60_000)
        assert view.locator("#gallery img").count() == 0
    hook.remove()
