"""Artefacts and the static configurations to a Triton model repository: MODEL/config.pbtxt, MODEL/1/model.*, one
manifest.

    python -m scaphoid.triton_repo.assemble artefacts repository

What the configurations leave open is filled in from the artefacts: image and map sizes (so that the server itself
rejects a tensor of another size, and because the vendor's openvino backend takes no open dim where the engine has a
number), the engines' precision, and in every flow a hash of the weights, for a retrained model has version 1 again, and
whether they know drawn radiographs alone, or differ from the trained model by more than they may, which the client's
report has to say.
"""

import hashlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scaphoid.export.artefacts import (
    DOCUMENTS,
    MANIFEST,
    OPS_LIBRARY,
    PHANTOMS,
    ManifestError,
    accepted,
    verify,
    write_manifest,
)
from scaphoid.export.precision import HINTS
from scaphoid.triton_repo.configs import ACCEPTED, CONFIG, PRECISION, TRAINED_ON_PHANTOMS, WEIGHTS, ConfigError, check

CONFIGS = Path(__file__).parent / "cpu"
VERSION = "1"


def assemble(artefacts: Path, repository: Path, configs: Path = CONFIGS) -> dict:
    """Write the model repository of every flow that `artefacts` hold; returns its manifest's content.

    A `repository` that was assembled before is replaced, once the new one is complete. Raises ManifestError for damaged
    artefacts, ConfigError for a configuration that disagrees with the contracts, FileExistsError for a foreign folder.
    """
    manifest = verify(artefacts)
    if repository.exists() and any(repository.iterdir()) and not (repository / MANIFEST).is_file():
        raise FileExistsError(f"{repository} is not empty and was not assembled by this command: choose another folder")
    partial = repository.with_name(repository.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    stages = manifest["stages"]
    for name, stage in stages.items():
        config = check(configs / name / CONFIG)
        fill(config, stage, manifest["precision"])
        shutil.copytree(artefacts / name, partial / name / VERSION)
        _write(config, configs, partial)
    for flow in manifest["flows"]:
        config = check(configs / flow / CONFIG)
        versions = {step.model_version for step in config.ensemble_scheduling.step}
        if versions != {int(VERSION)}:
            raise ConfigError(f"{configs / flow / CONFIG}: steps pin versions {versions}, assembled is {VERSION}")
        (partial / flow / VERSION).mkdir(parents=True)
        config.parameters[WEIGHTS].string_value = weights_hash(manifest)
        for each in manifest["weights"]:
            if flow in each.get("flows", ()) and PHANTOMS in each:
                config.parameters[TRAINED_ON_PHANTOMS].string_value = each[PHANTOMS]
        if line := accepted(manifest):
            config.parameters[ACCEPTED].string_value = line
        # Triton wants the folder; a file keeps it through copies and archives that drop empty folders
        (partial / flow / VERSION / ".keep").touch()
        _write(config, configs, partial)
    for name in (OPS_LIBRARY, *DOCUMENTS):
        if name in manifest["files"]:
            shutil.copyfile(artefacts / name, partial / name)
    content = {key: value for key, value in manifest.items() if key != "files"}
    write_manifest(partial, content)
    shutil.rmtree(repository, ignore_errors=True)
    partial.rename(repository)
    return content


def fill(config: ModelConfig, stage: dict, precision: str) -> None:
    """Put the artefact's numbers where a stage's configuration has -1, and the precision where it names one."""
    for written, real in zip([*config.input, *config.output], [*stage["inputs"], *stage["outputs"]], strict=True):
        if real["name"] != "encoded":
            written.dims[:] = real["dims"]
    if PRECISION in config.parameters:
        config.parameters[PRECISION].string_value = HINTS[precision]
        if precision == "bf16":
            config.parameters["HINT_BF16"].string_value = "YES"  # what the vendor's backend reads


def weights_hash(manifest: dict) -> str:
    """Eight hexadecimal digits that differ whenever any weights file behind the artefacts does."""
    return hashlib.sha256("".join(each["sha256"] for each in manifest["weights"]).encode()).hexdigest()[:8]


def _write(config: ModelConfig, configs: Path, repository: Path) -> None:
    source = f"# assembled from {configs.parent.name}/{configs.name}/{config.name}/{CONFIG}\n"
    (repository / config.name / CONFIG).write_text(source + text_format.MessageToString(config))


@dataclass(frozen=True)
class Arguments:
    """Assemble a model repository from exported artefacts."""

    artefacts: tyro.conf.Positional[Path]
    """Folder that scaphoid-export wrote."""
    repository: tyro.conf.Positional[Path]
    """Folder for the model repository; an earlier one in it is replaced."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    try:
        content = assemble(arguments.artefacts, arguments.repository)
    except (ManifestError, ConfigError, OSError) as error:
        sys.exit(f"assemble: {error}")
    print(f"{arguments.repository}: flows {', '.join(content['flows'])} on {len(content['stages'])} models")


if __name__ == "__main__":
    main()
