"""Which names a client may call the server by.

A page of a foreign site can have its own name point to this machine (DNS rebinding), and then the browser lets it read
what the server answers. The name still stands in the header Host, and no address can be rebound, so names are refused
unless somebody allows them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

ANY = "*"
_LOCAL = "localhost"
_HOST = re.compile(r"(?:\[([^\]]+)\]|([^:]+))(?::\d*)?")  # an address in brackets or a name, and a port


class AllowedHosts:
    """Decides about the header Host; its port and the case of letters do not count.

    Args:
        bound: the address or the name that the server listens on. On a loopback address the server goes by loopback
            addresses alone, on any other by every address; localhost and `bound` are always allowed.
        further: names or addresses that are allowed too; `*.NAME` are all below a name, `*` allows every one.
    """

    def __init__(self, bound: str, further: Sequence[str] = ()) -> None:
        names = [_name(host) for host in (bound, _LOCAL, *further)]
        self._all = ANY in names
        self._names = {name for name in names if not name.startswith("*.")}
        self._endings = tuple(name.removeprefix("*") for name in names if name.startswith("*."))
        address = _address(names[0])
        self._loopback_only = names[0] == _LOCAL or (address is not None and address.is_loopback)

    def allows(self, host: str) -> bool:
        """Whether a value of the header Host is allowed; without one it is, since a browser always sends it."""
        name = _name(host)
        if self._all or not host or name in self._names or name.endswith(self._endings):
            return True
        address = _address(name)
        return address is not None and (address.is_loopback or not self._loopback_only)


def _name(host: str) -> str:
    """The host without a port, brackets or a last dot, in small letters."""
    host = host.strip().lower()
    parts = _HOST.fullmatch(host)
    return host if parts is None else (parts[1] or parts[2]).removesuffix(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
