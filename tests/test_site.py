"""The documentation site in a browser: search finds the page one wants, nothing is wider than a telephone, formulas are
drawn, and no page asks another server for anything."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.browsing import chromium

ROOT = Path(__file__).parents[1]
WANTED = {
    "shift": "reference/train.html", "LoRA": "docs/fine-tuning/index.html", "resume": "docs/training/index.html",
    "precompute": "reference/commands.html", "fp8": "docs/released-weights.html",
}  # fmt: skip
FEW = 3                     # of the pages that a search finds, as many are looked at


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Its address on this machine."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    built = tmp_path_factory.mktemp("site")
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(built)]
    done = subprocess.run(command, cwd=ROOT / "docs/site", env=os.environ | quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=built))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", built
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.mark.parametrize("asked", WANTED)
def test_search_finds_the_page_one_wants(asked, site, browser):
    page = browser.new_page()
    page.goto(f"{site[0]}index.html")
    page.locator("[data-md-component=search-query]").first.click()
    page.keyboard.type(asked)
    page.locator(".md-search-result__item").nth(FEW - 1).wait_for(timeout=30_000)
    links = page.locator(".md-search-result__item .md-search-result__link")
    found = [link.get_attribute("href").removeprefix(site[0]) for link in links.all()]
    pages = list(dict.fromkeys(one.partition("?")[0] for one in found))
    page.close()
    assert WANTED[asked] in pages[:FEW], pages


@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("width", (390, 1280))
def test_pages_fit_and_ask_nobody_else(width, scheme, site, browser):
    address, built = site
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    formulas = 0
    for file in sorted(built.rglob("*.html")):
        page.goto(address + file.relative_to(built).as_posix())
        wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        assert wider <= 0 and not broken, (file, wider, broken)
        heights = page.evaluate("[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height)")
        assert all(height > 10 for height in heights), (file, heights)
        formulas += len(heights)
    context.close()
    assert formulas == sum(path.read_text().count("```math") for path in (ROOT / "rfkernels").glob("*/README.md")) > 0
    assert not [url for url in asked if not url.startswith((address, "data:"))]
