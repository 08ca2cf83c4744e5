"""The RTX compile check: TensorRT for RTX builds the exported ONNX for several GPUs, on a machine without one.

    scaphoid-export check-rtx artefacts

It shows that the network TensorRT will get parses, has valid shapes over the whole batch profile and compiles. It is
not an engine: what it builds is thrown away, and nothing was run on hardware. Each build runs in a process of its own,
because a network the builder cannot take may abort it.
"""

import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from scaphoid.export.artefacts import ManifestError, verify
from scaphoid.export.formats import FORMATS
from scaphoid.export.tensorrt_engines.build_engines import (
    RTX,
    BuildError,
    encoders,
    load_tensorrt,
    prepare,
    shapes_of,
)
from scaphoid.trainer.contracts import STAGES

ARCHITECTURES = (80, 86, 89, 120)
MISSING = "RTX compile check: not run, tensorrt_rtx is not installed; pip install 'scaphoid[rtx]'"
TIMEOUT = 600  # seconds for one build


@dataclass(frozen=True)
class Compiled:
    """One ONNX compiled for one architecture. `error` is empty when it compiled."""

    file: str
    architecture: int
    layers: int = 0
    precisions: str = ""  # layers by the type of their first output
    mebibytes: float = 0.0
    seconds: float = 0.0
    error: str = ""


def available() -> bool:
    return importlib.util.find_spec("tensorrt_rtx") is not None


def check(onnx: Path, shapes: Mapping[str, list[list[int]]], architecture: int) -> Compiled:
    """Compile `onnx` for `sm_<architecture>` in a process of its own; `shapes`: the profile of each input."""
    request = json.dumps({"onnx": str(onnx), "shapes": shapes, "architecture": architecture})
    command = [sys.executable, "-c", "from scaphoid.export.rtx_compile_check import build; build()"]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return Compiled(onnx.name, architecture, error=f"not compiled within {TIMEOUT} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Compiled(onnx.name, architecture, error=f"exit {done.returncode}: {last}")
    return Compiled(onnx.name, architecture, **json.loads(done.stdout.splitlines()[-1]))


def build() -> None:
    """In the process of its own: the request on stdin, the result as the last line of stdout."""
    request = json.load(sys.stdin)
    started = time.perf_counter()
    try:
        builder, network, config = prepare(
            load_tensorrt(RTX), request["onnx"], request["shapes"], request["architecture"]
        )
    except BuildError as error:
        sys.exit(str(error))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("does not compile")
    types = Counter(network.get_layer(index).get_output_type(0).name for index in range(network.num_layers))
    result = {
        "layers": network.num_layers,
        "precisions": ", ".join(f"{name} {count}" for name, count in types.most_common()),
        "mebibytes": plan.nbytes / 2**20,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(result))


def check_artefacts(artefacts: Path, architectures: tuple[int, ...]) -> list[Compiled]:
    """Every ONNX in a folder of scaphoid-export. Raises ManifestError when it is damaged or holds none."""
    manifest, form = verify(artefacts), FORMATS["onnx"]
    if form.name not in manifest.get("formats", []):
        raise ManifestError(f"{artefacts} holds no ONNX: export it with --formats onnx")
    return [
        check(path, shapes_of(manifest, name), architecture)
        for name in encoders(manifest)
        for path in (form.path(artefacts, STAGES[name], suffix) for suffix in form.files)
        if path.is_file()  # int8 is there only when it was asked for
        for architecture in architectures
    ]


@dataclass(frozen=True)
class Arguments:
    """RTX compile check: compile the exported ONNX for GPUs, on a machine without one. Exits 1 when one fails."""

    artefacts: tyro.conf.Positional[Path]
    """Folder that scaphoid-export wrote with --formats onnx."""
    architectures: tuple[int, ...] = ARCHITECTURES
    """Compute capabilities without the dot."""


def main(args: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, prog="scaphoid-export check-rtx", args=args)
    if not available():
        sys.exit(f"check-rtx: {MISSING}")
    try:
        results = check_artefacts(arguments.artefacts, arguments.architectures)
        if not results:
            raise ManifestError(f"{arguments.artefacts}: nothing to compile, expected an encoder and an architecture")
    except (ManifestError, OSError) as error:
        sys.exit(f"check-rtx: {error}")
    table = Table("ONNX", "sm", "layers", "layers by type", "MiB", "seconds", "compiles")
    for each in results:
        numbers = (str(each.layers), each.precisions, f"{each.mebibytes:.1f}", f"{each.seconds:.1f}")
        table.add_row(each.file, str(each.architecture), *numbers, each.error or "yes")
    Console().print(table)
    sys.exit(1 if any(each.error for each in results) else 0)


if __name__ == "__main__":
    main()
