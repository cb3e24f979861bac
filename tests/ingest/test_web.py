"""Following links of strangers: an answer is whole and bounded, or there is one word for what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.request import Request

import pytest
from website import PAGE, Website

from dede_ray.ingest.web import Browser, Failed, Web, is_public

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
    "host",
    ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:10.0.0.1]", "168.63.129.16",
     "[64:ff9b::a9fe:a9fe]"],
)  # fmt: skip
def test_addresses_of_this_machine_and_network_are_not_connected_to_unless_allowed(host):
    start_s = time.monotonic()
    with pytest.raises(Failed, match=r"^private_address$"):
        fetch(f"http://{host}/latest/meta-data", allow_private_addresses=False)
    assert time.monotonic() - start_s < 5


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.1.2.3", "169.254.169.254",
        "168.63.129.16", "172.16.0.1", "192.0.0.1", "192.0.0.8", "192.0.0.170", "192.0.0.192", "192.0.2.1",
        "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250",
        "240.0.0.1", "255.255.255.255",
        "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:168.63.129.16",
        "::ffff:0:10.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::168.63.129.16",
        "64:ff9b:1::8.8.8.8", "100::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1", "2001:db8::1",
        "2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:a83f:8110::1", "2002:c000:c0::", "3fff::1", "5f00::1",
        "2600::5efe:10.0.0.1", "2600::200:5efe:169.254.169.254", "4000::1", "fc00::1", "fd00:ec2::254", "fe80::1",
        "fe80::1%eth0", "fe80::5efe:10.0.0.1", "fec0::1", "ff02::1", "ff0e::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_public_internet_is_known_also_within_another(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "168.63.129.17", "192.0.1.1", "192.31.196.1", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450::1",
     "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1", "2001:4860:4860::8888"],
)  # fmt: skip
def test_an_address_of_the_public_internet_is_one(address):
    assert is_public(address)


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
