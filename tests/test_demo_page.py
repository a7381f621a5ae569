"""The web demo in headless Chromium: ask, see the box, mark, look inside, switch off, upload; by hand, by keyboard, narrow.

Run by `make test-browser`; skipped where gradio, playwright or a Chromium is missing. SHOTS=DIR keeps screenshots.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import shutil
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDE, NARROW = {"width": 1360, "height": 950}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[str]:
    """The address of a demo of untrained parts, which says little but in all the same ways. CHECKPOINT serves another."""
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'commvlm[demo]'")
    from commvlm.app.demo.serving import serve
    from commvlm.train.assemble import assemble
    from commvlm.train.recipe import load_recipe

    folder = Path(os.environ.get("CHECKPOINT", tmp_path_factory.mktemp("checkpoint") / "model"))
    if "CHECKPOINT" not in os.environ:
        model, processor = assemble(load_recipe("micro").model)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = serve(folder, port=port, max_new_tokens=12, block=False)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'commvlm[browser]'")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium; install one, or set CHROMIUM to its path")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(demo, browser) -> Iterator:
    """visit(viewport) -> a page that has loaded; what it asks of other machines, and its errors, fail the test."""
    opened = []

    def visit(viewport: dict[str, int] = WIDE, **options):
        page = browser.new_context(viewport=viewport, **options).new_page()
        opened.append(page)
        page.elsewhere, page.errors = [], []
        page.on("request", lambda r: page.elsewhere.append(r.url) if not own(r.url, demo) else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.set_default_timeout(60_000)
        page.goto(demo)
        page.wait_for_selector("#chips button")
        page.wait_for_selector("#maps img")
        return page

    yield visit
    for page in opened:
        assert page.elsewhere == []
        assert page.errors == []
        page.context.close()


def own(url: str, demo: str) -> bool:
    return url.startswith((demo, "data:", "blob:", demo.replace("http", "ws")))


def keep(page, name: str) -> None:
    if folder := os.environ.get("SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def at(page, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the image (64 x 64) is on the page."""
    page.locator("#stage .stage > svg").scroll_into_view_if_needed()
    box = page.locator("#stage .stage > svg").bounding_box()
    return box["x"] + x / 64 * box["width"], box["y"] + y / 64 * box["height"]


def answered(page, count: int) -> str:
    """The text of the count-th answer, when it is whole."""
    page.wait_for_function(f"document.querySelectorAll('#talk .answered:not(.growing)').length >= {count}")
    return page.locator("#talk .answered").nth(count - 1).inner_text()


def asks(page, question: str) -> None:
    page.locator("#question textarea").fill(question)
    page.locator("#question textarea").press("Enter")


def test_a_visit_by_mouse(visit):
    page = visit()
    first = page.locator("#maps img").first.get_attribute("src")
    assert page.locator("#maps img").count() == 8
    assert page.locator("#weights .bar").count() == 12

    page.locator("#chips button").first.click()  # "Where is ...?"
    said = answered(page, 1)
    boxes = re.findall(r"\[[\d.,]+\]", said)
    assert page.locator("#stage .marks text").count() == len(boxes)

    page.mouse.click(*at(page, 10, 10))
    page.wait_for_function("src => document.querySelector('#maps img').src !== src", arg=first)
    assert page.locator("#chips button").first.inner_text() == "What is at [10,10]?"

    start, end = at(page, 8, 12), at(page, 40, 36)
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=4)
    page.mouse.up()
    page.wait_for_function("document.querySelector('#question textarea').value.includes('[8,12,40,36]')")
    page.locator("#question textarea").press("Enter")
    answered(page, 2)
    assert "What is at [8,12,40,36]?" in page.locator("#talk .asked").nth(1).inner_text()
    page.wait_for_function("[...document.querySelectorAll('#stage .marks text')].some(e => e.textContent === 'asked')")

    page.get_by_label("dinov2", exact=True).check()
    page.locator("#again").click()
    page.wait_for_selector("#beside .beside")
    assert page.locator("#beside h4").all_inner_texts() == ["all on", "without dinov2"]
    keep(page, "wide")


