"""Following links of strangers: an answer is whole and bounded, or there is one word for what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.request import Request

import pytest
from website import PAGE, Website

from dede_ray.ingest.web import Browser, Failed, Web

IMAGE = bytes(range(256)) * 100


@pytest.fixture(scope="module")
def website() -> Iterator[Website]:
    website = Website()
    website.files["/image"] = IMAGE
    yield website
    website.close()


def browser(**changed) -> Browser:
    web = Web(**{"timeout_s": 10, "link_timeout_s": 20, "allow_private_addresses": True, **changed})
    return Browser(web, 1_000_000, lambda headers, token, directives: headers["X-Robots-Tag"] is not None)


def fetch(url: str, **changed) -> bytes:
    with browser(**changed).open(Request(url)) as response:
        return response.read()


@pytest.mark.parametrize("path", ["/image", "/redirect/image", "/redirect/redirect/image", "/moved/image"])
def test_an_image_is_fetched_also_where_it_has_moved(website, path):
    assert fetch(website.url + path) == IMAGE


@pytest.mark.parametrize(
    ("path", "failure"),
    [
        ("/missing", "not_found 404"),
        ("/status/410", "not_found 410"),
        ("/status/500", "http_error 500"),
        ("/loop", "bad_redirect 302"),
        ("/files", "bad_redirect 302"),
        ("/endless", "image_too_large"),
        ("/announced", "image_too_large"),
        ("/cut/image", "image_truncated"),
        ("/optout/image", "opted_out"),
    ],
)
def test_what_goes_wrong_has_a_name(website, path, failure):
    with pytest.raises(Failed, match=f"^{failure}$"):
        fetch(website.url + path)


@pytest.mark.parametrize("path", ["/silent", "/drip"])
def test_a_server_that_takes_its_time_is_left(website, path):
    start_s = time.monotonic()
    with pytest.raises(Failed, match=r"^timeout$"):
        fetch(website.url + path, timeout_s=0.5, link_timeout_s=1)
    assert time.monotonic() - start_s < 4  # it would take 5, or 10


@pytest.mark.parametrize(
    "url",
    ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "http://", "http://127.0.0.1:1/", "https://[::1]:1/"],
)
def test_nothing_but_a_web_server_is_asked(url):
    with pytest.raises(Failed, match=r"^connection_failed$"):
        fetch(url)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]"]
)
def test_addresses_of_this_machine_and_network_are_not_connected_to_unless_allowed(host):
    start_s = time.monotonic()
    with pytest.raises(Failed, match=r"^private_address$"):
        fetch(f"http://{host}/latest/meta-data", allow_private_addresses=False)
    assert time.monotonic() - start_s < 5


def test_a_failure_that_lasts_is_not_asked_for_again_and_one_that_may_pass_is(website):
    one = browser()
    for path, num_asked in (("/gone", 1), ("/optout/image", 1), ("/cut/image", 2), ("/status/503", 2)):
        website.asked.clear()
        for _ in range(2):
            with pytest.raises(Failed):
                one.open(Request(website.url + path))
        assert website.asked[path] == num_asked, path
    with pytest.raises(Failed, match="503"):
        one.open(Request(website.url + "/busy/image"))
    assert one.open(Request(website.url + "/busy/image")).read() == IMAGE


def test_an_opt_out_is_looked_at_unless_nothing_is_respected(website):
    assert fetch(website.url + "/optout/image", opt_out_directives=[]) == IMAGE


def test_links_per_second_are_bounded(website):
    one, start_s = browser(links_per_s=10), time.monotonic()
    for _ in range(4):
        assert one.open(Request(website.url + "/page")).read() == PAGE
    assert time.monotonic() - start_s >= 0.3
