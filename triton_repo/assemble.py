"""Artefacts and the static configurations to a Triton model repository: MODEL/config.pbtxt, MODEL/1/model.*, one
manifest.

    python -m scaphoid.triton_repo.assemble artefacts repository
    python -m scaphoid.triton_repo.assemble artefacts repository --target gpu --engines engines

What the configurations leave open is filled in from the artefacts: image and map sizes (so that the server itself
rejects a tensor of another size, and because the vendor's backends take no open dim where the engine has a number), the
engines' precision, and in every flow a hash of the weights, for a retrained model has version 1 again, and whether they
know drawn radiographs alone, or differ from the trained model by more than they may, which the client's report has to
say.

A repository for a GPU is assembled where it will run, from engines that were built there: both manifests are verified,
the artefacts' and the engines', and engines that do not fit are refused with the command that builds those that do.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import tyro
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scaphoid.export.artefacts import (
    DOCUMENTS,
    GPU_FILES,
    MANIFEST,
    OPS_LIBRARY,
    PHANTOMS,
    WARMUP,
    ManifestError,
    accepted,
    read_manifest,
    verify,
)
from scaphoid.export.lock import locked
from scaphoid.export.precision import HINTS
from scaphoid.export.tensorrt_engines.build_engines import PRECISIONS, BuildError, gpu_name, load_tensorrt
from scaphoid.export.tensorrt_engines.load_engines import EngineError, find_engine
from scaphoid.export.workspace import beside
from scaphoid.trainer.contracts import ENCODED
from scaphoid.triton_repo.configs import (
    ACCEPTED,
    CONFIG,
    FIRST,
    GUARD,
    PRECISION,
    TRAINED_ON_PHANTOMS,
    WEIGHTS,
    ConfigError,
    check,
)
from scaphoid.triton_repo.memory import BOUNDED, SERVER_FLAGS, server_flags, step_limit
from scaphoid.triton_repo.rules import check_assembled
from scaphoid.triton_repo.versioning import versions
from scaphoid.triton_repo.versioning.versions import weights_hash

CONFIGS = {target: Path(__file__).parent / target for target in ("cpu", "gpu")}
VERSION = "1"
PACKAGE = Path(__file__).parents[1]
# What the guard's model.py imports: copied beside it, so that the vendor's image needs no more than it has, and the
# manifest lists the guard as well.
GUARD_MODULES = (
    "trainer/__init__.py",
    "trainer/data/__init__.py",
    "trainer/data/guard.py",
    "trainer/data/header.py",
    "trainer/data/jpeg.py",
    "triton_repo/__init__.py",
    "triton_repo/supervisor/__init__.py",
    "triton_repo/supervisor/request_log.py",
)


@dataclass(frozen=True)
class Engines:
    """A folder that build_engines.py wrote, and what its engines must have been built by and for: the TensorRT package
    and the GPU of this machine."""

    folder: Path
    trt: ModuleType
    gpu: str
    precision: str = PRECISIONS[0]

    @classmethod
    def of_this_machine(cls, folder: Path, precision: str) -> "Engines":
        """Raises BuildError without TensorRT or a driver."""
        return cls(folder, load_tensorrt(), gpu_name(), precision)

    def plan(self, artefacts: Path, stage: str) -> Path:
        """Raises EngineError."""
        return find_engine(artefacts, self.folder, stage, self.trt, self.gpu, self.precision)


def assemble(artefacts: Path, repository: Path, engines: Engines | None = None, configs: Path | None = None) -> dict:
    """Write the model repository of every flow that `artefacts` hold, for a CPU, or with `engines` for the GPU that
    they were built for; returns its manifest's content. `configs`: other static configurations than the package's.

    A `repository` that was assembled before is replaced, once the new one is complete, or left alone when it is the
    same. Raises ManifestError for damaged artefacts or such without what a GPU needs, for a repository in their place,
    and for one that is served or holds versions that were added, EngineError for engines that do not fit the artefacts,
    this GPU or this TensorRT, ConfigError for a configuration that breaks a contract or a rule, OSError for folders
    that lie in one another, FileExistsError for a foreign one.
    """
    repository = _place(artefacts, repository)
    refuse_repository(artefacts, read_manifest(artefacts))
    if repository.exists() and not repository.is_dir():
        raise NotADirectoryError(f"{repository} is a file: a repository needs a folder of its own, name another")
    if repository.exists() and any(repository.iterdir()) and not (repository / MANIFEST).is_file():
        raise FileExistsError(f"{repository} is not empty and was not assembled by this command: choose another folder")
    # Held, so that no export replaces between two files what they are copied from.
    with locked(artefacts, alone=False, wait_s=versions.LOCK_WAIT_S), beside(repository, versions.LOCK_WAIT_S) as work:
        manifest = verify(artefacts)
        content = _write_repository(artefacts, manifest, work.new, engines, configs or CONFIGS[target_of(engines)])
        if not _is_there(work.new, repository):
            with versions.replacing(repository):
                if os.path.ismount(repository):
                    raise OSError(f"{repository} is a mount point, which stays: choose a folder in it")
                work.exchange()
    return content


def refuse_repository(artefacts: Path, manifest: Mapping) -> None:
    """Raises ManifestError when the `manifest` that was found in place of artefacts' is a repository's."""
    if "target" in manifest or "version" in manifest:
        raise ManifestError(f"{artefacts} is a model repository: give the artefacts, which scaphoid-export wrote")


def _place(artefacts: Path, repository: Path) -> Path:
    """Where `repository` really is, behind links. Raises OSError for a folder that another cannot take the place of."""
    place, source = repository.resolve(), artefacts.resolve()
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise OSError(f"{repository} and {artefacts} are the same or lie in one another: choose a folder beside it")
    if Path.cwd().is_relative_to(place):
        raise OSError(
            f"{repository} is the current directory or around it: choose another folder, or call from outside"
        )
    return place


def _is_there(new: Path, repository: Path) -> bool:
    """Whether `repository` holds the same already, undamaged: then it stays, served or not, so that a container that
    assembles at every start finds nothing to do."""
    there = repository / MANIFEST
    if not there.is_file() or there.read_bytes() != (new / MANIFEST).read_bytes():
        return False
    try:
        verify(repository)
    except ManifestError:
        return False
    return True


def target_of(engines: Engines | None) -> str:
    return "gpu" if engines else "cpu"


def _write_repository(
    artefacts: Path, manifest: dict, repository: Path, engines: Engines | None, configs: Path
) -> dict:
    target = target_of(engines)
    content = {key: value for key, value in manifest.items() if key != "files"} | {"target": target}
    for name, stage in manifest["stages"].items():
        _write_stage(check(configs / name / CONFIG, target), stage, manifest, artefacts, repository, engines)
    for flow in manifest["flows"]:
        _write_flow(check(configs / flow / CONFIG, target), manifest, repository)
    for name in (OPS_LIBRARY, *DOCUMENTS):
        if name in manifest["files"]:
            shutil.copyfile(artefacts / name, repository / name)
    if engines:
        _write_guard(configs, manifest, artefacts, repository)
        content |= {"precision": engines.precision, "tensorrt": engines.trt.__version__, "gpu": engines.gpu}
        _bound(content, repository)
    check_assembled(repository, content)
    return versions.begin(repository, content)


def _write_stage(
    config: ModelConfig, stage: dict, manifest: dict, artefacts: Path, repository: Path, engines: Engines | None
) -> None:
    folder, kind = repository / config.name, stage["kind"]
    if not engines or kind == "glue":
        shutil.copytree(artefacts / config.name, folder / VERSION)
    else:
        (folder / VERSION).mkdir(parents=True)
        if kind == "encoder":
            shutil.copyfile(engines.plan(artefacts, config.name), folder / VERSION / "model.plan")
        else:
            shutil.copyfile(gpu_file(artefacts, manifest, "model.dali"), folder / VERSION / "model.dali")
    fill(config, stage, manifest["precision"])
    _write_warmup(config, config.name, manifest, artefacts, folder)
    _write(config, folder / CONFIG)


def _write_guard(configs: Path, manifest: dict, artefacts: Path, repository: Path) -> None:
    """The model that no artefact is of: its program is this package's."""
    config, folder = check(configs / GUARD.name / CONFIG, "gpu"), repository / GUARD.name
    for name in GUARD_MODULES:
        copy = folder / VERSION / "scaphoid" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / name, copy)
    shutil.copyfile(configs / GUARD.name / "model.py", folder / VERSION / "model.py")
    # Triton's Python ignores PYTHONDONTWRITEBYTECODE: a file where it would put compiled code, which no manifest lists
    (folder / VERSION / "__pycache__").touch()
    _write_warmup(config, "preprocess", manifest, artefacts, folder)
    _write(config, folder / CONFIG)


