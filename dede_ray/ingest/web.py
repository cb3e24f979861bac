"""The web, bounded: what `urllib.request.urlopen` becomes in a process that follows links of strangers.

img2dataset fetches a link with `urlopen(link)` and `read()`: any scheme that urllib knows (files of this machine among
them), any address, any number of bytes, any time as long as some byte comes now and then, and each failure tried again
at once. `Browser` is an opener for urllib's `install_opener` under which the same two calls take only http and https,
only addresses of the public internet, so many bytes and so many seconds, and say in one word what went wrong.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.response import addinfourl

from pydantic import Field

from dede_ray.runtime.config import Config

Failure = Literal[
    "not_found",  # status 404 or 410
    "http_error",  # another status that is neither success nor redirection
    "bad_redirect",  # in a circle, more than ten times, or to something that is not http(s)
    "timeout",  # no byte for `timeout_s`, or not all of them in `link_timeout_s`
    "connection_failed",  # no such host, refused, broken off, no valid certificate, not HTTP
    "private_address",  # a host of this machine or network, or of nowhere
    "opted_out",  # X-Robots-Tag forbids the use
    "image_too_large",  # more bytes than allowed
    "image_truncated",  # fewer bytes than announced
]

NUM_HEADER_BYTES = 1_000_000  # beside the image: status lines, headers, bodies of redirects
SAME_LATER = {408, 425, 429}  # statuses below 500 that may be another one next time


class Web(Config):
    """How links are followed; each process follows its own."""

    threads: int = Field(32, gt=0)
    """Links that one process follows at once."""
    timeout_s: float = Field(10, gt=0)
    """Longest wait for a connection, and for the next bytes of an answer."""
    link_timeout_s: float = Field(60, gt=0)
    """Longest time for one try at a link, redirects and all."""
    retries: int = Field(1, ge=0)
    """Further tries after a timeout, a failed connection, or a status such as 503; each waits longer than the last."""
    links_per_s: float | None = Field(None, gt=0)
    """Tries that one process starts per second; null: no limit."""
    user_agent_token: str | None = None
    """Name by which servers know us: in the user agent, and in X-Robots-Tag headers meant for one robot."""
    opt_out_directives: list[str] = Field(["noai", "noimageai", "noindex", "noimageindex"])
    """An image whose X-Robots-Tag header says one of these is left; empty: the header is ignored."""
    allow_private_addresses: bool = False
    """Follow links to this machine and its private network; a stranger's list could read internal services that way."""


class Failed(Exception):
    """A link gave nothing; the text is a `Failure`, followed by the HTTP status if a server answered with an error."""


class _Link(threading.local):
    """What a thread knows about the link it is at; redirects belong to their link."""

    deadline_s = 0.0
    num_bytes = 0
    failure: tuple[str, str, int] = ("", "", 0)
    """The last link that failed, how, and how often in a row."""


