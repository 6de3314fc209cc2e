"""Addresses of the machine that runs the tests."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def own_address() -> str | None:
    """An IPv4 address other than the loopback's, or None."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not ipaddress.ip_address(address.address).is_loopback:
                return address.address
    return None


def can_listen(address: str) -> bool:
    """Whether a port can be had there: a machine may be without IPv6."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