def _write_warmup(config: ModelConfig, stage: str, manifest: dict, artefacts: Path, folder: Path) -> None:
    """The samples that the configuration names, those of the artefacts' `stage`, and their sizes in it."""
    for name in {name for warmup in config.model_warmup for name in warmup.inputs}:
        sample = gpu_file(artefacts, manifest, f"{WARMUP}/{stage}/{name}")
        (folder / WARMUP).mkdir(exist_ok=True)
        shutil.copyfile(sample, folder / WARMUP / name)
    fill_warmup(config, folder / WARMUP)


def gpu_file(artefacts: Path, manifest: dict, name: str) -> Path:
    """Raises ManifestError for artefacts that were exported without what a GPU needs."""
    if f"{GPU_FILES}/{name}" not in manifest["files"]:
        raise ManifestError(f"{artefacts} holds no {GPU_FILES}/{name}: export it with --formats onnx")
    return artefacts / GPU_FILES / name


def _write_flow(config: ModelConfig, manifest: dict, repository: Path) -> None:
    pinned = {step.model_version for step in config.ensemble_scheduling.step}
    if pinned != {int(VERSION)}:
        raise ConfigError(f"{config.name}/{CONFIG}: steps pin versions {pinned}, assembled is {VERSION}")
    folder = repository / config.name
    (folder / VERSION).mkdir(parents=True)
    config.parameters[WEIGHTS].string_value = weights_hash(manifest)
    for each in manifest["weights"]:
        if config.name in each.get("flows", ()) and PHANTOMS in each:
            config.parameters[TRAINED_ON_PHANTOMS].string_value = each[PHANTOMS]
    if line := accepted(manifest):
        config.parameters[ACCEPTED].string_value = line
    # Triton wants the folder; a file keeps it through copies and archives that drop empty folders
    (folder / VERSION / ".keep").touch()
    _write(config, folder / CONFIG)