class Browser:
    """An opener for `urllib.request.install_opener`: `open` gives a whole, bounded answer or raises `Failed`.

    Proxies of the environment (HTTPS_PROXY ...) are used as urllib uses them; which addresses a proxy reaches is the
    proxy's to decide.

    Args:
        web: the settings.
        max_bytes: longest answer.
        is_disallowed: img2dataset's function of that name: whether headers forbid the use.
    """

    def __init__(self, web: Web, max_bytes: int, is_disallowed: Callable[[Any, str | None, set[str]], bool]):
        self._web, self._max_bytes = web, max_bytes
        self._token = web.user_agent_token.strip().lower() if web.user_agent_token else None
        self._directives = {directive.strip().lower() for directive in web.opt_out_directives}
        self._is_disallowed = is_disallowed
        self._link = _Link()
        self._turn, self._next_turn_s = threading.Lock(), 0.0
        self._director = urllib.request.OpenerDirector()  # build_opener would add file:, ftp: and data:
        for handler in (
            urllib.request.ProxyHandler(),
            _Http(web, self._link, max_bytes),
            _Redirects(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self._director.add_handler(handler)

    def open(self, request: urllib.request.Request, data: None = None, timeout: float | None = None) -> addinfourl:
        """Answer a request, whole. Asked for the same link again after a failure that will last, it fails at once."""
        url, link = request.full_url, self._link
        last_url, last_failure, num_failures = link.failure
        if url != last_url:
            num_failures = 0
        elif not _may_pass(last_failure):
            raise Failed(last_failure)
        else:
            time.sleep(min(2.0**num_failures / 4, 10))
        self._wait_for_turn()
        link.deadline_s, link.num_bytes = time.monotonic() + self._web.link_timeout_s, 0
        try:
            with self._director.open(request, timeout=self._web.timeout_s) as response:
                assert isinstance(response, http.client.HTTPResponse), request.full_url
                headers = response.headers
                if self._directives and self._is_disallowed(headers, self._token, self._directives):
                    raise Failed("opted_out")
                body = io.BytesIO(_read(response, self._max_bytes))
                return addinfourl(body, headers, response.geturl(), response.status)
        except Exception as error:  # links are strangers': whatever they make urllib raise is the link's failure
            failure = _explain(error)
            link.failure = (url, failure, num_failures + 1)
            raise Failed(failure) from None

    def _wait_for_turn(self) -> None:
        if self._web.links_per_s is None:
            return
        with self._turn:
            start_s = max(time.monotonic(), self._next_turn_s)
            self._next_turn_s = start_s + 1 / self._web.links_per_s
        time.sleep(max(0.0, start_s - time.monotonic()))


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    body = bytearray()
    while piece := response.read(2**16):  # never `read()`, which makes room for what the server announces
        body += piece
        if len(body) > max_bytes:
            raise Failed("image_too_large")
    if response.length:
        raise Failed("image_truncated")
    return bytes(body)


def _may_pass(failure: str) -> bool:
    name, _, status = failure.partition(" ")
    if name == "http_error":
        return int(status) in SAME_LATER or int(status) >= 500
    return name in ("timeout", "connection_failed", "image_truncated")


def _explain(error: BaseException) -> str:
    if isinstance(error, Failed):
        return str(error)
    if isinstance(error, HTTPError):
        error.close()
        name = "not_found" if error.code in (404, 410) else "bad_redirect" if error.code < 400 else "http_error"
        return f"{name} {error.code}"
    if isinstance(error, URLError) and isinstance(error.reason, BaseException):
        return _explain(error.reason)
    if isinstance(error, http.client.IncompleteRead):
        return "image_truncated"
    return "timeout" if isinstance(error, TimeoutError) else "connection_failed"


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise Failed(f"bad_redirect {code}")
        return super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # unknown to Python 3.10


class _Http(urllib.request.AbstractHTTPHandler):
    """Opens http and https through connections whose address, bytes and time are bounded."""

    def __init__(self, web: Web, link: _Link, max_bytes: int):
        super().__init__()
        self._web, self._link, self._max_bytes = web, link, max_bytes
        self._tls = ssl.create_default_context()

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(self._connection, http.client.HTTPConnection, request), request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(self._connection, http.client.HTTPSConnection, request, context=self._tls), request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _connection(self, kind: Any, request: Any, host: str, **settings: Any) -> http.client.HTTPConnection:
        connection = kind(host, **settings)
        connection.response_class = partial(_Response, self._web, self._link, self._max_bytes)
        if not (self._web.allow_private_addresses or request.has_proxy() or request._tunnel_host):
            connection._create_connection = _connect_publicly
        return connection


NO_PUBLIC_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's services for the machine itself, at an address that is public elsewhere
        "192.0.0.0/24",  # Oracle's metadata, and protocols; Python knows parts of it
        "192.88.99.0/24",  # what were relays of 6to4
        "2001::/23",  # Teredo, benchmarks and other protocols
        "2001:db8::/32",
        "3fff::/20",  # documentation, since 2024
    )
)
NAT64, GLOBAL_UNICAST = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2000::/3")


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet; an IPv4 address within an IPv6 one decides for it."""
    one = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(one, ipaddress.IPv6Address):
        inner = one.ipv4_mapped or one.sixtofour
        if one in NAT64 or one.packed[8:12] in (b"\0\0\x5e\xfe", b"\2\0\x5e\xfe"):  # the latter two: ISATAP
            inner = ipaddress.IPv4Address(one.packed[12:])
        if inner is not None:
            return is_public(str(inner))
        if one not in GLOBAL_UNICAST:  # all that has been given out; old and future private ranges are elsewhere
            return False
    # Python calls multicast and, by version, some reserved networks global.
    is_special = one.is_multicast or one.is_reserved or any(one in network for network in NO_PUBLIC_NETWORKS)
    return one.is_global and not is_special


def _connect_publicly(address: tuple[str, int], timeout: float, source_address: Any = None) -> socket.socket:
    """Connect to an address of the public internet; the name is looked up once, so that it cannot change between."""
    found = {info[4][0] for info in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)}
    public = sorted(str(one) for one in found if is_public(str(one)))
    if not public:
        raise Failed("private_address")
    for one in public[:-1]:
        try:
            return socket.create_connection((one, address[1]), timeout, source_address)
        except OSError:
            continue
    return socket.create_connection((public[-1], address[1]), timeout, source_address)


class _Response(http.client.HTTPResponse):
    """An answer all of whose bytes, from the status line on, are counted and timed."""

    def __init__(self, web: Web, link: _Link, max_bytes: int, sock: socket.socket, *args: Any, **settings: Any):
        super().__init__(sock, *args, **settings)
        self._max_bytes = max_bytes
        raw = self.fp.detach()  # type: ignore[attr-defined]
        self.fp = io.BufferedReader(_Metered(raw, sock, web.timeout_s, link, max_bytes + NUM_HEADER_BYTES))

    def begin(self) -> None:
        super().begin()
        if self.length is not None and self.length > self._max_bytes:
            raise Failed("image_too_large")


class _Metered(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, timeout_s: float, link: _Link, max_bytes: int):
        super().__init__()
        self._raw, self._sock, self._timeout_s, self._link, self._max_bytes = raw, sock, timeout_s, link, max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._link.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._sock.settimeout(min(self._timeout_s, left_s))
        num_bytes = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._link.num_bytes += num_bytes or 0
        if self._link.num_bytes > self._max_bytes:
            raise Failed("image_too_large")
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()
