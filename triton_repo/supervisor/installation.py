"""Where Triton is: in the vendor's container, or in the nvidia-pytriton wheel with this package's stand-ins for the
backends that the wheel lacks."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scaphoid.export.artefacts import OPS_LIBRARY
from scaphoid.triton_repo.memory import SERVER_FLAGS
from scaphoid.triton_repo.supervisor.api import ServerError

BACKENDS = Path(__file__).parents[1] / "backends"
CONTAINER = Path("/opt/tritonserver")
OPS = "SCAPHOID_OPS"  # environment: the op library that an image was built with, in place of the repository's


@dataclass(frozen=True)
class Installation:
    """`binary` with the `options` and the `environment` that it needs. `loopback_only`: too old to be reachable from
    another machine, or to bear a stranger's HTTP inference."""

    binary: Path
    options: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    loopback_only: bool = False


def in_container() -> bool:
    return (CONTAINER / "bin" / "tritonserver").is_file()


def installation(repository: Path, folder: Path) -> Installation:
    """The container's where there is one, else the wheel's, laid out in `folder`. Raises ServerError."""
    if not in_container():
        if (repository / SERVER_FLAGS).is_file():
            raise ServerError(
                f"{repository} is for a GPU: serve it in the vendor's container, or assemble one for a CPU"
            )
        return from_wheel(folder)
    libraries = f"{CONTAINER / 'backends' / 'pytorch'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    ops = os.environ.get(OPS) or str(repository.resolve() / OPS_LIBRARY)
    preload = {"LD_PRELOAD": ops, "LD_LIBRARY_PATH": libraries}
    flags = repository / SERVER_FLAGS
    options = tuple(flags.read_text().split()) if flags.is_file() else ()
    return Installation(CONTAINER / "bin" / "tritonserver", options, preload)


def from_wheel(folder: Path) -> Installation:
    """Lay out a backend directory in `folder`: Triton's Python backend (copied: it does not start through links) and
    the stand-ins. Raises ServerError when the wheel lacks something."""
    root = _site_packages() / "pytriton" / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    binary, stub = root / "bin" / "tritonserver", root / "python_backend_stubs" / python / "triton_python_backend_stub"
    for path, what in ((binary, "tritonserver"), (stub, f"Triton's backend process for Python {python}")):
        if not path.is_file():
            raise ServerError(f"{what} is not installed ({path} is missing): pip install nvidia-pytriton==0.7.0")
    backends = folder / "backends"
    shutil.copytree(BACKENDS, backends, ignore=shutil.ignore_patterns("__pycache__"))
    (backends / "python").mkdir()
    for path in (*(root / "backends" / "python").glob("*"), stub):
        if path.is_file():
            shutil.copy(path, backends / "python")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{_site_packages() / 'nvidia_pytriton.libs'}",
    }
    options = (f"--backend-directory={backends}", "--allow-gpu-metrics=false")
    return Installation(binary, options, environment, loopback_only=True)


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))
