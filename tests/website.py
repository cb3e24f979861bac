"""A web server on this machine that has what lists of links lead to: images, and all that goes wrong."""

from __future__ import annotations

import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

PAGE = b"<html><body>This image has moved.</body></html>"


class Website:
    """Serves `files` by path, `delay_s` late, and counts what is asked for; `_Handler` says which paths misbehave."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.user_agents: set[str] = set()
        self.delay_s = 0.0
        self.is_down = False
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.website = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    website: Website

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        website, path = self.server.website, self.path
        website.asked[path] += 1
        website.user_agents.add(self.headers["User-Agent"])
        verb, _, rest = path.lstrip("/").partition("/")
        if verb == "redirect":  # 301 to where the rest of the path says
            self._answer(301, b"", Location=f"/{rest}")
        elif verb == "moved":  # 308
            self._answer(308, b"", Location=f"/{rest}")
        elif verb == "loop":
            self._answer(302, b"", Location=path)
        elif verb == "files":  # to a file of the machine that asks
            self._answer(302, b"", Location="file:///etc/hostname")
        elif verb == "page":
            self._answer(200, PAGE, **{"Content-Type": "text/html"})
        elif verb == "status":
            self._answer(int(rest.split("/")[0]), PAGE)
        elif verb == "optout":
            self._answer(200, website.files[f"/{rest}"], **{"X-Robots-Tag": "noai, noindex"})
        elif verb == "busy":  # until the second time
            self._answer(503 if website.asked[path] == 1 else 200, website.files[f"/{rest}"])
        elif verb == "silent":
            time.sleep(5)
        elif verb == "drip":  # headers that never end, a byte at a time
            for _ in range(100):
                self.wfile.write(b"H")
                time.sleep(0.1)
        elif verb == "endless":
            self._head(200)
            for _ in range(1000):
                self.wfile.write(bytes(100_000))
        elif verb == "announced":  # more than anybody should wait for
            self._head(200, **{"Content-Length": str(10**13)})
        elif verb == "cut":  # less than announced
            content = website.files[f"/{rest}"]
            self._head(200, **{"Content-Length": str(len(content))})
            self.wfile.write(content[: len(content) // 2])
        elif path in website.files and not website.is_down:
            time.sleep(website.delay_s)
            self._answer(200, website.files[path])
        else:
            self._answer(404, PAGE)

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        self._head(status, **{"Content-Length": str(len(content)), **headers})
        self.wfile.write(content)
