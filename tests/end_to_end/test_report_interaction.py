"""What a reader does with a report: all of it by the keyboard, at the width of a desktop and of a phone."""

import time

import pytest
from browser import CHROMIUM, Browser
from report_pages import ABOUT, evidence, pairs, picture

from esd_jax.evaluation.evidence import Pair
from esd_jax.evaluation.report.html import report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is found")
FOCUS = "document.activeElement"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    same = tuple(Pair(f"unchanged {i}", picture(i), picture(i)) for i in range(4))
    groups = {"target: neon style": pairs(["a cat in neon style", "a dog in neon style", "b", "c", "d"], 0)}
    made = report(evidence(pictures={**groups, "related: others": same}), facts=ABOUT)
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(made, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(params=[1280, 400], ids=["desktop", "phone"])
def shown(request, browser, page):
    browser.complaints.clear()
    browser.requests.clear()
    browser.show(page, width=request.param)
    yield browser
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    wider = browser.value("document.documentElement.scrollWidth") - request.param
    assert wider <= 0


def tab_to(browser, query, most=80):
    """Presses Tab until an element has the focus, which must then be seen."""
    for _ in range(most):
        browser.press("Tab")
        if browser.value(f"{FOCUS}.matches({query!r})"):
            style = f"getComputedStyle({FOCUS}.closest('.frame') ?? {FOCUS})"
            assert browser.value(f"{style}.outlineStyle") == "solid" and browser.value(f"{style}.outlineWidth") != "0px"
            return
    raise AssertionError(f"Tab does not lead to {query}")


def test_the_slider_is_moved_by_arrow_keys(shown):
    tab_to(shown, ".wipe input")
    cut = "getComputedStyle(document.querySelectorAll('.wipe img')[1]).clipPath"
    assert shown.value(cut) == "inset(0px 0px 0px 50%)"
    shown.press("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight")
    assert shown.value(cut) == "inset(0px 0px 0px 52%)"
    assert shown.value(f"{FOCUS}.getAttribute('aria-valuetext')") == "52% before, 48% after"
    assert shown.value(f"{FOCUS}.getAttribute('aria-label')")
    box = "document.querySelector('.wipe .frame').getBoundingClientRect()"
    assert shown.value(f"{box}.width") == pytest.approx(shown.value(f"{box}.height"), abs=1)
    assert shown.value(f"{box}.width") > 300  # large
    name = "document.querySelector('.wipe .bar span').textContent"
    assert shown.value(name) == "a cat in neon style"
    tab_to(shown, ".wipe [aria-label='Next prompt']")
    shown.press("Enter")
    assert shown.value(name) == "a dog in neon style"
    before = shown.value("document.querySelector('.wipe img').src")
    assert before == shown.value("document.querySelectorAll('.pair')[1].querySelector('img').src")


def test_pictures_are_enlarged_and_walked_through(shown):
    count = shown.value("document.querySelectorAll('[data-big]').length")
    assert count == 4 + 4 + 1 + 1 + 2 * 4  # the first screen, the others, the attack's, and the timeline's
    tab_to(shown, ".pair")
    assert shown.value(f"{FOCUS}.getAttribute('aria-label')") == "Enlarge: a cat in neon style"
    shown.press("Enter")
    assert shown.value("document.querySelector('dialog').open")
    caption = "document.querySelector('dialog p').textContent"
    assert shown.value(caption) == "a cat in neon style"
    width = shown.value("Math.min(...[...document.querySelectorAll('dialog img')].map(i => i.clientWidth))")
    assert width > (300 if shown.value("innerWidth") > 1000 else 130)
    assert shown.value("document.querySelector('dialog').getBoundingClientRect().right <= innerWidth")
    shown.press("ArrowRight")
    assert shown.value(caption) == "a dog in neon style"
    shown.press("ArrowLeft", "ArrowLeft")
    assert shown.value("document.querySelector('dialog .bar span').textContent").startswith(f"{count} of {count}")
    shown.press("ArrowRight")
    assert "SSIM" in shown.value("document.querySelector('dialog .bar span').textContent")
    shown.press("Escape")
    assert not shown.value("document.querySelector('dialog').open")
    assert shown.value(f"{FOCUS}.getAttribute('aria-label')") == "Enlarge: a cat in neon style"
    shown.press(" ")
    assert shown.value("document.querySelector('dialog').open")


def test_a_command_is_copied(shown):
    shown.value("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    shown.value("document.querySelector('#settings h2').setAttribute('tabindex', -1)")
    shown.value("document.querySelector('#settings h2').focus()")
    tab_to(shown, "#settings .press", most=2)
    shown.press("Enter")
    assert shown.value("window.copied").startswith("esd-jax erase --config=esd_x --config.base=emoji")
    assert "\n" not in shown.value("window.copied")
    assert shown.value(f"{FOCUS}.textContent") == "Copied"
    assert shown.value("document.querySelector('[role=status]').textContent") == "Copied"
    # Without the clipboard's permission, by the selection.
    shown.value("navigator.clipboard.writeText = async () => { throw new Error('refused'); }")
    shown.value("document.execCommand = (name) => { window.copied = name + ' ' + document.activeElement.value; }")
    shown.press("Enter")
    assert shown.value("window.copied").startswith("copy esd-jax erase")
    assert shown.value("document.querySelectorAll('textarea').length") == 0


def test_tables_are_sorted_by_a_column_and_back(shown):
    column = "[...document.querySelectorAll('#files tbody td:last-child')].map(cell => cell.textContent)"
    unsorted = shown.value(column)
    assert unsorted == ["18.4 MB", "1.06 MB", "1.58 kB"]
    shown.value("document.querySelector('#files h2').setAttribute('tabindex', -1)")
    shown.value("document.querySelector('#files h2').focus()")
    tab_to(shown, "#files th:last-child button", most=5)
    head = "document.querySelector('#files th:last-child').ariaSort"
    for way, expected in (("ascending", unsorted[::-1]), ("descending", unsorted), (None, unsorted)):
        shown.press("Enter")
        assert shown.value(head) == way and shown.value(column) == expected
    words = "document.querySelector('#files th:nth-child(2) button').click()"
    shown.value(words)
    assert shown.value("document.querySelector('#files tbody td').textContent").startswith("ESD delta")


def test_the_theme_is_toggled(shown):
    tab_to(shown, ".theme", most=1)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = shown.value(paper)
    assert shown.value(f"{FOCUS}.textContent") == "Dark theme"
    shown.press("Enter")
    dark = shown.value(paper)
    channels = [sum(map(int, colour[4:-1].split(","))) for colour in (light, dark)]
    assert channels[0] > 700 and channels[1] < 100 and shown.value(f"{FOCUS}.textContent") == "Light theme"
    shown.press("Enter")
    assert shown.value(paper) == light


def test_only_pictures_that_changed_are_shown(shown):
    visible = "[...document.querySelectorAll('#summary .pair')].filter(p => p.offsetParent).length"
    assert shown.value(visible) == 8
    tab_to(shown, ".only input")
    assert "6 of 10" in shown.value(f"{FOCUS}.parentElement.textContent")
    shown.press(" ")
    assert shown.value(visible) == 4
    assert shown.value("[...document.querySelectorAll('#summary h3')].filter(h => h.offsetParent).length") == 1
    shown.press(" ")
    assert shown.value(visible) == 8


def test_tables_that_scroll_say_so(shown):
    signs = shown.value("[...document.querySelectorAll('.scrolls')].filter(s => s.checkVisibility()).length")
    wide = (
        "[...document.querySelectorAll('.wide')].filter(w => w.checkVisibility() && w.scrollWidth > w.clientWidth + 1)"
    )
    assert signs == shown.value(f"{wide}.length")
    if shown.value("innerWidth") == 400:
        assert signs >= 2
        assert shown.value(f"{wide}.every(w => getComputedStyle(w).backgroundImage.includes('gradient'))")
        assert shown.value(f"{wide}.every(w => w.tabIndex === 0 && w.ariaLabel)")


def test_without_a_script_the_page_is_read(browser, page, tmp_path):
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        (tmp_path / "plain.html").write_text(page.read_text())
        browser.ask("Page.navigate", url=(tmp_path / "plain.html").as_uri())
        state = "[location.pathname, document.readyState].join()"  # the page's own script is off, the debugger's is not
        while browser.value(state) != f"{tmp_path / 'plain.html'},complete":
            time.sleep(0.05)
        text = browser.value("document.body.innerText")
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert "neon style is nearly gone" in text.lower() and "Only pictures" not in text and "Copy" not in text
    assert "esd-jax erase" in text and text.count("a cat in neon style") == 1
    assert browser.value("document.querySelectorAll('button, dialog, .wipe, .scrolls').length") == 0
