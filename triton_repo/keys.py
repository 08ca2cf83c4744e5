"""The keys of Triton's restricted APIs: a random one for model control, tracing and logging that the supervisor uses,
and a local one that clients of the same user on the same machine find in a file.

Neither is a secret from the machine's other users: Triton takes keys on its command line alone, as far as is known of
core 2.51, and every user can read that in /proc/PID/cmdline unless /proc is mounted with hidepid=2. They keep out who
reaches a port and cannot see the process (THREAT_MODEL.md says what else helps).

Shared memory wants the local key because whoever may register it names any region of the server's user: with it a
client could read what other clients sent. So does HTTP inference on the wheel's server, core 2.51: one request with a
huge shape ends it (bench/malformed.py; over gRPC it is refused), and what is restricted is refused before anything of
it is parsed. The local key's file has mode 0600 and lies in the supervisor's folder, for the clients of the server's
own user, who could end the server anyway.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scaphoid.triton_repo.supervisor.leftovers import folders

KEY_HEADER = "scaphoid-key"
GRPC_KEY_HEADER = f"triton-grpc-protocol-{KEY_HEADER}"  # where gRPC has metadata, Triton wants this prefix
ADMIN_APIS = "model-repository,trace,logging"
MEMORY_API = "shared-memory"
INFERENCE_API = "inference"


def restrictions(admin_key: str, local_key: str, guard_http: bool) -> list[str]:
    """The server's options that guard its APIs. `guard_http`: its HTTP inference does not bear strangers."""
    http, grpc = "--http-restricted-api", "--grpc-restricted-protocol"
    local = f"{MEMORY_API},{INFERENCE_API}" if guard_http else MEMORY_API
    guarded = ((http, ADMIN_APIS, admin_key), (grpc, ADMIN_APIS, admin_key), (http, local, local_key))
    return [f"{o}={apis}:{KEY_HEADER}={key}" for o, apis, key in (*guarded, (grpc, MEMORY_API, local_key))]


def leave_local_key(folder: Path, ports: Sequence[int], key: str) -> None:
    """Write the local key where `find_local_key` looks, for clients of any of `ports`."""
    for port in ports:
        with os.fdopen(os.open(folder / _name(port), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(key)


def find_local_key(port: int) -> str | None:
    """The key that a living supervisor of this user left for its server at `port`; None when there is none."""
    for folder, lives in folders(Path(tempfile.gettempdir())):
        path = folder / _name(port)
        if lives and path.is_file():
            return path.read_text()
    return None


def _name(port: int) -> str:
    return f"local-{port}.key"
