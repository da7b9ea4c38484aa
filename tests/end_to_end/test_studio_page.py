"""The studio's page: what it follows, and all of it in a browser."""

import importlib.util
import shutil
import time
import zipfile

import pytest
from browser import CHROMIUM, Browser
from command_line import last_line

import esd_jax
from esd_jax import cli
from esd_jax.runs import listing
from esd_jax.studio.jobs import Desk, Job

gradio = importlib.util.find_spec("gradio")
needs_gradio = pytest.mark.skipif(gradio is None, reason="gradio is not installed")
needs_browser = pytest.mark.skipif(gradio is None or CHROMIUM is None, reason="no gradio, or no chromium")
PATIENCE = 600
TABS = ("Erase", "Compare", "Strength", "Attack", "Report", "Export", "Runs")


def test_without_gradio_the_verb_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert cli.main(["studio"]) == 2
    assert (
        last_line(capsys.readouterr().err) == "esd-jax: error: the studio needs gradio: pip install 'esd-jax[studio]'\n"
    )


@needs_gradio
def test_the_page_follows_the_job_and_the_runs(tmp_path):
    from esd_jax.studio import app

    desk = Desk(tmp_path / "runs")
    page = app.Page(desk)
    shown = page.refresh(None, {})[-1]
    again = page.refresh(None, shown)
    assert len(again) == len(page.following) + 2
    assert all(update == again[-1] for update in again)  # nothing has changed
    assert page.choices() == []
    desk.job = Job("erase", "Erasing a cat", desk.folder / "a-cat")
    updates = page.refresh(None, shown)
    assert "Erasing a cat" in updates[0] and "first preview" in "".join(map(str, updates))
    assert updates[-2].value == "a-cat" and page.choices() == [("a-cat · about to begin", "a-cat")]
    desk.job.state = "done"
    assert page.refresh("a-cat", updates[-1])[-2].value is None  # it has left no run
    for name in (None, "", "a-cat", "../../etc"):
        with pytest.raises(ValueError, match="Choose a run first"):
            page.chosen(name)
    config = page.blocks.get_config_file()
    assert not config["analytics_enabled"] and all(one["api_visibility"] == "private" for one in config["dependencies"])


@needs_gradio
def test_it_listens_on_this_machine_alone(tmp_path):
    from esd_jax.studio import app

    blocks, address = app.launch(Desk(tmp_path))
    try:
        assert address.startswith("http://127.0.0.1:") and blocks.server_name == "127.0.0.1"
        assert not blocks.share and blocks.allowed_paths == [str(tmp_path)]
    finally:
        blocks.close()


class Visitor:
    """Somebody at the page."""

    def __init__(self, browser):
        self.browser = browser

    def open(self, address, width):
        self.browser.show(address, width=width, height=900)
        self.browser.until("!!document.querySelector('#go')", PATIENCE)

    def tab(self, name):
        """Chooses a tab; in a narrow window some are in a menu."""
        click = (
            f"(() => {{ const tab = [...document.querySelectorAll('[role=tab], .overflow-dropdown button')]"
            f".find(e => e.textContent.trim() == '{name}' && e.offsetHeight); tab?.click(); return !!tab }})()"
        )
        if not self.browser.value(click):
            self.browser.value("document.querySelector('.overflow-menu > button').click() || 1")
            self.browser.until(click)
        self.browser.until(f"document.querySelector('[role=tab][aria-selected=true]').textContent.trim() == '{name}'")

    def click(self, place):
        self.browser.until(f"!!document.querySelector('{place}')?.offsetHeight")
        self.browser.value(f"document.querySelector('{place}').click() || 1")

    def write(self, place, text):
        self.browser.value(
            f"(() => {{ const e = document.querySelector('{place}'); const p = Object.getPrototypeOf(e);"
            f"Object.getOwnPropertyDescriptor(p, 'value').set.call(e, '{text}');"
            "e.dispatchEvent(new Event('input', {bubbles: true})); return 1 })()"
        )

    def images(self, place):
        """The sources of the images of each row."""
        sources = "[...row.querySelectorAll('img')].map(image => image.src)"
        return self.browser.value(f"[...document.querySelectorAll('{place} tbody tr')].map(row => {sources})")

    def bar(self, *words, state=""):
        """Waits until the line about the job has some words, and the job a state."""
        self.browser.until(
            f"(() => {{ const bar = document.querySelector('#bar p.{state or 'bar'}');"
            f"return bar && {list(words)!r}.every(word => bar.innerText.includes(word)) }})()",
            PATIENCE,
        )