def _bound(content: Mapping, repository: Path) -> None:
    """Write what bounds the images in flight, and the server's flags that make it so."""
    first = check(repository / FIRST["gpu"] / CONFIG, "gpu")
    for flow in content["flows"]:
        config = check(repository / flow / CONFIG, "gpu")
        config.ensemble_scheduling.max_inflight_requests = step_limit(first)
        (repository / flow / BOUNDED).parent.mkdir()
        _write(config, repository / flow / BOUNDED)
    flags = server_flags(content["flows"], content["stages"], first)
    (repository / SERVER_FLAGS).write_text("".join(f"{flag}\n" for flag in flags))


def fill(config: ModelConfig, stage: Mapping, precision: str) -> None:
    """Put the artefact's numbers where a stage's configuration has -1, and the precision where it names one."""
    dims = {tensor["name"]: tensor["dims"] for tensor in (*stage["inputs"], *stage["outputs"])}
    for written in (*config.input, *config.output):
        if written.name != ENCODED.name:
            written.dims[:] = dims[written.name]
    for spec in config.optimization.cuda.graph_spec:
        for name, shape in spec.input.items():
            shape.dim[:] = dims[name]
    if PRECISION in config.parameters:
        config.parameters[PRECISION].string_value = HINTS[precision]
        if precision == "bf16":
            config.parameters["HINT_BF16"].string_value = "YES"  # what the vendor's backend reads


def fill_warmup(config: ModelConfig, samples: Path) -> None:
    """Put the samples' sizes into a filled configuration; a file's is its length."""
    dims = {tensor.name: list(tensor.dims) for tensor in config.input}
    for warmup in config.model_warmup:
        for name, sample in warmup.inputs.items():
            sample.dims[:] = [(samples / name).stat().st_size] if name == ENCODED.name else dims[name]


def _write(config: ModelConfig, path: Path) -> None:
    source = f"# assembled from {Path(__file__).parent.name}/*/{config.name}/{CONFIG}, where comments say why\n"
    path.write_text(source + text_format.MessageToString(config))


@dataclass(frozen=True)
class Arguments:
    """Assemble a model repository from exported artefacts."""

    artefacts: tyro.conf.Positional[Path]
    """Folder that scaphoid-export wrote; for a GPU with --formats onnx."""
    repository: tyro.conf.Positional[Path]
    """Folder for the model repository; an earlier one in it is replaced."""
    target: Literal["cpu", "gpu"] = "cpu"
    """What it will run on. A repository for a GPU is assembled on the machine that has it."""
    engines: Path | None = None
    """Folder of the engines that build_engines.py built here, for --target gpu."""
    precision: Literal["f16", "f32", "int8"] = "f16"
    """Which of the engines, for --target gpu."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    if (arguments.target == "gpu") != (arguments.engines is not None):
        sys.exit("assemble: --target gpu and --engines DIR go together: engines are built on the GPU that runs them")
    try:
        engines = arguments.engines and Engines.of_this_machine(arguments.engines, arguments.precision)
        content = assemble(arguments.artefacts, arguments.repository, engines)
    except KeyboardInterrupt:
        sys.exit("assemble: interrupted; an earlier repository is as it was")
    except (ManifestError, ConfigError, EngineError, BuildError, OSError) as error:
        sys.exit(f"assemble: {error}")
    made_for = f"{content['gpu']}, TensorRT {content['tensorrt']}" if engines else "any CPU"
    models = f"flows {', '.join(content['flows'])} on {len(content['stages'])} models"
    print(f"{arguments.repository}: {models}, for {made_for}")


if __name__ == "__main__":
    main()
