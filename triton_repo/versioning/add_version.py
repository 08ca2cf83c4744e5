"""Artefacts of retrained weights become the next version in a repository, beside the one that is served."""

import shutil
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from scaphoid.export import workspace
from scaphoid.export.artefacts import OPS_LIBRARY, ManifestError, read_manifest, sha256
from scaphoid.export.tensorrt_engines.build_engines import BuildError
from scaphoid.export.tensorrt_engines.load_engines import EngineError
from scaphoid.triton_repo.assemble import VERSION, Engines, assemble, refuse_repository
from scaphoid.triton_repo.configs import CONFIG, ConfigError, read
from scaphoid.triton_repo.versioning.versions import VERSIONS, changing, finish, number, pinned, scratch


def add_version(repository: Path, artefacts: Path, engines: Engines | None = None) -> int:
    """Add `artefacts` to `repository` and return their version's number; what is served stays. `engines` are theirs,
    for a repository for a GPU.

    Raises ManifestError for damaged artefacts, for those that failed the gate of their export, and for those that
    another configuration serves (another image size, precision, build of the ops): these need a repository of their
    own; and what `assemble` raises.
    """
    manifest = read_manifest(artefacts)  # `assemble` verifies
    refuse_repository(artefacts, manifest)
    parity = manifest.get("parity", {})
    if not parity.get("passed"):
        reason = "; ".join(parity.get("failures", ())[:1]) or "its manifest tells of no gate"
        raise ManifestError(f"{artefacts} did not pass the gate of its export and is not added ({reason})")
    with changing(repository) as present:
        workspace.make(scratch(repository))
        assembled = scratch(repository) / "repository"
        content = assemble(artefacts, assembled, engines)
        version = max(present["versions"]) + 1
        _compare(repository, assembled, present)
        for path in sorted(assembled.glob(f"*/{CONFIG}")):
            shutil.move(path.parent / VERSION, repository / path.parent.name / str(version))
        shutil.rmtree(assembled / VERSIONS)
        number(assembled, version, content)
        shutil.move(assembled / VERSIONS / str(version), repository / VERSIONS / str(version))
        finish(repository, present["version"], [*present["versions"], version], present.get("previous"))
    return version


def _compare(repository: Path, assembled: Path, present: dict) -> None:
    """Raises ManifestError unless both are served by the same configurations."""
    if sha256(repository / OPS_LIBRARY) != sha256(assembled / OPS_LIBRARY):
        raise ManifestError(f"exported with another build of {OPS_LIBRARY}: assemble a repository of its own")
    models = {path.parent.name for path in repository.glob(f"*/{CONFIG}")}
    if other := models ^ {path.parent.name for path in assembled.glob(f"*/{CONFIG}")}:
        raise ManifestError(f"only one of both has {', '.join(sorted(other))}: export the same flows")
    for name in sorted(models):
        if _comparable(repository / name / CONFIG) != _comparable(assembled / name / CONFIG):
            raise ManifestError(
                f"model {name} is configured differently (image size, precision): assemble a repository of its own"
            )


def _comparable(path: Path) -> ModelConfig:
    """The configuration without what a version settles."""
    config = pinned(read(path), 1)
    if config.platform == "ensemble":
        config.ClearField("parameters")
    return config


def add_to(repository: Path, artefacts: Path, engines: Path | None) -> int:
    """`add_version` with the folder of the engines. Raises ManifestError, whatever is wrong, and OSError."""
    manifest = read_manifest(repository)
    if (manifest.get("target") == "gpu") != (engines is not None):
        raise ManifestError("a repository for a GPU, and no other, needs --engines: those of the new artefacts")
    try:
        built = engines and Engines.of_this_machine(engines, manifest["precision"])
        return add_version(repository, artefacts, built)
    except (ConfigError, EngineError, BuildError) as error:
        raise ManifestError(str(error)) from None
