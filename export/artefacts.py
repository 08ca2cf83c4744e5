"""The manifest that travels with artefacts and with a model repository: what they are, and the sha256 of every file.

    scaphoid-export verify artefacts

Imports nothing heavy: the server verifies a repository without torch.
"""

import hashlib
import json
import sys
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from scaphoid.export.manifest import Manifest, ManifestError, check

MANIFEST = "manifest.json"
PARITY, PARITY_REPORT, MODEL_CARD = "parity.json", "parity.md", "MODEL_CARD.md"
DOCUMENTS = (PARITY, PARITY_REPORT, MODEL_CARD)  # go where the artefacts go
CONTAINER = {"image": "tritonserver", "release": "26.07"}  # the vendor's; the oldest that GPU repositories may use
FORMAT = 1
OPS_LIBRARY = "libscaphoid_ops.so"
GPU_FILES = "gpu"  # what a repository for a GPU needs beside the ONNX: model.dali, WARMUP/STAGE/TENSOR
WARMUP = "warmup"  # in a model's folder Triton wants the same name
PHANTOMS = "phantoms"  # of weights trained on drawn radiographs: the generator's version
PACKAGES = ("scaphoid", "torch", "timm", "openvino", "nvidia-dali-cuda130", "numpy")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):  # hashlib.file_digest is newer than the Python 3.10 of edge devices
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages whose code or format is inside the artefacts."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def licence() -> str:
    """Of this package, and so of the code inside the artefacts."""
    try:
        return metadata("scaphoid")["License-Expression"]
    except PackageNotFoundError:
        return "not installed"


def _files(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, as relative POSIX paths, sorted."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST
    )


def write_manifest(folder: Path, content: dict) -> None:
    """Write `content` with the sha256 of every file in `folder`; the manifest comes last, so a cut-off run has none."""
    files = {name: sha256(folder / name) for name in _files(folder)}
    partial = folder / (MANIFEST + ".partial")
    text = json.dumps({"format": FORMAT, **content, "files": files}, indent=2, allow_nan=False)
    partial.write_text(text + "\n")
    partial.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """The manifest, checked part by part, its files unchecked. Raises ManifestError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ManifestError(f"{folder} has no {MANIFEST}: it is not a finished folder of scaphoid-export or assemble")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not JSON ({error}): write it again with scaphoid-export or assemble") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ManifestError(f"{path} lists no files: write it again with scaphoid-export or assemble")
    if manifest.get("format") != FORMAT:
        raise ManifestError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}: export again")
    return check(path, manifest)


def verify(folder: Path) -> Manifest:
    """The manifest of `folder`, after every file was held against it. Raises ManifestError, naming the first file that
    is missing, changed or unknown to the manifest."""
    manifest = read_manifest(folder)
    files = manifest["files"]
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ManifestError(
                f"{path} is a link or a special file, whose content may change: assemble the folder again"
            )
    present = set(_files(folder))
    if missing := sorted(set(files) - present):
        raise ManifestError(
            f"{folder / missing[0]} is missing, though the manifest lists it: assemble the folder again"
        )
    if unknown := sorted(present - set(files)):
        raise ManifestError(f"{folder / unknown[0]} is not in the manifest: remove it, or assemble the folder again")
    for name, digest in files.items():
        if sha256(folder / name) != digest:
            raise ManifestError(
                f"{folder / name} changed since its manifest was written (sha256 differs): assemble again"
            )
    return manifest


def accepted(manifest: dict) -> str:
    """A line for whoever uses artefacts that did not pass their gate; empty for all others."""
    parity = manifest.get("parity", {})
    if "accepted" not in parity:
        return ""
    first, *others = parity["failures"] or ["by what, its manifest does not say"]
    more = f" and {len(others)} more" if others else ""
    return f"NOT AS EAGER fp32: published though the gate failed, accepted as {parity['accepted']!r}: {first}{more}"


def main(arguments: list[str]) -> None:
    """`scaphoid-export verify DIR`."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("usage: scaphoid-export verify DIR: a folder of scaphoid-export, or a model repository")
    try:
        manifest = verify(Path(arguments[0]))
    except (ManifestError, OSError) as error:
        sys.exit(f"verify: {error}")
    print(f"{arguments[0]}: {len(manifest['files'])} files are what the manifest says")
    if line := accepted(manifest):
        print(line)