@pytest.mark.slow
@needs_browser
def test_a_visit_from_an_erasure_to_its_download(tmp_path):
    from esd_jax.studio import app

    desk = Desk(tmp_path / "runs")
    blocks, address = app.launch(desk)
    try:
        with Browser() as browser:
            visit(Visitor(browser), browser, address, desk, tmp_path / "downloads")
            assert browser.complaints == []
            remote = [url for url in browser.requests if not url.startswith((address, "data:", "blob:", "about:"))]
            assert remote == []
    finally:
        desk.stop()
        desk.wait(PATIENCE)
        blocks.close()


def visit(visitor, browser, address, desk, downloads):
    visitor.open(address, 1280)
    browser.until("document.querySelector('#previews').innerText.includes('press Erase')")
    visitor.tab("Compare")
    visitor.click("#compare-go")  # there is no run yet
    browser.until("document.body.innerText.includes('Choose a run first')")
    visitor.tab("Erase")
    visitor.write("#updates input, #updates textarea", "60")
    visitor.click("#go")
    visitor.bar("erasing", "of 60")
    browser.until(
        "document.querySelectorAll('#previews img').length >= 8", PATIENCE
    )  # a second preview, after update 5
    browser.until("!!document.querySelector('#loss svg')")
    visitor.click("#go")
    browser.until("document.body.innerText.includes('One job at a time')")
    browser.ask("Page.navigate", url="about:blank")  # the page is closed, and opened again: the job has gone on
    visitor.open(address, 400)
    visitor.bar("Erasing neon style", "of 60")
    visitor.click("#stop")
    visitor.bar("stopped at step", state="stopped")
    run = listing.read(desk.folder / "neon-style")
    assert 5 <= run.step < 60 and not run.finished

    for width in (1280, 400):
        visitor.open(address, width)
        browser.until("document.querySelector('#run input').value.startsWith('neon-style')")
        for name in TABS:
            visitor.tab(name)
            browser.until(f"document.documentElement.scrollWidth <= {width}")
        visitor.tab("Compare")
        visitor.click("#compare-go")
        browser.until("document.querySelectorAll('#wipe img').length == 12", PATIENCE)
        base, erased, difference = visitor.images("#grid")[:3]
        assert base[0] != erased[0] and base[0].startswith("data:image/") and len(difference) == 4
        browser.value("document.querySelector('#wipe input').focus()")
        browser.press(*["ArrowLeft"] * 20)
        assert browser.value("document.querySelector('#wipe .edge').style.getPropertyValue('--edge')") == "30%"
        visitor.tab("Strength")
        browser.value("document.querySelector('#strength input[type=range]').focus()")
        browser.press(*["ArrowLeft"] * 20)  # from 1 to 0, in steps of 0.05
        browser.until("document.querySelector('#meaning').innerText.includes('The base')")
        browser.until("document.querySelectorAll('#strengths tbody tr')[1]?.innerText.trim() == '0'", PATIENCE)
        base, at_zero, erased = visitor.images("#strengths")
        assert base == at_zero != erased
        browser.press(*["ArrowLeft"] * 2)
        browser.until("document.querySelector('#meaning').innerText.includes('strengthened')")
        browser.until("document.querySelectorAll('#strengths tbody tr')[1]?.innerText.trim() == '-0.1'", PATIENCE)
        assert visitor.images("#strengths")[1] not in (base, erased)

        visitor.tab("Export")
        if width == 1280:  # at 400 the file is still offered
            visitor.click("#export-go")
        visitor.bar("Exporting neon-style", state="done")
        shutil.rmtree(downloads, ignore_errors=True)
        browser.ask("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        visitor.click("#download")
        end = time.monotonic() + PATIENCE
        while not (files := list(downloads.glob("*.zip"))):
            assert time.monotonic() < end
            time.sleep(0.2)
        zipfile.ZipFile(files[0]).extractall(downloads)
        (folder,) = (path for path in downloads.iterdir() if path.is_dir())
        assert esd_jax.load(folder).provenance.erased[-1].texts == ("neon style",)

    visitor.tab("Runs")
    visitor.click("#delete")
    visitor.click("#delete-no")
    browser.until("!document.querySelector('#delete-yes')?.offsetHeight")
    assert run.folder.is_dir()
    visitor.click("#delete")
    visitor.click("#delete-yes")
    browser.until("document.querySelector('#details').innerText.includes('No run yet')")
    assert not run.folder.exists()
