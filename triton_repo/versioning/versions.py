"""The versions of the models in a repository: which there are, which one is served, and changing that safely.

    repository/
      manifest.json           of the served version, with `version`, `versions`, `previous`, and every file's sha256
      encoder/config.pbtxt    the served version's; 1/ 2/ ... hold the models
      versions/2/             configurations (encoder/config.pbtxt ...), content.json and documents of version 2

Locks (export/lock.py): whoever starts a server from a repository holds it beside others that do so, and whoever
changes it holds it alone. A running server holds `versions/`, which keeps the repository from being replaced.

All versions of a model share its one config.pbtxt; a stage's names the versions to load, and a flow's steps pin them.
A change is undone unless its last step, the new manifest, was taken: by whoever began it, or at the next start.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scaphoid.export import workspace
from scaphoid.export.artefacts import DOCUMENTS, MANIFEST, ManifestError, read_manifest, verify, write_manifest
from scaphoid.export.lock import InUse, holder, locked
from scaphoid.export.manifest import REMEDY, Manifest, check
from scaphoid.triton_repo.configs import CONFIG, read

CONFIGS = (f"*/{CONFIG}", "*/configs/*.pbtxt")  # custom ones, by the side of a model's usual one

VERSIONS = "versions"
CONTENT = "content.json"
FIRST = 1
PARTIAL = ".partial"
LOCK_WAIT_S = 60.0  # for another's change or start to finish
OF_REPOSITORY = ("format", "files", "version", "versions", "previous")  # in its manifest; the rest is of a version


def begin(repository: Path, content: dict) -> dict:
    """Make what was assembled in `repository` its first version, and write the manifest; returns its content."""
    number(repository, FIRST, content)
    return finish(repository, FIRST, [FIRST])


def number(repository: Path, version: int, content: dict) -> None:
    """Describe, in `versions/`, the version whose configurations and documents now lie in `repository`."""
    folder = repository / VERSIONS / str(version)
    folder.mkdir(parents=True)
    for path in [path for pattern in CONFIGS for path in repository.glob(pattern)]:
        kept = folder / path.relative_to(repository)
        kept.parent.mkdir(parents=True, exist_ok=True)
        comment = f"version {version}, assembled from {Path(__file__).parents[1].name}/*/, where comments say why"
        kept.write_text(_text(pinned(read(path), version), comment))
    for name in DOCUMENTS:
        if (repository / name).is_file():
            shutil.copyfile(repository / name, folder / name)
    own = {key: value for key, value in content.items() if key not in OF_REPOSITORY}
    (folder / CONTENT).write_text(json.dumps(own, indent=2) + "\n")


def finish(repository: Path, version: int, versions: Sequence[int], previous: int | None = None) -> dict:
    """Make `version` the one that is served from the next start on; returns the manifest's content."""
    lay_out(repository, version)
    content = _content(repository / VERSIONS / str(version))
    content |= {"version": version, "versions": sorted(versions), "previous": previous}
    write_manifest(repository, content)
    return content


def exchange(repository: Path, manifest: Mapping, version: int) -> dict:
    """`finish` with `version` in place of the manifest's; after a rollback there is none to go back to."""
    previous = None if version == manifest["previous"] else manifest["version"]
    return finish(repository, version, manifest["versions"], previous)


def lay_out(repository: Path, version: int, model: str = "") -> None:
    """Put the configurations of `version` in their places, of all models with the documents, or of one."""
    folder = repository / VERSIONS / str(version)
    for path in sorted((folder / model).rglob("*")):
        if path.suffix == ".pbtxt" or path.name in DOCUMENTS:
            _replace(repository / path.relative_to(folder), path.read_text())


def lay_beside(repository: Path, stages: Sequence[str], versions: Sequence[int]) -> None:
    """Let the `stages` load several versions at once."""
    for name in stages:
        config = read(repository / name / CONFIG)
        config.version_policy.specific.versions[:] = sorted(versions)
        _replace(repository / name / CONFIG, _text(config, f"versions {versions}: while switching"))


def config_of(repository: Path, model: str, version: int) -> ModelConfig:
    return read(repository / VERSIONS / str(version) / model / CONFIG)


def pinned(config: ModelConfig, version: int) -> ModelConfig:
    """The configuration with nothing but `version` loaded; of a flow, on steps of that version."""
    config.version_policy.specific.versions[:] = [version]
    for step in config.ensemble_scheduling.step:
        step.model_version = version
    return config


def contents(repository: Path) -> list[Manifest]:
    """What the manifests of all versions say, each with its `version`, but for the files. Raises ManifestError for an
    edited one, OSError."""
    folders = [each for each in (repository / VERSIONS).glob("*") if each.name.isdecimal()]
    found = [_content(each) for each in sorted(folders, key=lambda each: int(each.name))]
    for each in found:
        _ = each["flows"], each["weights"]  # what whoever asks needs of all
    return found


