"""The versions of the models in a repository: which there are, which one is served, and changing that safely.

    repository/
      manifest.json           of the served version, with `version`, `versions`, `previous`, and every file's sha256
      encoder/config.pbtxt    the served version's; 1/ 2/ ... hold the models
      versions/2/             configurations (encoder/config.pbtxt ...), content.json and documents of version 2

All versions of a model share its one config.pbtxt; a stage's names the versions to load, and a flow's steps pin them.
A change is undone unless its last step, the new manifest, was taken: by whoever began it, or at the next start.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scaphoid.export.artefacts import DOCUMENTS, ManifestError, read_manifest, verify, write_manifest
from scaphoid.triton_repo.configs import CONFIG, read

CONFIGS = (f"*/{CONFIG}", "*/configs/*.pbtxt")  # custom ones, by the side of a model's usual one

VERSIONS = "versions"
CONTENT = "content.json"
FIRST = 1
PARTIAL = ".partial"
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
    content = json.loads((repository / VERSIONS / str(version) / CONTENT).read_text())
    content |= {"version": version, "versions": sorted(versions), "previous": previous}
    write_manifest(repository, content)
    return content


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


def contents(repository: Path) -> list[dict]:
    """What the manifests of all versions say, each with its `version`, but for the files. Raises OSError."""
    folders = [each for each in (repository / VERSIONS).glob("*") if each.name.isdigit()]
    return [
        json.loads((each / CONTENT).read_text()) | {"version": int(each.name)}
        for each in sorted(folders, key=lambda each: int(each.name))
    ]


def weights_hash(content: Mapping) -> str:
    """Eight hexadecimal digits that differ whenever any weights file behind the artefacts does."""
    return hashlib.sha256("".join(each["sha256"] for each in content["weights"]).encode()).hexdigest()[:8]


def verified(repository: Path) -> dict:
    """The manifest of a repository that is as its manifest says, an unfinished change undone. Raises ManifestError."""
    if not repository.is_dir():
        return verify(repository)
    with _locked(repository):
        settle(repository)
        return verify(repository)


@contextmanager
def changing(repository: Path) -> Iterator[dict]:
    """The manifest of a verified repository that this process alone changes. What the block has not finished when it
    raises is undone. Raises ManifestError."""
    with _locked(repository):
        settle(repository)
        manifest = verify(repository)
        if "versions" not in manifest:
            raise ManifestError(f"{repository} was assembled by an earlier release without versions: assemble it again")
        _unfinished(repository).touch()
        try:
            yield manifest
        finally:
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
    _unfinished(repository).unlink()


def _unfinished(repository: Path) -> Path:
    """A file beside the repository, for one inside would have to be in its manifest."""
    resolved = repository.resolve()
    return resolved.with_name(resolved.name + ".unfinished")


@contextmanager
def _locked(repository: Path) -> Iterator[None]:
    descriptor = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _text(config: ModelConfig, comment: str) -> str:
    return f"# {comment}\n" + text_format.MessageToString(config)


def _replace(path: Path, text: str) -> None:
    """As a whole, for Triton may read it at any moment; and only if it differs, for a newer file is loaded anew."""
    if path.is_file() and path.read_text() == text:
        return
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text)
    partial.replace(path)
