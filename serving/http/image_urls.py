"""Images that a request names by URL: fetched under limits of size, time and address, if the server allows it."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from ...errors import RequestError
from ...runtime.requests.prepare import Prompt

MOST_BYTES = 16 * 2**20  # of a fetched image
SECONDS = 10.0  # for all of it
_CHUNK = 64 * 2**10
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address is of the internet: not this machine, its networks, or those of a cloud's own services."""
    mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast and (mapped is None or is_public(mapped))


def with_images(prompts: list[Prompt], allowed: bool) -> list[Prompt]:
    """The prompts with the bytes of each image that is named by an http URL. Raises RequestError."""
    return [_with_images(prompt, allowed) if isinstance(prompt, list) else prompt for prompt in prompts]


def _with_images(prompt: list[Any], allowed: bool) -> Any:
    messages = []
    for message in prompt:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            message = {**message, "content": [_with_bytes(part, allowed) for part in content]}
        messages.append(message)
    return messages


def _with_bytes(part: Mapping[str, Any], allowed: bool) -> Mapping[str, Any]:
    url = part["image_url"]["url"] if part["type"] == "image_url" else ""
    if not url.lower().startswith(("http:", "https:")):
        return part
    if not allowed:
        raise RequestError(
            f"image_url is {url:.80}, allowed: data:image/png;base64,..; send the image itself, or start the server "
            "with --allow-image-urls"
        )
    return {"type": "image", "image": fetch(url)}


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
        plain = _connect(host, port, allowed, ends, url)
        with plain:
            stream = plain
            if parts.scheme.lower() == "https":
                stream = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            connection = http.client.HTTPConnection(host, port)
            connection.sock = stream
            connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
            return _body(connection.getresponse(), stream, url, ends)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise _refusal(url, str(error) or type(error).__name__) from None


def _connect(host: str, port: int, allowed: Callable[[Address], bool], ends: float, url: str) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(one[4][0]) for one in found]
    for address in addresses:
        if not allowed(ipaddress.ip_address(address.partition("%")[0])):
            raise _refusal(url, f"{host} is at {address}, which is no public address")
    return socket.create_connection((addresses[0], port), timeout=max(ends - time.monotonic(), 0.001))


def _body(response: http.client.HTTPResponse, stream: socket.socket, url: str, ends: float) -> bytes:
    if response.status != 200:
        raise _refusal(url, f"the answer is {response.status}")
    body = b""
    while True:
        left = ends - time.monotonic()
        if left <= 0:
            raise _refusal(url, "it takes too long")
        stream.settimeout(left)
        piece = response.read1(_CHUNK)
        if not piece:
            return body
        body += piece
        if len(body) > MOST_BYTES:
            raise _refusal(url, f"more than {MOST_BYTES:,} bytes")


def _refusal(url: str, reason: str) -> RequestError:
    return RequestError(f"image_url {url:.80} cannot be fetched ({reason[:200]}); send the image as a data URL")