def _content(folder: Path) -> Manifest:
    """What `number` left in the `folder` of a version. Raises ManifestError, OSError."""
    path = folder / CONTENT
    try:
        parts = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not JSON ({error}): {REMEDY}") from None
    if not isinstance(parts, dict):
        raise ManifestError(f"{path} is no JSON object: {REMEDY}")
    return check(path, parts | {"version": int(folder.name)})


def weights_hash(content: Mapping) -> str:
    """Eight hexadecimal digits that differ whenever any weights file behind the artefacts does."""
    return hashlib.sha256("".join(each["sha256"] for each in content["weights"]).encode()).hexdigest()[:8]


@contextmanager
def starting(repository: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[dict]:
    """The manifest of a repository that is as its manifest says, an unfinished change undone; nobody changes it within
    the block, and others may start from it, too. Raises ManifestError."""
    read_manifest(repository)  # is it one?
    undo(repository, wait_s)
    with locked(repository, alone=False, wait_s=wait_s):
        yield verify(repository)


@contextmanager
def serving(repository: Path) -> Iterator[None]:
    """Entered while `starting`, left when the server ends: until then its repository is not replaced."""
    folder = repository / VERSIONS  # an earlier release assembled none
    with locked(folder, alone=False, wait_s=LOCK_WAIT_S) if folder.is_dir() else nullcontext():
        yield


def served_by(repository: Path) -> str:
    """The process that is `serving`; empty if there is none. For whoever holds the repository alone, so that none is
    about to."""
    folder = repository / VERSIONS
    try:
        with locked(folder, alone=True, wait_s=0):
            return ""
    except InUse:
        return holder(folder)


@contextmanager
def changing(repository: Path) -> Iterator[dict]:
    """The manifest of a verified repository that this process alone changes. What the block has not finished when it
    raises is undone. Raises ManifestError."""
    numbered(repository, read_manifest(repository))
    with locked(repository, alone=True, wait_s=LOCK_WAIT_S):
        settle(repository)
        manifest = verify(repository)
        _unfinished(repository).touch()
        try:
            yield manifest
        finally:
            settle(repository)


@contextmanager
def replacing(repository: Path) -> Iterator[None]:
    """This process alone may put another repository in the place of `repository`, if there is one. Raises ManifestError
    for one that is served, and for one that would be lost with versions that were added to it."""
    folder = repository / VERSIONS
    if not folder.is_dir():
        if (repository / MANIFEST).is_file() and not any(repository.glob(f"*/{CONFIG}")):
            raise ManifestError(f"{repository} holds artefacts, which would be lost: choose another folder")
        yield
        return
    instead = f"`scaphoid-serve versions add {repository} ARTEFACTS` adds a version"
    with locked(repository, alone=True, wait_s=LOCK_WAIT_S):
        settle(repository)
        if server := served_by(repository):
            line = f"{repository} is served by {server}, so it is not replaced"
            raise InUse(f"{line}: {instead}, or stop the server first")
        there = sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit())
        if len(there) > 1:
            lost = f"{repository} holds versions {', '.join(map(str, there))}, which would be lost"
            raise ManifestError(f"{lost}: {instead}, or remove the folder first")
        yield


def numbered(repository: Path, manifest: dict) -> dict:
    """`manifest`. Raises ManifestError for one without versions."""
    if "version" not in manifest:
        raise ManifestError(f"{repository} is no model repository of this release: assemble one")
    return manifest


def undo(repository: Path, wait_s: float = LOCK_WAIT_S) -> None:
    """Undo what a process that was killed has left of a change. Raises InUse while another one changes it."""
    if _unfinished(repository).exists():
        with locked(repository, alone=True, wait_s=wait_s):
            settle(repository)


def settle(repository: Path) -> None:
    """Undo what a change began and did not finish; nothing after a finished one."""
    if not _unfinished(repository).exists():
        return
    manifest = read_manifest(repository)
    for folder in repository.glob("*/*"):
        if folder.is_dir() and folder.name.isdigit() and int(folder.name) not in manifest["versions"]:
            shutil.rmtree(folder)
    for left in repository.rglob(f"*{PARTIAL}"):
        left.unlink()
    lay_out(repository, manifest["version"])
    workspace.remove(scratch(repository))
    _unfinished(repository).unlink()


def _unfinished(repository: Path) -> Path:
    """A file beside the repository, for one inside would have to be in its manifest."""
    resolved = repository.resolve()
    return resolved.with_name(resolved.name + ".unfinished")


def scratch(repository: Path) -> Path:
    """A folder beside the repository, which whoever changes it makes with `workspace`; gone with the change."""
    resolved = repository.resolve()
    return resolved.with_name(resolved.name + ".adding")


def _text(config: ModelConfig, comment: str) -> str:
    return f"# {comment}\n" + text_format.MessageToString(config)


def _replace(path: Path, text: str) -> None:
    """As a whole, for Triton may read it at any moment; and only if it differs, for a newer file is loaded anew."""
    if path.is_file() and path.read_text() == text:
        return
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text)
    partial.replace(path)