def test_a_box_in_an_answer_is_drawn_where_it_is(visit, demo, monkeypatch):
    from commvlm.app.answering import Answerer

    def stream(self, example, *, knock_out=None):
        yield "at [0.250,0.500,0.500,0.750]" if not knock_out else "at [0.500,0.500,0.750,0.750]"

    monkeypatch.setattr(Answerer, "stream", stream)
    page = visit()
    asks(page, "where?")
    assert "at [16,32,32,48]" in answered(page, 1).replace("\n", " ")
    (left, top), (right, bottom) = at(page, 16, 32), at(page, 32, 48)
    drawn = page.locator("#stage .marks rect").nth(1).bounding_box()
    for value, there in zip(
        (drawn["x"], drawn["y"], drawn["x"] + drawn["width"], drawn["y"] + drawn["height"]), (left, top, right, bottom),
        strict=True,
    ):  # fmt: skip
        assert abs(value - there) < 4  # the line has a width
    page.get_by_label("3", exact=True).check()  # layer 3 of CLIP
    page.locator("#again").click()
    page.wait_for_selector("#beside .beside")
    assert page.locator("#beside h4").all_inner_texts() == ["all on", "without clip:3"]
    assert "[32,32,48,48]" in page.locator("#beside").inner_text()
    assert "overlap by 0.00" in page.locator("#beside").inner_text()
    assert page.locator("#stage .marks text").all_text_contents() == ["all on", "without"]


def test_mistakes_are_said_in_one_line(visit):
    page = visit()
    asks(page, "what is in [1,2,300,40]?")
    page.get_by_text("does not lie in the image, which is 64 pixels wide and 64 high").wait_for()
    page.locator("#again").click()
    page.get_by_text("nothing is switched off").wait_for()
    assert page.locator("#talk .answered").count() == 0


def test_an_upload_is_asked_about_in_its_own_pixels(visit, tmp_path):
    page = visit()
    Image.new("RGB", (1600, 900), "navy").save(tmp_path / "photo.png")
    page.locator("#upload input[type=file], input[type=file]").first.set_input_files(tmp_path / "photo.png")
    page.wait_for_function("document.querySelector('#stage .stage > svg').getAttribute('viewBox') === '0 0 1600 900'")
    asks(page, "what is in [100,40,1500,800]?")
    answered(page, 1)
    (tmp_path / "text.png").write_text("no image")
    page.locator("#upload input[type=file], input[type=file]").first.set_input_files(tmp_path / "text.png")
    page.get_by_text("no image that can be read").wait_for()
    assert page.locator("#stage .stage > svg").get_attribute("viewBox") == "0 0 1600 900"


def test_by_keyboard_alone(visit):
    page = visit()
    for _ in range(12):
        if page.evaluate("document.activeElement.tagName") == "svg":
            break
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "svg"
    page.keyboard.press("b")
    page.keyboard.press("Enter")  # the middle, 32, 32
    for key in ("Shift+ArrowRight", "ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.wait_for_function("document.querySelector('#question textarea').value.includes('[32,32,40,36]')")
    assert page.evaluate("document.activeElement.tagName") == "svg"  # still there, to go on
    page.keyboard.press("p")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#chips button').textContent === 'What is at [40,36]?'")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('#maps img')")


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen(visit, dark):
    page = visit(NARROW, has_touch=True, device_scale_factor=2, color_scheme="dark" if dark else "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="Box", exact=True).tap()
    for x, y in ((8, 12), (40, 36)):
        page.touchscreen.tap(*at(page, x, y))
    page.wait_for_function("document.querySelector('#question textarea').value.includes('[8,12,40,36]')")
    page.locator("#chips button").first.tap()
    answered(page, 1)
    keep(page, f"narrow-{'dark' if dark else 'light'}")


def test_visitors_do_not_see_one_another(visit):
    one, other = visit(), visit()
    asks(one, "Is there a star in the image?")
    answered(one, 1)
    assert other.locator("#talk .answered").count() == 0
    other.locator("#scenes button").nth(2).click()
    other.wait_for_timeout(1000)
    assert one.locator("#talk .answered").count() == 1


def test_requests_are_bounded_and_pages_may_load_nothing_from_elsewhere(demo):
    with urllib.request.urlopen(demo) as page:
        assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("gradio_api/upload", "gradio_api/queue/join"):
        connection = http.client.HTTPConnection(demo.split("/")[2], timeout=60)
        connection.putrequest("POST", f"/{path}")
        connection.putheader("Content-Length", str(17 * 2**20))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()


def test_a_body_of_unsaid_length_is_counted():
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'commvlm[demo]'")
    from commvlm.app.demo.serving import MAX_BYTES, Bounded

    async def reads_all(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": bytes(2**20), "more_body": True}

    async def send(message: dict) -> None:
        sent.append(message)

    bounded = Bounded(reads_all)({"type": "http", "headers": []}, receive, send)  # type: ignore[arg-type]
    with ThreadPoolExecutor() as apart:  # the browser's own loop runs in this thread
        apart.submit(asyncio.run, bounded).result()
    assert [message.get("status") for message in sent] == [413, None]
    assert str(MAX_BYTES).encode() in sent[1]["body"]
