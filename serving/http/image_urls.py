"""Images that a request names by URL: fetched under limits of size, time and address, if the server allows it."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ...errors import RequestError
from ...runtime.requests.prepare import Prompt

MOST_BYTES = 16 * 2**20  # of a fetched image
MOST_URLS = 16  # of a request
SECONDS = 10.0  # for all of these
THREADS = 8  # for the images of so many requests at a time
_CHUNK = 64 * 2**10
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address is of the internet: not this machine, its networks, or those of a cloud's own services."""
    mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if mapped is not None:
        return is_public(mapped)
    # Reserved are, among others, those that NAT64 makes of IPv4's.
    old = address.is_multicast or address.is_reserved or getattr(address, "is_site_local", False)
    return address.is_global and not old


def image_urls(prompts: list[Prompt]) -> list[str]:
    """The http URLs of all images."""
    contents = [
        message["content"]
        for prompt in prompts
        if isinstance(prompt, list)
        for message in prompt
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
    ]
    return [url for content in contents for part in content if (url := _http_url(part))]


def with_images(prompts: list[Prompt], allowed: bool) -> list[Prompt]:
    """The prompts with the bytes of each image that is named by an http URL. Raises RequestError."""
    urls = image_urls(prompts)
    if urls and not allowed:
        raise RequestError(
            f"image_url is {urls[0]:.80}, allowed: data:image/png;base64,..; send the image itself, or start the "
            "server with --allow-image-urls"
        )
    if len(urls) > MOST_URLS:
        raise RequestError(
            f"{len(urls)} images by URL, allowed in a request: {MOST_URLS}; send the others as data URLs"
        )
    ends = time.monotonic() + SECONDS
    fetched = {url: fetch(url, seconds=ends - time.monotonic()) for url in dict.fromkeys(urls)}
    return [_with_bytes(prompt, fetched) if isinstance(prompt, list) else prompt for prompt in prompts]


def _http_url(part: Mapping[str, Any]) -> str:
    """The http URL that a part of a message names, empty if it names none."""
    url: str = part["image_url"]["url"] if part["type"] == "image_url" else ""
    return url if url.lower().startswith(("http:", "https:")) else ""


def _with_bytes(prompt: list[Any], fetched: Mapping[str, bytes]) -> Any:
    messages = []
    for message in prompt:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            seen = [{"type": "image", "image": fetched[url]} if (url := _http_url(p)) else p for p in content]
            message = {**message, "content": seen}
        messages.append(message)
    return messages


def fetch(url: str, allowed: Callable[[Address], bool] = is_public, seconds: float = SECONDS) -> bytes:
    """The body behind a URL, from an address that is allowed; a redirect is not followed. Raises RequestError."""
    ends = time.monotonic() + seconds
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme.lower() == "https" else 80)
    except ValueError as error:
        raise _refusal(url, str(error)) from None
    host = parts.hostname
    if not host or parts.username is not None:
        raise _refusal(url, "it names no host, or a user")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        # The address that is checked is the one that is called: a name may stand for another one the next time.
        with _connect(host, port, allowed, ends, url) as plain, _hung_up(plain, ends):
            stream = plain
            if parts.scheme.lower() == "https":
                stream = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            with contextlib.closing(http.client.HTTPConnection(host, port)) as connection:
                connection.sock = stream
                connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
                body = _body(connection.getresponse(), url)
        if time.monotonic() < ends:
            return body
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        if time.monotonic() < ends:
            raise _refusal(url, str(error) or type(error).__name__) from None
    raise _refusal(url, "it takes too long")


@contextlib.contextmanager
def _hung_up(connected: socket.socket, ends: float) -> Iterator[None]:
    """End a connection at a time: a limit of each read would let a server send byte after byte for ever."""
    other = connected.dup()  # TLS takes the first one over
    with other:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(ends - time.monotonic(), hang_up)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _connect(host: str, port: int, allowed: Callable[[Address], bool], ends: float, url: str) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(one[4][0]) for one in found]
    for address in addresses:
        if not allowed(ipaddress.ip_address(address.partition("%")[0])):
            raise _refusal(url, f"{host} is at {address}, which is no public address")
    return socket.create_connection((addresses[0], port), timeout=max(ends - time.monotonic(), 0.001))


def _body(response: http.client.HTTPResponse, url: str) -> bytes:
    if response.status != 200:
        raise _refusal(url, f"the answer is {response.status}")
    body = b""
    while piece := response.read1(_CHUNK):
        body += piece
        if len(body) > MOST_BYTES:
            raise _refusal(url, f"more than {MOST_BYTES:,} bytes")
    return body


def _refusal(url: str, reason: str) -> RequestError:
    return RequestError(f"image_url {url:.80} cannot be fetched ({reason[:200]}); send the image as a data URL")
