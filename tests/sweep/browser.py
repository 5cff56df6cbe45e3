"""A headless Chromium that tests ask things of, by the WebDriver protocol."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

MISSING = "" if shutil.which("chromedriver") and shutil.which("chromium") else "chromium and chromedriver are not installed"
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1400,1600",
)  # fmt: skip


class Browser:
    """A window; `profile` is an empty directory of its own."""

    def __init__(self, profile: Path):
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._driver.stdout is not None
        started = next(found for line in self._driver.stdout if (found := re.search(r"started successfully on port (\d+)", line)))
        self._address = f"http://127.0.0.1:{started[1]}/session"
        options = {"binary": shutil.which("chromium"), "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
        asked = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._address += "/" + self._ask("POST", "", {"capabilities": asked})["sessionId"]

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *given: Any) -> Any:
        """What the body of a JavaScript function returns; `given` are its arguments."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(given)})

    def wait(self, script: str, seconds: float = 30) -> Any:
        """The first value of an expression that is true."""
        body = f"const done = arguments[0]; const look = () => {{ const x = {script}; x ? done(x) : setTimeout(look, 50); }}; look();"
        self._ask("POST", "/timeouts", {"script": int(seconds * 1000)})
        return self._ask("POST", "/execute/async", {"script": body, "args": []})

    def complaints(self) -> list[str]:
        """What the page wrote to the console since this was last asked, refusals of its security policy among it."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(timeout=30)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=90) as answer:
            return json.load(answer)["value"]
