"""Everything that an edge device without network needs, in one folder; `sh install.sh` does the rest there.

install.sh, scaphoid-edge.service      what is run there
needs.env                              how much memory and disk it takes, computed from these artefacts
artefacts/                             the encoders' ONNX in one precision, and the manifest
python/scaphoid/                       the part of this package that runs without torch, and the ops' sources
wheels/                                numpy, Pillow and ninja for 64-bit Arm
"""

import ast
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import scaphoid.kernels
from scaphoid.export.artefacts import ManifestError, verify, write_manifest
from scaphoid.export.disk import room_in
from scaphoid.export.edge.flow import BATCH
from scaphoid.export.edge.memory import MIB, budgets
from scaphoid.export.tensorrt_engines.build_engines import encoders, no_onnx, onnx_file
from scaphoid.export.workspace import beside

STARTS = (
    "scaphoid.export.edge.command",
    "scaphoid.export.tensorrt_engines.build_engines",
    "scaphoid.kernels.build_ops",
)
INSTALL = Path(__file__).parent / "install"
WHEELS = ("pillow", "ninja")  # and numpy, in the version that was tested here
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
PYTHON = "3.10"  # of JetPack 6
THREADS = 2  # that decode, in the service
SAMPLE = b"P5\n64 64\n255\n" + bytes(range(256)) * 16  # a picture to try the engines on


def bundle(
    artefacts: Path, out: Path, precision: str = "f16", wheels: bool = True, python: str = PYTHON
) -> Iterator[str]:
    """Writes the folder `out`, which must not be there yet, telling each step. Raises ManifestError for artefacts that
    are damaged or hold no ONNX of that precision, OSError when `out` exists or wheels cannot be fetched,
    InUse when another process writes it."""
    manifest = verify(artefacts)
    stages = encoders(manifest)
    if missing := [stage for stage in stages if onnx_file(stage, precision) not in manifest["files"]]:
        raise ManifestError(no_onnx(artefacts, missing[0], precision))
    with beside(out) as work:
        if out.exists() or out.is_symlink():
            raise FileExistsError(f"{out} is there already: choose another folder")
        with room_in(out.parent):
            yield from _fill(work.new, artefacts, manifest, precision, wheels, python)
        work.new.rename(out)  # fails for what has come there meanwhile, which stays
    yield f"{out}: copy it to the device and run there: sudo sh install.sh"


def _fill(partial: Path, artefacts: Path, manifest: dict, precision: str, wheels: bool, python: str) -> Iterator[str]:
    models = [onnx_file(stage, precision) for stage in encoders(manifest)]
    for name in models:
        _copy(artefacts / name, partial / "artefacts" / name)
    write_manifest(partial / "artefacts", {key: value for key, value in manifest.items() if key != "files"})
    yield f"artefacts: {len(models)} encoders in {precision}"
    modules = needed_modules()
    for name, file in modules.items():
        folder = Path(*(name if file.name == "__init__.py" else name.rpartition(".")[0]).split("."))
        _copy(file, partial / "python" / folder / file.name)
    kernels = Path(scaphoid.kernels.__file__).parent
    shutil.copytree(kernels / "csrc", partial / "python" / "scaphoid" / "kernels" / "csrc")
    yield f"python: {len(modules)} modules, without torch"
    for file in INSTALL.iterdir():
        _copy(file, partial / file.name)
    (partial / "sample.pgm").write_bytes(SAMPLE)
    (partial / "needs.env").write_text(needs(partial / "artefacts", precision))
    if wheels:
        _download(partial / "wheels", python)
        yield f"wheels: {', '.join(sorted(path.name for path in (partial / 'wheels').iterdir()))}"


def needs(artefacts: Path, precision: str) -> str:
    """For a shell: MiB that the largest flow takes while it runs, and that artefacts, engines and the build take; the
    flows."""
    found = budgets(artefacts, [BATCH], precision, THREADS)
    memory = max(each.total for each in found)
    files = sum(path.stat().st_size for path in artefacts.rglob("*") if path.is_file())
    disk = 3 * files + 200 * MIB  # the copy, an engine of that size, one that is replaced; objects of the op library
    flows = " ".join(dict.fromkeys(each.flow for each in found))
    return f'MEMORY_MIB={-(-memory // MIB)}\nDISK_MIB={-(-disk // MIB)}\nPRECISION={precision}\nFLOWS="{flows}"\n'


def needed_modules(starts: tuple[str, ...] = STARTS) -> dict[str, Path]:
    """The modules of this project that `starts` import, directly or not, and the files that they are in."""
    found: dict[str, Path] = {}
    open_ends = list(starts)
    while open_ends:
        name = open_ends.pop()
        if name in found or (spec := _spec(name)) is None:
            continue
        found[name] = Path(spec.origin)
        open_ends += [name.rpartition(".")[0], *_imports(found[name])]
    return found


def _spec(name: str):
    """Of a module with a file; None for the namespace `scaphoid` and for what is no module but a name in one."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return spec if spec and spec.origin and spec.has_location else None


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
        yield from (name for name in names if name.startswith("scaphoid."))


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, to)


def _download(folder: Path, python: str) -> None:
    packages = [f"numpy=={importlib.metadata.version('numpy')}", *WHEELS]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    target = [*platforms, "--implementation=cp", f"--python-version={python}", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder}", *target, *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"pip could not fetch the wheels ({said}); without network: --no-wheels")
