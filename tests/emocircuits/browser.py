"""A headless Chromium, spoken to through its debugging pipe: what a page looks like to somebody who opens it."""

import json
import os
import shutil
import subprocess
import tempfile
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page at a time.

    Attributes:
        messages: what the console said, exceptions too, since the last page was opened.
        requests: addresses that the page asked for.
    """

    def __init__(self):
        # Chromium reads commands from 3 and answers on 4, each message ended by a zero byte.
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += ["--no-first-run", f"--user-data-dir={self.home.name}"]
        script = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *flags, "about:blank"], pass_fds=(read, write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self.number, self.left, self.session = 0, b"", None
        self.events, self.messages, self.requests = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.write)
        os.close(self.read)
        self.home.cleanup()

    def call(self, method, **params):
        """One command of the DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def _next(self):
        while b"\0" not in self.left:
            more = os.read(self.read, 1 << 20)
            assert more, "the browser has gone"
            self.left += more
        one, self.left = self.left.split(b"\0", 1)
        found = json.loads(one)
        method, params = found.get("method", ""), found.get("params", {})
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.messages.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.messages.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return found

    def open(self, path, width=1200, height=900):
        """Load a file in a window of a certain width; a narrow one is a phone's."""
        self.messages, self.requests = [], []
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.time() + 60
        while self.ask("document.readyState") != "complete" or self.ask("location.href") == "about:blank":
            assert time.time() < deadline, "the page did not load"
            time.sleep(0.1)

    def ask(self, expression):
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self):
        """A PNG of the whole page, base64."""
        return self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
