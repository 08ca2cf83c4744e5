"""What a bundle is made of: a CycloneDX bill of materials and a list of licences, of a model repository (or artefacts)
and of everything that is installed to serve it.

    python -m scaphoid.triton_repo.sbom repository --out sbom

Every file of the bundle with its sha256 (from the manifest, which is verified first), every Python distribution that
this package needs, and every native library that those bring, with the sha256 of its wheel's own record.
"""

import base64
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

import tyro
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scaphoid.export.artefacts import ManifestError, licence, verify

PACKAGE = "scaphoid"
BILL, LICENCES = "bundle.cdx.json", "licences.md"
NOT_STATED = "not stated"
MODELS = (".xml", ".bin", ".onnx", ".pt", ".pt2", ".plan", ".dali", ".safetensors")


@dataclass(frozen=True)
class Package:
    """An installed distribution. `libraries` are its native ones: path and sha256 (hexadecimal)."""

    name: str
    version: str
    licence: str
    licence_files: tuple[str, ...]
    libraries: tuple[tuple[str, str], ...]


def packages(root: str = PACKAGE) -> list[Package]:
    """`root` and what it needs, in order of names; extras that nobody asked for are left out. Raises
    PackageNotFoundError for one that is missing."""
    found: dict[str, Package] = {}
    waiting = [(root, frozenset[str]())]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        installed = distribution(name)
        found.setdefault(canonicalize_name(name), _package(installed))
        for needed in map(Requirement, installed.requires or ()):
            wanted = (canonicalize_name(needed.name), frozenset(needed.extras))
            if wanted not in seen and _applies(needed, extras):
                seen.add(wanted)
                waiting.append(wanted)
    return [found[name] for name in sorted(found)]


def _applies(needed: Requirement, extras: frozenset[str]) -> bool:
    return needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras or {""})


def _package(installed: Distribution) -> Package:
    about = installed.metadata
    files = installed.files or ()
    return Package(
        about["Name"],
        installed.version,
        _licence(installed),
        tuple(str(file) for file in files if _is_licence(file)),
        tuple((str(file), _hex(file.hash.value)) for file in files if file.hash and ".so" in file.suffixes),
    )


def _licence(installed: Distribution) -> str:
    """The licence that the distribution names: its expression, its classifiers, or its free text's first line."""
    about = installed.metadata
    if expression := about.get("License-Expression"):
        return expression
    prefix = "License :: "
    named = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith(prefix)]
    named = [name for name in named if name != "OSI Approved"]
    text = (about.get("License") or "").strip().splitlines()
    found = "; ".join(named) or (text[0][:80] if text else "")
    return NOT_STATED if found in ("", "UNKNOWN") else found


def _is_licence(file: PurePosixPath) -> bool:
    return file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE", "EULA"))


def _hex(record: str) -> str:
    """A wheel's record has URL-safe base64 without padding."""
    return base64.urlsafe_b64decode(record + "=" * (-len(record) % 4)).hex()


def bill(bundle: Path, manifest: dict, installed: list[Package]) -> str:
    """The bill of materials as CycloneDX JSON, held against its schema's classes. Needs cyclonedx-python-lib."""
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    def file(name: str, digest: str, kind: ComponentType = ComponentType.FILE) -> Component:
        return Component(
            name=name,
            type=kind,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
            bom_ref=f"{name}@{digest[:16]}",
        )

    bom = Bom()
    version = str(manifest.get("version", "1"))
    whole = Component(name=bundle.resolve().name, version=version, type=ComponentType.APPLICATION, bom_ref="bundle")
    bom.metadata.component = whole
    for name, digest in manifest["files"].items():
        is_model = name.endswith(MODELS)
        bom.components.add(file(name, digest, ComponentType.MACHINE_LEARNING_MODEL if is_model else ComponentType.FILE))
    for package in installed:
        purl = PackageURL("pypi", name=canonicalize_name(package.name), version=package.version)
        component = Component(
            name=package.name, version=package.version, type=ComponentType.LIBRARY, purl=purl, bom_ref=str(purl)
        )
        component.licenses.add(DisjunctiveLicense(name=package.licence))
        component.components.update(file(name, digest) for name, digest in package.libraries)
        bom.components.add(component)
    bom.register_dependency(whole, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=2)


def licences(installed: list[Package]) -> str:
    """A table to read; what names no licence in its metadata stands below it too: somebody has to look."""
    lines = ["# Licences", "", f"Code and artefacts of this bundle: {licence()}.", ""]
    lines += ["| package | version | licence | native libraries | licence files |", "|---|---|---|---:|---|"]
    for each in installed:
        files = ", ".join(f"`{name}`" for name in each.licence_files[:3]) + (
            " ..." if len(each.licence_files) > 3 else ""
        )
        lines.append(f"| {each.name} | {each.version} | {each.licence} | {len(each.libraries)} | {files} |")
    if unknown := [each.name for each in installed if each.licence == NOT_STATED]:
        lines += ["", f"Name no licence in their metadata: {', '.join(unknown)}."]
    return "\n".join(lines) + "\n"


def write_sbom(bundle: Path, out: Path) -> Iterator[Path]:
    """Write both files into `out`. Raises ManifestError for a damaged bundle, PackageNotFoundError, OSError."""
    manifest, installed = verify(bundle), packages()
    out.mkdir(parents=True, exist_ok=True)
    for name, text in ((BILL, bill(bundle, manifest, installed)), (LICENCES, licences(installed))):
        (out / name).write_text(text)
        yield out / name


@dataclass(frozen=True)
class Arguments:
    """Bill of materials (CycloneDX) and licences of a bundle, and of what is installed to serve it."""

    bundle: tyro.conf.Positional[Path]
    """Model repository, or artefacts."""
    out: Path = Path("sbom")
    """Folder for bundle.cdx.json and licences.md."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    try:
        for path in write_sbom(arguments.bundle, arguments.out):
            print(path)
    except PackageNotFoundError as error:
        sys.exit(f"sbom: {error.name} is needed and not installed")
    except ImportError as error:
        sys.exit(f"sbom: {error}: pip install cyclonedx-python-lib")
    except (ManifestError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"sbom: {error}")


if __name__ == "__main__":
    main()
