"""A server on this machine is asked without the proxy that the environment names."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit


def is_loopback(url: str) -> bool:
    """Whether an address is one of this machine alone: localhost, 127.0.0.0/8, ::1.

    >>> is_loopback("http://[::1]:30000"), is_loopback("http://10.0.0.1:30000")
    (True, False)
    """
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_proxy(url: str) -> dict[str, str]:
    """Variables for a process that asks `url`, so that it goes through no proxy to this machine."""
    if not is_loopback(url):
        return {}
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    hosts = ",".join(filter(None, (others, urlsplit(url).hostname)))
    return {"no_proxy": hosts, "NO_PROXY": hosts}
