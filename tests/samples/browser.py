"""Headless Chromium through chromedriver's own protocol (W3C WebDriver): JSON over HTTP, and nothing to install.

with Browser(profile_folder) as browser:
    browser.open("http://127.0.0.1:8080/")
    browser.until("return document.body.dataset.state == 'ready'")
"""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def chromium() -> str | None:
    """The browser's program, if its driver is there too."""
    return shutil.which("chromium") if shutil.which("chromedriver") else None


class Browser:
    """One browser with a fresh profile."""

    def __init__(self, profile: Path) -> None:
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(
            found[1] for line in self._driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        self._address = f"http://127.0.0.1:{port}/session"
        arguments = [*FLAGS, f"--user-data-dir={profile}"]
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": arguments, "binary": chromium()}}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        self._address += "/" + self._post("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            DIRECT.open(urllib.request.Request(self._address, method="DELETE")).close()
        finally:
            self._driver.terminate()
            self._driver.wait()

    def open(self, url: str) -> None:
        """Goes to a page."""
        self._post("/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns in the page."""
        return self._post("/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, seconds: float = 240) -> Any:
        """Waits until the script returns something true; fails with what the page's console says."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.run(script)
            if found:
                return found
            time.sleep(0.05)
        raise TimeoutError(f"{script} did not become true; the console says {self.console()}")

    def console(self) -> list[str]:
        """Messages of the page's console."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def _post(self, path: str, data: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._address + path, json.dumps(data).encode())
        with DIRECT.open(request) as answer:
            return json.load(answer)["value"]
