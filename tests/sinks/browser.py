"""A browser without a window, driven over two pipes: one start serves a whole module of tests."""

import base64
import json
import os
import select
import subprocess
import sys
import time

# Its commands come in by descriptor 3, its answers go out by 4, whatever numbers ours have.
EXECUTE = """
import fcntl, os, sys
ours = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, descriptor in zip((3, 4), ours): os.dup2(descriptor, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
OPTIONS = [
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--font-render-hinting=none",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]
SECONDS = 60


class Browser:
    """One page of one browser. Chromium's DevTools protocol: JSON, with a zero byte after each message."""

    def __init__(self, path, profile):
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        words = [path, *(["--no-sandbox"] if os.geteuid() == 0 else []), *OPTIONS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", EXECUTE, str(theirs_in), str(theirs_out), *words],
            pass_fds=(theirs_in, theirs_out),
            # A sanitizer that is loaded before this Python is not the browser's.
            env={**os.environ, "LD_PRELOAD": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._waiting, self._number, self._session = b"", 0, None
        self.asked, self.complaints = [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def close(self):
        self._session = None
        try:
            self.send("Browser.close")
        finally:
            os.close(self._write)
            os.close(self._read)
            self._process.wait(SECONDS)

    def _message(self):
        """The next message; a browser that says nothing for long is an error."""
        until = time.monotonic() + SECONDS
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._read], [], [], max(0, until - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError(f"the browser has {'ended' if ready else 'not answered'}")
            self._waiting += data
        message, _, self._waiting = self._waiting.partition(b"\0")
        message = json.loads(message)
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(message["params"]["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(message["params"]["exceptionDetails"])
        elif message.get("method") == "Log.entryAdded":
            self.complaints.append(message["params"]["entry"])
        return message

    def send(self, method, **params):
        """Give an order and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def look(self, width, height=900, *, scheme="light", media="screen"):
        """Be a window of this size, by day or in the dark, or a sheet of paper."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def open(self, address):
        """Load a page until all of it is there."""
        self.asked.clear()
        self.complaints.clear()
        self.send("Page.navigate", url=address)
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def run(self, script):
        """Evaluate an expression in the page, and wait for it if it is a promise."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def mouse(self, kind, x, y, **more):
        """Move the mouse, or press or release its button."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def picture(self, path=None, *, whole=False):
        """Return what is seen as PNG, or all of the page, and write it into a file if one is named."""
        png = base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        if path is not None:
            with open(path, "wb") as file:
                file.write(png)
        return png

    def pdf(self):
        """Return the page as it is printed."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"])
