"""A page in headless Chromium, driven over its DevTools pipe: no driver, no package."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_PATIENCE = 60  # seconds; on a loaded machine it starts in ten


class Chromium:
    """One tab. `events` are all DevTools events so far."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        ours, theirs = os.pipe(), os.pipe()  # commands to it, messages from it
        self._out, self._in = ours[1], theirs[0]
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--disable-extensions", "--disable-background-networking",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}",
                 "about:blank"]  # fmt: skip
        # Chromium reads commands from descriptor 3 and writes to 4.
        line = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, CHROMIUM, *words],
            pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self.events: list[dict[str, Any]] = []
        self._count, self._buffer, self._session = 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a DevTools method."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], _PATIENCE)
            assert ready, f"Chromium says nothing for {_PATIENCE} seconds"
            part = os.read(self._in, 1 << 16)
            assert part, "Chromium ended"
            self._buffer += part
        data, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(data)
        if "id" not in message:
            self.events.append(message)
        return message

    def open(self, url: str, width: int) -> None:
        """Loads the page in a window of that many CSS pixels and waits for its load event."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        begin = len(self.events)
        self.call("Page.navigate", url=url)
        end = time.monotonic() + _PATIENCE
        while not any(e["method"] == "Page.loadEventFired" for e in self.events[begin:]):
            assert time.monotonic() < end, "no load event"
            self._read()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")
