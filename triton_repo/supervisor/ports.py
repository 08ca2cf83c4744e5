"""Addresses and ports that a server can listen on."""

import ipaddress
import socket
from collections.abc import Mapping

from scaphoid.triton_repo.supervisor.api import ServerError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_of(host: str) -> str:
    """The IP address of `host`, which may be a name; one in brackets is meant without. Raises ServerError."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ServerError(f"host {host!r} ({why}): expected an address of this machine, such as 127.0.0.1") from None
    return min(found, key=lambda each: each[0] != socket.AF_INET)[4][0]


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def bracketed(address: str) -> str:
    """As in a URL, before the port."""
    return f"[{address}]" if ":" in address else address


def check_ports(places: Mapping[str, tuple[str, int]]) -> None:
    """Raises ServerError unless every one of `places`, address and port by what shall listen there, can be bound."""
    taken: dict[int, str] = {}
    for name, (address, port) in places.items():
        if not 0 < port < 65536:
            raise ServerError(f"{name} port {port}: expected 1 to 65535")
        if port in taken:
            line = f"{name} port {port} is the {taken[port]} port, too"
            raise ServerError(f"{line}: choose another one with --{name}-port")
        taken[port] = name
        with socket.socket(family(address)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            try:
                probe.bind((address, port))
            except OSError as error:
                line = f"{name} port {port} on {address} cannot be used ({error.strerror})"
                raise ServerError(f"{line}: choose another one with --{name}-port") from None


def free_ports(address: str) -> tuple[int, int, int]:
    """Three ports that were free a moment ago."""
    kind = family(address)
    with socket.socket(kind) as a, socket.socket(kind) as b, socket.socket(kind) as c:
        for probe in (a, b, c):
            probe.bind((address, 0))
        return tuple(probe.getsockname()[1] for probe in (a, b, c))
