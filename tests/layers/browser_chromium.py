"""A real browser without a window: chromium, spoken to in its devtools protocol through two pipes.

    with Browser(scratch / "profile") as browser:
        browser.open(page)
        browser.run("document.title")          # the value of an expression
        browser.click("#tree .row")            # a real click, with the mouse
        browser.problems                       # what the console said, exceptions, violations of the policy

Devtools protocol: --remote-debugging-pipe, messages are JSON ended by a NUL, to file descriptor 3 and from 4.
"""

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
_PATIENCE_SECONDS = 60.0


class Browser:
    """One chromium with one page."""

    def __init__(self, profile: Path, *, width: int = 1440, height: int = 1120, dark: bool = False) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._profile, self._size, self._dark = profile, (width, height), dark
        self._number = 0
        self._session = ""
        self._received = b""
        self._loaded = False

    def __enter__(self) -> Self:
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        width, height = self._size
        # The shell gives the pipes the numbers that chromium wants; they may be 3 and 4 here already.
        wanted = f'exec 8<&{to_child} 9>&{from_child}; exec 3<&8 4>&9 8<&- 9>&-; exec "$@"'
        command = ["chromium", *_FLAGS, f"--user-data-dir={self._profile}", f"--window-size={width},{height}"]
        self._log = open(f"{self._profile}.log", "wb")
        self._process = subprocess.Popen(
            ["bash", "-c", wanted, "chromium", *command, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(to_child, from_child),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        os.close(to_child)
        os.close(from_child)
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self._call("Emulation.setEmulatedMedia", features=[scheme, still])
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._call("Browser.close", session="")
        finally:
            try:
                self._process.wait(10 if kind is None else 0.1)
            except subprocess.TimeoutExpired:
                self._process.kill()  # the browser; its helpers end with their pipes
                self._process.wait()
            for fd in (self._in, self._out):
                os.close(fd)
            self._log.close()

    def open(self, page: Path) -> None:
        """Load a file, and wait until it is there."""
        self._loaded = False
        self._call("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Click in the middle of the element, wherever that is now."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest'});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        self.settle()

    def key(self, key: str, text: str = "") -> None:
        """Press a key where the focus is."""
        more = {"text": text} if text else {}
        code = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Enter": 13}.get(key, 0)
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **more)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)
        self.settle()

    def type(self, text: str) -> None:
        """Type where the focus is."""
        self._call("Input.insertText", text=text)
        self.settle()

    def settle(self) -> None:
        """Wait until what was done is drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the window."""
        self.settle()
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    # ---- the protocol ------------------------------------------------------------------------------------------------

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        session = self._session if session is None else session
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result = answer["result"]
                assert isinstance(result, dict)
                return result

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._in, 1 << 20) if ready else b""
            assert piece, f"chromium does not answer: {Path(self._log.name).read_text(errors='replace')[-2000:]}"
            self._received += piece
        raw, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.problems.append(f"console.{params['type']}: {params['args']}")
            case "Runtime.exceptionThrown":
                self.problems.append(f"exception: {params['exceptionDetails']}")
            case "Log.entryAdded":
                self.problems.append(f"log: {params['entry']['text']}")
            case "Page.javascriptDialogOpening":
                self.problems.append(f"dialog: {params['message']}")
