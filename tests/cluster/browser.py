"""A real Chromium, driven over its debugging pipe (Chrome DevTools Protocol): no driver, no port, no package."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
DEADLINE_SECONDS = 60.0
_QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
]


def find_browser() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page in a headless browser that is ended with the `with` block."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self._folder = tempfile.mkdtemp()
        orders, self._write = os.pipe()
        self._read, answers = os.pipe()
        # The browser reads orders from file descriptor 3 and answers on 4; a shell puts them there.
        plumbing = f'exec "$0" "$@" 3<&{orders} 4>&{answers}'
        arguments = [str(find_browser()), *_QUIET, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", plumbing, *arguments],
            pass_fds=(orders, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(orders)
        os.close(answers)
        self._unread = b""
        self._calls = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(DEADLINE_SECONDS)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> Any:
        self._calls += 1
        order = {"id": self._calls, "method": method, "params": parameters} | self._session
        os.write(self._write, json.dumps(order).encode() + b"\0")
        while (message := self._message()).get("id") != order["id"]:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, page: Path | str) -> None:
        """Load a file or an address; `events` are from here on its own."""
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        self.wait_until_loaded()

    def wait_until_loaded(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self.seen("Page.loadEventFired"):
            assert time.monotonic() < deadline, "the page did not load"
            self.events.append(self._message())

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def ask(self, expression: str) -> Any:
        """As `evaluate`, of an expression whose value is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def follow(self, selector: str) -> None:
        """Click what leads to another page, and wait for that."""
        self.events = [event for event in self.events if event.get("method") != "Page.loadEventFired"]
        assert self.evaluate(f"document.querySelector({json.dumps(selector)}).click() ?? true"), selector
        self.wait_until_loaded()

    def type_into(self, selector: str, text: str) -> None:
        """Replace what a field holds, as somebody does who types."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{field}.focus(); {field}.select()")
        self.call("Input.insertText", text=text)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        file.write_bytes(b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def wait_for(self, expression: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def seen(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser is gone"
            self._unread += piece
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)
