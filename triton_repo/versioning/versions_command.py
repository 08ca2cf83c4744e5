"""`scaphoid-serve versions`: which versions a repository holds, adding one, switching to it, and back.

scaphoid-serve versions add repository artefacts
scaphoid-serve versions switch repository 2
scaphoid-serve versions rollback repository

A running scaphoid-serve of this user on that repository makes the change, with no request lost; without one the next
start serves the other version.
"""

import json
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Annotated

import tyro

from scaphoid.export.artefacts import ManifestError, read_manifest
from scaphoid.export.lock import InUse
from scaphoid.triton_repo.keys import KEY_HEADER
from scaphoid.triton_repo.supervisor import leftovers
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.endpoint import CONTROL, SWITCH
from scaphoid.triton_repo.versioning import versions
from scaphoid.triton_repo.versioning.switch import checked

SWITCH_TIMEOUT_S = 1800.0  # it loads every stage; each is given its own time
Repository = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class Show:
    """List the versions: which is served, which a rollback goes back to."""

    repository: Repository


@dataclass(frozen=True)
class Add:
    """Add artefacts of retrained weights as the next version; what is served stays."""

    repository: Repository
    artefacts: Annotated[Path, tyro.conf.Positional]
    """Folder that scaphoid-export wrote; damaged ones, and those that failed the gate, are refused."""
    engines: Path | None = None
    """For a repository for a GPU: the engines that build_engines.py built of these artefacts, here."""


@dataclass(frozen=True)
class Switch:
    """Serve another version; it is tried with a canary before, and the present one stays if that fails."""

    repository: Repository
    version: Annotated[int, tyro.conf.Positional]


@dataclass(frozen=True)
class Rollback:
    """Serve the version again that the last switch replaced."""

    repository: Repository


Command = (
    Annotated[Show, tyro.conf.subcommand("list")]
    | Annotated[Add, tyro.conf.subcommand("add")]
    | Annotated[Switch, tyro.conf.subcommand("switch")]
    | Annotated[Rollback, tyro.conf.subcommand("rollback")]
)


def main(arguments: list[str]) -> None:
    command = tyro.cli(Command, prog="scaphoid-serve versions", args=arguments, description=__doc__)
    try:
        for line in run(command):
            print(line)
    except KeyboardInterrupt:
        sys.exit("scaphoid-serve versions: interrupted; a switch that a server has begun goes on: see `versions list`")
    except (ManifestError, ServerError, OSError) as error:
        sys.exit(f"scaphoid-serve versions: {error}")


def run(command: Show | Add | Switch | Rollback) -> list[str]:
    """Lines for the user. Raises ManifestError, ServerError, OSError."""
    repository = command.repository
    if isinstance(command, Add):
        from scaphoid.triton_repo.versioning.add_version import add_to  # not needed where a server runs

        version = add_to(repository, command.artefacts, command.engines)
        return [f"{repository}: version {version} added; `scaphoid-serve versions switch {repository} {version}`"]
    manifest = versions.numbered(repository, read_manifest(repository))
    if isinstance(command, Show):
        with suppress(InUse):  # whoever changes it now tidies up, too
            versions.undo(repository, wait_s=0)
        return listed(repository, manifest)
    target = command.version if isinstance(command, Switch) else manifest.get("previous")
    if target is None:
        raise ServerError(f"{repository} has no version to roll back to: switch to one, or add one")
    return [switch(repository, target)]


def listed(repository: Path, manifest: dict) -> list[str]:
    def what(version: int) -> str:
        if version == manifest["version"]:
            return ", served"
        return ", rollback goes back to it" if version == manifest["previous"] else ""

    return [
        f"{each['version']}@{versions.weights_hash(each)}: {', '.join(each['flows'])}{what(each['version'])}"
        for each in versions.contents(repository)
        if each["version"] in manifest["versions"]
    ]


def switch(repository: Path, version: int) -> str:
    """Through the supervisor of `repository` if one runs. Raises ManifestError, ServerError."""
    if control := control_of(repository):
        return _ask(control, repository, version)
    with versions.changing(repository) as manifest:
        if (control := control_of(repository)) is None:
            checked(manifest, version)
            if server := versions.served_by(repository):
                raise InUse(
                    f"{repository} is served by {server}, which takes no command from here: switch as its user, with "
                    "the TMPDIR that it was started with, or stop it first"
                )
            versions.exchange(repository, manifest, version)
            return f"{repository}: no scaphoid-serve runs on it; the next start serves version {version}"
    return _ask(control, repository, version)  # it was starting meanwhile


def _ask(control: dict, repository: Path, version: int) -> str:
    connection = HTTPConnection(control["url"], timeout=SWITCH_TIMEOUT_S)
    try:
        connection.request("POST", SWITCH, json.dumps({"version": version}), {KEY_HEADER: control["key"]})
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, HTTPException, ValueError) as error:
        raise ServerError(f"the supervisor at {control['url']} went away meanwhile ({error})") from None
    finally:
        connection.close()
    if response.status != 200:
        raise ServerError(answer["error"])
    return f"{repository}: version {answer['version']} is served, after {answer['seconds']:g} s"


def control_of(repository: Path) -> dict | None:
    """Where the running supervisor of `repository` takes commands."""
    for folder, lives in leftovers.folders(Path(tempfile.gettempdir())):
        try:
            control = json.loads((folder / CONTROL).read_text()) if lives else {}
        except (OSError, ValueError):
            continue  # it is starting, or ending
        if control.get("repository") == str(repository.resolve()):
            return control
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
