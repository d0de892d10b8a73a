"""Urls of images: what is fetched, what is refused, and that nothing hangs or grows."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
import web

from halimede import (
    Embedder,
    FetchFailed,
    HalimedeError,
    ImageTooLarge,
    InvalidImage,
    UrlRefused,
)
from halimede.inputs.urls import is_public


def fetching(**urls: Any) -> Embedder:
    """An embedder that hashes what it fetches."""
    return Embedder(config={"models": {"m": {"provider": "hash"}}, "urls": urls})


LOCAL = {"allow_http": True, "allow_private": True}
SLOW = ("drip", "silent")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, list[str]]]:
    with web.serve() as running:
        yield running


@pytest.fixture(scope="module")
def base(server: tuple[int, list[str]]) -> str:
    return f"http://localhost:{server[0]}"


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/a.png",
        "https://localhost/a.png",
        "https://2130706433/a.png",
        "https://0x7f000001/a.png",
        "https://0177.0.0.1/a.png",
        "https://127.1/a.png",
        "https://0/a.png",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1/a.png",
        "https://192.168.0.1/a.png",
        "https://100.64.0.1/a.png",
        "https://168.63.129.16/a.png",
        "https://[::1]/a.png",
        "https://[::]/a.png",
        "https://[::ffff:127.0.0.1]/a.png",
        "https://[::ffff:a9fe:a9fe]/a.png",
        "https://[64:ff9b::7f00:1]/a.png",
        "https://[2002:7f00:1::]/a.png",
        "https://[fe80::1]/a.png",
        "https://[fd00::1]/a.png",
        "https://224.0.0.1/a.png",
        "http://example.com/a.png",
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "https:///a.png",
        "https://user:s3cret@example.com/a.png",
        "https://8.8.8.8:99999/a.png",
    ],
)
def test_what_is_not_public_is_refused_by_default(url: str) -> None:
    """Private, loopback, link-local and disguised addresses, http and passwords: UrlRefused."""
    with fetching() as embedder, pytest.raises(UrlRefused) as raised:
        embedder.embed_images([url])
    assert "s3cret" not in str(raised.value)
    assert url not in str(raised.value)


def test_public_addresses_are_public() -> None:
    """Addresses of the public internet are, also inside IPv6; what is no address is not."""
    public = ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")
    assert all(map(is_public, public))
    assert not any(map(is_public, ("", "localhost", "1.2.3", "::ffff:10.0.0.1", "fe80::1%eth0")))


@pytest.mark.parametrize("path", ["image", "untyped", "relative", "exact"])
def test_images_are_fetched(base: str, path: str) -> None:
    """An image, one without a content type, one behind a redirect, and one of 10 MB are taken."""
    with fetching(**LOCAL) as embedder:
        given = bytes(10 * web.MIB) if path == "exact" else web.PNG
        fetched = embedder.embed_images(f"{base}/{path}")
        assert (fetched.vectors == embedder.embed_images(given).vectors).all()


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("page", InvalidImage),
        ("missing", FetchFailed),
        ("zipped", FetchFailed),
        ("large", ImageTooLarge),
        ("endless", ImageTooLarge),
        ("drip", FetchFailed),
        ("silent", FetchFailed),
        ("broken", FetchFailed),
        ("loop", FetchFailed),
        ("file", UrlRefused),
    ],
)
def test_what_is_no_image_is_an_error(base: str, path: str, error: type[HalimedeError]) -> None:
    """Each has its own error within the time limit, in little memory; the message has no url."""
    process = psutil.Process()
    before = process.memory_info().rss
    began = time.monotonic()
    timeout_s = 1 if path in SLOW else 20
    with fetching(**LOCAL, timeout=timeout_s) as embedder, pytest.raises(error) as raised:
        embedder.embed_images([f"{base}/{path}/s3cret"])
    assert time.monotonic() - began < timeout_s + 15
    assert process.memory_info().rss - before < 100 * web.MIB
    assert str(raised.value).startswith("image 0: ")
    assert "s3cret" not in str(raised.value)


def test_a_redirect_is_checked_like_a_url(base: str) -> None:
    """A host that is allowed cannot lead to a private address that is not."""
    with fetching(allow_http=True, allow_private=["localhost"]) as embedder:
        assert len(embedder.embed_images(f"{base}/image")) == 1
        with pytest.raises(UrlRefused, match="not public"):
            embedder.embed_images(f"{base}/private")


def test_nobody_there_is_a_failure() -> None:
    """A host without an address, and a port where nobody listens: FetchFailed."""
    with fetching(**LOCAL) as embedder:
        for url in ("https://nowhere.invalid/a", "https://exa mple/a", "https://127.0.0.1:1/a"):
            with pytest.raises(FetchFailed):
                embedder.embed_images(url)


def test_each_url_fails_alone(base: str) -> None:
    """Of five urls the two good ones are embedded, the others told by their places."""
    paths = ("image", "page", "loop", "untyped", "large")
    with fetching(**LOCAL) as embedder:
        result = embedder.embed_images([f"{base}/{path}" for path in paths], errors="collect")
        assert result.indices.tolist() == [0, 3]
        found = {place: type(error) for place, error in result.errors.items()}
        assert found == {1: InvalidImage, 2: FetchFailed, 4: ImageTooLarge}
        counted = embedder.stats()
        assert (counted["images"], sum(counted["item_errors"].values())) == (2, 3)


def test_the_certificate_is_the_names_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the checked address, and asks for and verifies the url's host; a
    certificate of another name, or of nobody that is trusted, is refused.
    """
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, trusted, works in (
        ("localhost", True, True),
        ("example.com", True, False),
        ("localhost", False, False),
    ):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(tls)
        with monkeypatch.context() as environment, web.serve(tls) as (port, hosts):
            if trusted:
                environment.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
            with fetching(allow_private=True) as embedder:
                url = f"https://localhost:{port}/image"
                if works:
                    assert len(embedder.embed_images(url)) == 1
                    assert hosts == [f"localhost:{port}"]
                else:
                    with pytest.raises(FetchFailed):
                        embedder.embed_images(url)
