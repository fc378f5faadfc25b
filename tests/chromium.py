"""A headless Chromium, driven by real events through its own protocol; websocket-client comes with JupyterLab."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0"
PATIENCE = 200.0  # seconds; a busy machine with two cores needs minutes for the first page


class Chromium:
    """One browser with one page, laptop size. `errors` holds what its console and its scripts complained of."""

    def __init__(self, folder: Path, size: tuple[int, int] = (1366, 768)):
        from websocket import create_connection

        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]
        self.process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = until(lambda: (folder / "DevToolsActivePort").read_text().split()[0], "Chromium does not start")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = create_connection(page["webSocketDebuggerUrl"], suppress_origin=True, timeout=PATIENCE)
        self.errors: list[str] = []
        self._sent = 0
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)  # JupyterLab's commands go to what has the focus
        self.send(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )

    def send(self, method: str, **params: object) -> dict:
        number = self._post(method, params)
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def _post(self, method: str, params: dict) -> int:
        self._sent += 1
        self.socket.send(json.dumps(dict(id=self._sent, method=method, params=params)))
        return self._sent

    def _note(self, event: str | None, about: dict) -> None:
        if event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            told = (str(one.get("value", one.get("description"))) for one in about["args"])
            self.errors.append(" ".join(told))
        elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif event == "Page.javascriptDialogOpening":  # "Leave site?" over a notebook that was not saved
            self._post("Page.handleJavaScriptDialog", dict(accept=True))
            if about["type"] != "beforeunload":
                self.errors.append(f"a dialog: {about['message']}")

    def ask(self, script: str) -> object:
        """The value of a JavaScript expression, awaited where it is a promise."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", script))
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = PATIENCE) -> object:
        """The expression's value as soon as it is true."""
        return until(lambda: self.ask(script), f"never came true: {script}", seconds)

    def open(self, address: str) -> None:
        self.errors.clear()
        self.send("Page.navigate", url=address)

    def key(self, name: str) -> None:
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9}[name]
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one point, move, let go at another."""
        moves = [(start[0] + (end[0] - start[0]) * k / 5, start[1] + (end[1] - start[1]) * k / 5) for k in range(1, 6)]
        steps = [("mouseMoved", start), ("mousePressed", start), *(("mouseMoved", at) for at in moves)]
        for kind, (x, y) in [*steps, ("mouseReleased", end)]:
            held = dict(buttons=1) if kind != "mouseReleased" else {}
            about = dict(button="left", clickCount=1, **held) if kind != "mouseMoved" else held
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **about)

    def picture(self, file: Path) -> None:
        """What is in view, as PNG."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)


def until(ask: Callable[[], object], complaint: str, seconds: float = PATIENCE) -> object:
    """What `ask` says as soon as that is true; it may raise until then. TimeoutError after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := ask():
                return found
        except (OSError, LookupError):
            pass
        time.sleep(0.1)
    raise TimeoutError(complaint)
