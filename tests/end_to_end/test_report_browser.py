"""The pages of the report in a browser."""

import base64

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from report_pages import all_pages

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is found")


@pytest.fixture(scope="module")
def pages():
    return all_pages()


@needs_browser
def test_a_browser_shows_every_page_and_asks_for_nothing(pages, tmp_path):
    with Browser() as browser:
        for name, source in pages.items():
            (tmp_path / f"{name}.html").write_text(source, encoding="utf-8")
        shots = {}
        for name, width, dark in [(n, w, False) for n in pages for w in (375, 800, 1280)] + [("report", 1280, True)]:
            browser.show(tmp_path / f"{name}.html", width=width, dark=dark)
            for size in ("125%", "100%"):  # fonts differ in width between machines: larger letters stand for wide ones
                browser.value(f"document.documentElement.style.fontSize = '{size}'")
                wider = browser.value("document.documentElement.scrollWidth") - width
                assert wider <= 0, f"{name} with letters of {size} is {wider} pixels wider than a window of {width}"
            assert browser.value("[...document.images].every(i => i.naturalWidth > 0)")
            browser.picture(tmp_path / "shot.png")
            shots[name, width, dark] = np.asarray(Image.open(tmp_path / "shot.png").convert("L"), float)
        assert browser.complaints == []
        assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
        assert {url for url in browser.requests if url.startswith("file")} == {
            (tmp_path / f"{name}.html").as_uri() for name in pages
        }
        light, dark = shots["report", 1280, False], shots["report", 1280, True]
        assert light[5, 5] > 200 and dark[5, 5] < 60
        assert light.std() > 20  # something is drawn
        # The pictures stand on the first screen.
        browser.show(tmp_path / "report.html")
        assert browser.value("document.images[0].getBoundingClientRect().bottom") < 800
        pdf = browser.ask("Page.printToPDF")["data"]
        assert base64.b64decode(pdf).startswith(b"%PDF")


@needs_browser
def test_the_browser_complains_of_a_page_that_asks_for_something(pages, tmp_path):
    """What the test above relies on."""
    asking = pages["empty"].replace("<main>", '<main><img src="https://example.invalid/x.png" style="width: 1px">')
    (tmp_path / "page.html").write_text(asking, encoding="utf-8")
    with Browser() as browser:
        browser.show(tmp_path / "page.html")
        assert any("Content Security Policy" in text for text in browser.complaints)
        assert any("invalid" in url for url in browser.requests)  # what was asked for is noted, though it was refused
