"""Addresses and ports that a server can listen on."""

import ipaddress
import socket

from scaphoid.triton_repo.supervisor.api import ServerError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int) -> None:
    """Raises ServerError when `port` cannot be bound."""
    if not 0 < port < 65536:
        raise ServerError(f"port {port}: expected 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(f"port {port} on {host} cannot be used ({error.strerror}): choose another one") from None


def free_ports(host: str) -> tuple[int, int, int]:
    """Three ports that were free a moment ago."""
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for probe in (a, b, c):
            probe.bind((host, 0))
        return tuple(probe.getsockname()[1] for probe in (a, b, c))
