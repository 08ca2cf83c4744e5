"""Another version of the models under a running server: loaded beside the present one, tried, and then served, with no
request lost; whatever fails on the way leaves the present one.

A flow changes at one moment, when Triton loads its new configuration. Requests that began before it still run through
the old version's stages, which are unloaded only when Triton has finished with the old flow.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from scaphoid.export.artefacts import ManifestError
from scaphoid.triton_repo.configs import ENSEMBLES
from scaphoid.triton_repo.supervisor.api import ServerError, TritonApi
from scaphoid.triton_repo.supervisor.canary import CanaryLate, canary
from scaphoid.triton_repo.versioning import versions

DRAIN_TIMEOUT_S = 60.0
CANDIDATE = "_candidate"


def switch(api: TritonApi, repository: Path, flows: Sequence[str], version: int, report: Callable[..., None]) -> dict:
    """Serve `version` of `flows`; returns what is served then. Raises ServerError, ManifestError as one: the version
    before is served further, unless the server did not load it again."""
    began = time.monotonic()
    try:
        with versions.changing(repository) as manifest:
            present = manifest["version"]
            checked(manifest, version)
            stages = _stages(flows, manifest.get("target", "cpu"))
            try:
                _switch(api, repository, flows, stages, present, version)
                content = versions.exchange(repository, manifest, version)
            except BaseException as error:
                versions.settle(repository)
                lost = _restore(api, (*flows, *stages))
                why = str(error) or type(error).__name__
                further = f"was not loaded again: {lost}" if lost else "is, further"
                line = f"version {version} is not served: {why}; version {present} {further}"
                report(line, event="switch_failed", version=version, level="error")
                if not isinstance(error, (ServerError, OSError)):
                    raise
                raise ServerError(line) from None
    except ManifestError as error:
        raise ServerError(str(error)) from None
    seconds = round(time.monotonic() - began, 1)
    report(f"version {version} is served, in place of {present}; {seconds} s", event="switched", version=version)
    return {"version": content["version"], "previous": content["previous"], "seconds": seconds}


def checked(manifest: dict, version: int) -> None:
    """Raises ServerError for a version that cannot be switched to."""
    if version not in manifest["versions"]:
        raise ServerError(f"there is no version {version}: there are {', '.join(map(str, manifest['versions']))}")
    if version == manifest["version"]:
        raise ServerError(f"version {version} is served already")


def _switch(
    api: TritonApi, repository: Path, flows: Sequence[str], stages: Sequence[str], present: int, version: int
) -> None:
    versions.lay_beside(repository, stages, [present, version])
    for name in stages:  # one after the other: each takes memory twice for a while
        api.load(name)
    for flow in flows:
        _try(api, repository, flow, version)
    for flow in flows:
        versions.lay_out(repository, version, flow)
        api.load(flow)
    for flow in flows:
        _answers(api, flow)
    api.await_unloaded(flows, present, DRAIN_TIMEOUT_S)
    versions.lay_out(repository, version)
    for name in stages:
        api.load(name)


def _try(api: TritonApi, repository: Path, flow: str, version: int) -> None:
    """A canary through the stages of `version`, by a flow that no client knows."""
    config = versions.config_of(repository, flow, version)
    config.name = flow + CANDIDATE
    api.load(config.name, config, {f"{version}/.keep": b" "})
    try:
        _answers(api, flow, config.name)
    finally:
        with suppress(ServerError):
            api.unload(config.name)


def _answers(api: TritonApi, flow: str, model: str = "") -> None:
    """Raises ServerError unless a canary is answered; one that waits behind others' requests is sent again."""
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while True:
        try:
            return canary(api, flow, model)
        except CanaryLate:
            if time.monotonic() > deadline:
                raise


def _restore(api: TritonApi, models: Sequence[str]) -> str:
    """Load what the repository says again, flows first: they may run on the version that is given up. Returns why one
    was not loaded, empty if all were."""
    failures = []
    for name in models:
        try:
            api.load(name)
        except ServerError as error:
            failures.append(str(error))
    return failures[0] if failures else ""


def _stages(flows: Sequence[str], target: str) -> list[str]:
    """Every model that the flows run on, on a GPU their guard too."""
    return list(dict.fromkeys(name for flow in flows for name in ENSEMBLES[target][flow].stages))
