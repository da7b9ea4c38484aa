"""Headless Chromium, told what to do through its debugging pipe: no driver and no port is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --hide-scrollbars --no-proxy-server "
    "--remote-debugging-pipe"
)
PATIENCE = 60  # seconds for any answer
# Key -> its code, and the text that it gives.
KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    " ": (32, " "),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
}


class Browser:
    """One page. `complaints`: what the console said of errors. `requests`: every address that was asked for."""

    def __init__(self):
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._count, self._rest = 0, b""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads commands from its descriptor 3, and answers on 4.
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        words = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, *words], pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._session = None
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command's answer; what happens meanwhile is noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(time.monotonic() + PATIENCE)
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]

    def show(
        self, page: Path | str, *, width: int = 1280, height: int = 800, dark: bool = False, paper: bool = False
    ) -> None:
        """Opens a file, or an address, in a window of this size, and waits until it has settled."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="print" if paper else "", features=[scheme])
        self.ask("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        while self.value("document.readyState") != "complete" or self.value("location.href") == "about:blank":
            time.sleep(0.05)
        self.value("Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(() => 1)")

    def value(self, script: str) -> Any:
        """What an expression gives on the page."""
        asked = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return asked["result"].get("value")

    def press(self, *keys: str, shift: bool = False) -> None:
        """Presses keys, one after the other, as on a keyboard."""
        for key in keys:
            number, text = KEYS[key]
            common = {"key": key, "windowsVirtualKeyCode": number, "modifiers": 8 * shift}
            self.ask("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, text=text)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def until(self, script: str, seconds: float = PATIENCE) -> Any:
        """Waits until an expression is true on the page, and returns what it gives."""
        end = time.monotonic() + seconds
        while not (value := self.value(script)):
            assert time.monotonic() < end, f"after {seconds:.0f} s there is still no {script}"
            time.sleep(0.2)
        return value

    def picture(self, file: Path, *, whole: bool = False) -> None:
        """Takes a screenshot: of the window, or of the whole page."""
        clip = {}
        if whole:
            size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {**size, "scale": 1}, "captureBeyondViewport": True}
        file.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png", **clip)["data"]))

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, until - time.monotonic()))
            assert ready, f"the browser did not answer within {PATIENCE} s"
            received = os.read(self._in, 1 << 20)
            assert received, "the browser ended"
            self._rest += received
        first, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(first)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
