"""Chromium without a window, driven through pipes by its DevTools protocol."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WORDS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")
TIMEOUT_S = 60.0


class Browser:
    """One page of a browser of its own; a context manager.

    Args:
        place: a folder for what the browser keeps.
    """

    def __init__(self, place: Path) -> None:
        assert CHROMIUM is not None
        asked, self._ask = os.pipe()
        self._hear, told = os.pipe()
        # The protocol's descriptors are 3 and 4.
        moved = f'exec "$@" 3<&{asked} 4>&{told}'
        words = ["bash", "-c", moved, "sh", CHROMIUM, *WORDS, f"--user-data-dir={place}"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(words, pass_fds=(asked, told), stdout=quiet, stderr=quiet)
        os.close(asked)
        os.close(told)
        self._numbers = itertools.count(1)
        self._rest = b""
        self.problems: list[str] = []
        """What the page's console told of errors, violations of its policy among them."""
        target = self.call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        how = {"targetId": target, "flatten": True}
        self._session = self.call("Target.attachToTarget", how, None)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ask)
        os.close(self._hear)

    def call(self, method: str, how: Any = None, session: Any = "own") -> Any:
        """What a method of the protocol answers."""
        number = next(self._numbers)
        body = {"id": number, "method": method, "params": how or {}}
        if session is not None:
            body["sessionId"] = self._session
        os.write(self._ask, json.dumps(body).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            self._note(told)

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            read = os.read(self._hear, 1 << 16)
            assert read, "the browser has ended"
            self._rest += read
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _note(self, told: Any) -> None:
        if told.get("method") == "Runtime.exceptionThrown":
            details = told["params"]["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif told.get("method") == "Log.entryAdded":
            entry = told["params"]["entry"]
            if entry["level"] == "error":
                self.problems.append(f"{entry['text']} {entry.get('url', '')}")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        how = {"expression": script, "returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", how)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression, once it is true."""
        end = time.monotonic() + TIMEOUT_S
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return found

    def open(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        """Open a page in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", {"features": scheme})
        self.call("Page.navigate", {"url": url})
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key; modifiers: 2 is Ctrl."""
        how = {"key": key, "modifiers": modifiers}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", how | {"type": kind})

    def point(self, selector: str) -> None:
        """Move the pointer to an element."""
        place = f"document.querySelector({json.dumps(selector)}).getClientRects()[0]"
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({place})")
        self.call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def type(self, selector: str, text: str) -> None:
        """Give an element the focus and type a text."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", {"text": text})

    def picture(self, file: Path) -> None:
        """Write what is seen as a PNG."""
        data = self.call("Page.captureScreenshot", {"format": "png"})["data"]
        file.write_bytes(base64.b64decode(data))
