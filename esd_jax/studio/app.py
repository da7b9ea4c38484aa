"""The page, and how it is served. `python -m esd_jax.studio.app` serves it alone, as on a Space."""

import importlib
import os
import signal
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from esd_jax.runs import listing
from esd_jax.runs.listing import Run
from esd_jax.studio import tabs, views
from esd_jax.studio.jobs import MISTAKES, Desk, Job
from esd_jax.studio.tabs import ACTION, HTML, reported

gr: Any = importlib.import_module("gradio")  # an extra, whose types lack the events that it generates
HOST = "127.0.0.1"
Content = Callable[[Job | None, Run | None], Any]
Key = Callable[[Job | None, Run | None], Hashable]


class Page:
    """The components, and what fills them. All windows show the job and the runs of one desk."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.following: list[tuple[Any, Content, Key]] = []  # what follows the job and the run that is chosen
        with gr.Blocks(title="esd_jax studio", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            with gr.Row(elem_id="head"):
                HTML("<h1>esd_jax studio</h1>")
                self.run = gr.Dropdown([], label="Run", elem_id="run", scale=3, filterable=False)
            with gr.Row(elem_id="job"):
                self.follow(HTML(elem_id="bar"), views.bar, views.state)
                stop = gr.Button("Stop", elem_id="stop", variant="stop", visible=False, scale=0, min_width=96)
                self.follow(
                    stop,
                    lambda job, run: gr.Button(visible=bool(job and job.active)),
                    lambda job, run: job and job.active,
                )
                stop.click(desk.stop, **ACTION)
            with gr.Tabs():
                for make in tabs.ALL:
                    with gr.Tab(make.__name__.title(), id=make.__name__):
                        make(self)
            shown, timer = gr.State({}), gr.Timer(1)
            outputs = [*(component for component, _, _ in self.following), self.run, shown]
            for event in (timer.tick, self.run.change, self.blocks.load):
                event(self.refresh, [self.run, shown], outputs, queue=False, **ACTION)

    def follow(self, component: Any, content: Content, key: Key) -> None:
        """Fills a component with `content(job, run)` whenever `key(job, run)`, or the run that is chosen, changes."""
        self.following.append((component, content, key))

    def refresh(self, name: str | None, shown: dict[int, Hashable]) -> list[Any]:
        """What has changed since a window showed it, and what it shows now."""
        job, choices, now, updates = self.desk.job, self.choices(), {}, []
        names = [value for _, value in choices]
        current = name if name in names else next(iter(names), None)
        run = listing.read(self.desk.folder / current) if current else None
        for i, (_, content, key) in enumerate(self.following):
            try:
                state = (current, key(job, run))
                updates.append(content(job, run) if shown.get(i) != state else gr.skip())
                now[i] = state
            except MISTAKES:  # a file that is being written, or was deleted: again the next time
                updates.append(gr.skip())
        now[-1] = (current, tuple(choices))
        updates.append(gr.Dropdown(choices=choices, value=current) if shown.get(-1) != now[-1] else gr.skip())
        return [*updates, now if now != shown else gr.skip()]

    def choices(self) -> list[tuple[str, str]]:
        """(label, name) of each run; of one that only begins, too."""
        known, job = [(run.label, run.name) for run in listing.listed(self.desk.folder)], self.desk.job
        if job and job.active and job.folder.name not in [name for _, name in known]:
            known.insert(0, (f"{job.folder.name} · about to begin", job.folder.name))
        return known

    def chosen(self, name: str | None) -> Run:
        """The run of a name. Raises ValueError if there is none."""
        if not name or not (run := listing.read(self.desk.folder / Path(name).name)):
            raise ValueError("Choose a run first, at the top of the page; the tab Erase makes one.")
        return run

    def starts(self, button: Any, work: Callable[..., Job], *inputs: Any) -> None:
        """Lets a button start a job on the run that is chosen: `work(desk, run, *inputs)`."""
        action = reported(lambda name, *values: work(self.desk, self.chosen(name), *values) and None)
        button.click(action, [self.run, *inputs], None, **ACTION)


def launch(desk: Desk, host: str = HOST, port: int | None = None) -> tuple[Any, str]:
    """Serves the page in threads of its own. Returns it, and its address. Raises OSError for a port that is taken."""
    theme = gr.themes.Default(
        primary_hue="sky", neutral_hue="slate", radius_size="sm", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    blocks = Page(desk).blocks
    _, address, _ = blocks.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, theme=theme,
        head=views.head(), footer_links=[], run_history=False, ssr_mode=False, pwa=False, mcp_server=False,
        allowed_paths=[str(desk.folder.absolute())],
    )  # fmt: skip
    return blocks, address


def serve(desk: Desk, host: str = HOST, port: int | None = None) -> None:
    """Serves the page until Ctrl-C or SIGTERM; a job is stopped then, and its checkpoint is kept."""
    blocks, address = launch(desk, host, port)
    print(f"studio   {address}\nruns     {desk.folder.absolute()}\nCtrl-C ends it", flush=True)
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    ended.wait()
    for number, handler in before.items():
        signal.signal(number, handler)  # a second Ctrl-C ends at once
    if desk.job and desk.job.active:
        print(f"stopping after its step: {desk.job.title}; another Ctrl-C does not wait", flush=True)
    desk.stop()
    desk.wait()
    blocks.close()


if __name__ == "__main__":
    serve(Desk(), os.environ.get("GRADIO_SERVER_NAME", HOST))  # which a Space sets; GRADIO_SERVER_PORT counts, too
