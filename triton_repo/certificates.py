"""Certificates for gRPC over TLS: a private authority, a server and a client certificate, made with openssl.

    python -m scaphoid.triton_repo.certificates tls --hosts triton.radiology.example 10.1.2.3

The server asks clients for a certificate of the same authority: Triton knows no other way to tell who may ask. Use the
hospital's own authority where there is one; the names of the files are then what matters (tls.md).
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import tyro

CA, SERVER, CLIENT = "ca", "server", "client"  # .pem and .key each
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class CertificateError(Exception):
    """One line: what openssl did not like, or what is missing."""


def make_certificates(folder: Path, hosts: Sequence[str], days: int = 365) -> None:
    """Write ca, server and client (.pem, .key) into `folder`, the keys for this user alone. `hosts` are the names and
    addresses that clients reach the server by. Raises CertificateError, also when one of the files is there already:
    it may be the hospital's own."""
    files = [folder / f"{name}.{kind}" for name in (CA, SERVER, CLIENT) for kind in ("pem", "key")]
    if there := [path for path in files if os.path.lexists(path)]:
        raise CertificateError(f"{there[0]} is there already: choose another folder")
    if not hosts:
        raise CertificateError("expected at least one host name or address of the server")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    names = ",".join(f"{'IP' if _is_address(host) else 'DNS'}:{host}" for host in hosts)
    authority = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
    subject = ("-subj", "/CN=scaphoid private authority")
    _openssl("req", "-x509", *KEY, *_files(folder, CA), *subject, "-days", str(days), *authority)
    _sign(folder, SERVER, days, f"subjectAltName={names}\nextendedKeyUsage=serverAuth\n")
    _sign(folder, CLIENT, days, "extendedKeyUsage=clientAuth\n")


def server_options(folder: Path) -> list[str]:
    """Triton's options for gRPC with the certificates in `folder`. HTTP stays unencrypted: keep it on loopback. Raises
    CertificateError for a file that is missing."""
    for name in (f"{SERVER}.pem", f"{SERVER}.key", f"{CA}.pem"):
        if not (folder / name).is_file():
            raise CertificateError(
                f"{folder / name} is missing: make certificates with python -m scaphoid.triton_repo.certificates"
            )
    return [
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={folder / SERVER}.pem",
        f"--grpc-server-key={folder / SERVER}.key",
        f"--grpc-root-cert={folder / CA}.pem",
    ]


def _sign(folder: Path, name: str, days: int, extensions: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        request, extra = Path(scratch, "request.csr"), Path(scratch, "extensions")
        extra.write_text(f"basicConstraints=critical,CA:FALSE\n{extensions}")
        key = ("-keyout", str(folder / f"{name}.key"), "-out", str(request))
        _openssl("req", *KEY, *key, "-subj", f"/CN=scaphoid {name}")
        authority = ("-CA", str(folder / f"{CA}.pem"), "-CAkey", str(folder / f"{CA}.key"))
        serial = ("-set_serial", str(int.from_bytes(os.urandom(16)) >> 1))
        out = ("-out", str(folder / f"{name}.pem"), "-extfile", str(extra))
        _openssl("x509", "-req", "-in", str(request), *authority, *serial, *out, "-days", str(days))


def _files(folder: Path, name: str) -> tuple[str, ...]:
    return ("-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem"))


def _openssl(*arguments: str) -> None:
    try:
        done = subprocess.run(
            ["openssl", *arguments], capture_output=True, text=True, timeout=60, check=False, umask=0o077
        )
    except FileNotFoundError:
        raise CertificateError("openssl is not installed: install it, or bring certificates of your own") from None
    if done.returncode:
        raise CertificateError(f"openssl {arguments[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def _is_address(host: str) -> bool:
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


@dataclass(frozen=True)
class Arguments:
    """Make a private authority, a server certificate and a client certificate."""

    folder: tyro.conf.Positional[Path]
    """Where to write ca, server and client, .pem and .key."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1")
    """Names and addresses that clients reach the server by."""
    days: int = 365
    """How long they are valid."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    try:
        make_certificates(arguments.folder, arguments.hosts, arguments.days)
    except (CertificateError, OSError) as error:
        sys.exit(f"certificates: {error}")
    print(f"{arguments.folder}: keep {CA}.key off the server; give clients {CA}.pem, {CLIENT}.pem and {CLIENT}.key")


if __name__ == "__main__":
    main()
