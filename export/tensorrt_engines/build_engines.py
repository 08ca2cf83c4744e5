"""TensorRT engines from the artefacts' ONNX, built on the machine that runs them.

    python3 build_engines.py ARTEFACTS ENGINES                    # this file by itself, as it lies in the artefacts
    python3 -m scaphoid.export.tensorrt_engines.build_engines ARTEFACTS ENGINES

Needs Python 3.10, its standard library and the `tensorrt` package, 10 (10.3: JetPack 6) or 11: no torch, not this
package. What it calls of TensorRT is in both. Networks are strongly typed, so the ONNX carries the precision: a flag in
10, always so in 11. Every engine is built in a process of its own, which TensorRT or the kernel may end without harm to
the others, and kept under a name that its key gives: started again, it builds only what is missing.

Not run on hardware. `--compile-check` runs all of it but the GPU, with TensorRT for RTX.
"""

import argparse
import ctypes
import errno
import fcntl
import hashlib
import importlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ARTEFACTS_MANIFEST = "manifest.json"
MANIFEST = "engines.json"  # of a folder of engines
FORMAT = "scaphoid.engines/1"
TIMING_CACHE = "timing.cache"
LOCK = ".lock"
BATCHES = (1, 4, 8)  # images, in every stage (parts_encoder folds each one's windows itself): smallest, best, largest
PRECISIONS = ("f16", "f32", "int8")
WORKSPACE = 2048  # MiB of scratch memory that a layer may ask for
SHRINK = (1, 4, 16)  # the workspace is divided by these, in turn, when memory runs out
TENSORRT, RTX = "tensorrt", "tensorrt_rtx"
ENGINE, COMPILED = "engine", "RTX compile check"  # what a file is
VERSIONS = ("10", "11")
DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # the driver's attributes for the compute capability
STAGE = re.compile(r"[A-Za-z0-9_]+")  # a stage's name becomes a file's
ENTRY = {"stage", "kind", "key", "sha256"}  # what is read of an engine in the manifest, and of its key
KEY = {"onnx", "tensorrt", "gpu", "precision", "shapes"}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
GAVE_UP = 3  # exit status of a process whose builder did


class BuildError(Exception):
    """One line: what was expected, what came, what to do."""


class BuilderGaveUp(BuildError):
    """TensorRT took the network and did not build it: most often for memory, which it reports in many ways. Worth
    another try with a smaller workspace."""


@dataclass(frozen=True)
class Job:
    """One engine to build. `key` is all that decides whether an engine may be used again or loaded: two jobs of one key
    build the same engine. `target` is a compute capability without its dot, of a compile check alone."""

    stage: str
    onnx: Path
    key: Mapping
    target: int | None = None

    @property
    def file(self) -> str:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return f"{self.stage}-{digest[:12]}.{'plan' if self.target is None else 'rtx'}"


Build = Callable[[Job, int, Path, Path], object]  # job, workspace in MiB, the file to write, the timing cache


def make_key(onnx: str, trt: ModuleType, gpu: str, precision: str, shapes: Mapping, builder: str = TENSORRT) -> dict:
    """`onnx`: the sha256 of the file; `shapes`: smallest, best and largest of each input; `builder`: what built it."""
    version = f"{trt.__name__} {trt.__version__}"
    return {"onnx": onnx, "tensorrt": version, "gpu": gpu, "precision": precision, "shapes": shapes, "builder": builder}


def read_manifest(artefacts: Path) -> dict:
    path = artefacts / ARTEFACTS_MANIFEST
    try:
        manifest = json.loads(path.read_text())
        found = {"stages": dict(manifest["stages"]), "files": dict(manifest["files"])}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise BuildError(f"{path} is no manifest of scaphoid-export: name its --out folder") from None
    for name, stage in found["stages"].items():
        if not STAGE.fullmatch(str(name)):
            raise BuildError(f"{path} has a stage {name!r}: expected letters, digits and _; export again")
        if not _is_whole(stage):
            raise BuildError(f"{path} lacks the kind, or inputs with names and dims, of the stage {name}: export again")
    return found


def _is_whole(stage: object) -> bool:
    """Whether a manifest says of a stage what is read here. The rest of the project checks more (export/manifest.py);
    this file is by itself."""
    try:
        inputs = [(tensor["name"], dim) for tensor in stage["inputs"] for dim in tensor["dims"]]
        named = isinstance(stage["kind"], str) and all(isinstance(name, str) for name, _ in inputs)
        return named and len(inputs) > 0 and all(type(dim) is int and dim > 0 for _, dim in inputs)
    except (LookupError, TypeError):
        return False


def onnx_file(stage: str, precision: str) -> str:
    """Where the artefacts hold a stage's ONNX."""
    return f"onnx/{stage}{'' if precision == 'f32' else '.' + precision}.onnx"


def no_onnx(artefacts: Path, stage: str, precision: str) -> str:
    """What to say of artefacts without it."""
    options = "--formats onnx" + (" --precision int8 --calibration INDEX" if precision == "int8" else "")
    return f"{artefacts} holds no {onnx_file(stage, precision)}: export it with {options}"


def encoders(manifest: Mapping) -> list[str]:
    return [name for name, stage in manifest["stages"].items() if stage["kind"] == "encoder"]


def shapes_of(manifest: Mapping, stage: str) -> dict[str, list[list[int]]]:
    """The profile of each input: its smallest, best and largest shape."""
    inputs = manifest["stages"][stage]["inputs"]
    return {tensor["name"]: [[batch, *tensor["dims"]] for batch in BATCHES] for tensor in inputs}


def make_jobs(
    artefacts: Path, precision: str, trt: ModuleType, gpu: str, builder: str = TENSORRT, target: int | None = None
) -> list[Job]:
    """A job for every encoder of the artefacts. Raises BuildError when an ONNX is missing or was changed."""
    manifest, jobs = read_manifest(artefacts), []
    for stage in encoders(manifest):
        name = onnx_file(stage, precision)
        if name not in manifest["files"]:
            raise BuildError(no_onnx(artefacts, stage, precision))
        if not (artefacts / name).is_file() or sha256(artefacts / name) != manifest["files"][name]:
            raise BuildError(f"{artefacts / name} is not what the manifest lists (sha256): export again")
        key = make_key(manifest["files"][name], trt, gpu, precision, shapes_of(manifest, stage), builder)
        jobs.append(Job(stage, artefacts / name, key, target))
    return jobs


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_tensorrt(name: str = TENSORRT) -> ModuleType:
    try:
        trt = importlib.import_module(name)
    except ImportError as error:
        raise BuildError(f"no Python package {name} ({error}): install it, on Jetson with JetPack") from None
    if name == TENSORRT and trt.__version__.partition(".")[0] not in VERSIONS:
        raise BuildError(f"TensorRT {trt.__version__}: expected {' or '.join(VERSIONS)}")
    return trt


def gpu_name() -> str:
    """Name and compute capability of the GPU that CUDA uses first, asked of the driver alone."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise BuildError(f"no NVIDIA driver here ({DRIVER}): build where the engines will run") from None

    def ask(function: str, *arguments) -> None:
        if status := getattr(driver, function)(*arguments):
            raise BuildError(f"the NVIDIA driver answers {function} with error {status}: is there a GPU?")

    name, number, device = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    ask("cuInit", 0)
    ask("cuDeviceGet", ctypes.byref(device), 0)
    ask("cuDeviceGetName", name, len(name), device)
    capability = []
    for attribute in (MAJOR, MINOR):
        ask("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        capability.append(str(number.value))
    return f"{name.value.decode()}, compute capability {'.'.join(capability)}"


def read_entries(engines: Path) -> dict[str, dict]:
    """File name -> what is known of it, oldest first."""
    path = engines / MANIFEST
    if not path.exists():
        return {}
    try:
        entries = dict(json.loads(path.read_text())[FORMAT])
        whole = all(set(entry) >= ENTRY and set(entry["key"]) >= KEY for entry in entries.values())
    except (ValueError, LookupError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise BuildError(f"{path} lists no {FORMAT}: remove it and build again")
    return entries


def replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone_in(engines: Path) -> Iterator[None]:
    """Waits until no other build writes there: each writes the whole list, and would lose what another has added."""
    with open(engines / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another build writes into {engines}: waiting for its end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_all(jobs: Sequence[Job], engines: Path, build: Build, workspace: int = WORKSPACE) -> bool:
    """Build what `engines` does not hold yet, one after the other; one that fails leaves the others alone. Says in a
    line what became of each, and returns whether all are there."""
    engines.mkdir(parents=True, exist_ok=True)
    with alone_in(engines):
        return _build_missing(jobs, engines, build, workspace)


def _build_missing(jobs: Sequence[Job], engines: Path, build: Build, workspace: int) -> bool:
    entries, complete = read_entries(engines), True
    for job in jobs:
        path, known = engines / job.file, entries.get(job.file)
        if known and path.is_file() and sha256(path) == known["sha256"]:
            print(f"{job.stage}: kept {job.file}", flush=True)
            continue
        print(f"{job.stage}: building from {job.onnx.name}", flush=True)
        try:
            entries.pop(job.file, None)
            entries[job.file] = build_one(job, path, build, workspace)
            replace(engines / MANIFEST, json.dumps({FORMAT: entries}, indent=2).encode() + b"\n")
            found = entries[job.file]
            what = "built" if job.target is None else "compiles, which is no engine:"
            print(f"{job.stage}: {what} {job.file}, {found['bytes'] / 2**20:.1f} MiB in {found['seconds']:.0f} s")
        except (BuildError, OSError) as error:
            print(f"{job.stage}: failed: {_reason(error, engines)}", file=sys.stderr, flush=True)
            complete = False
    return complete


def _reason(error: Exception, folder: Path) -> str:
    """In one line; of a full disk, which Python tells without the folder, with what to do."""
    if getattr(error, "errno", None) not in FULL:
        return str(error)
    return f"no space left in {folder} ({error.strerror}): free some, and run the same command again"


def build_one(job: Job, path: Path, build: Build, workspace: int) -> dict:
    """Build into `path`, which changes only when it is complete; returns its entry for the manifest."""
    partial, started = path.with_name(path.name + ".partial"), time.monotonic()
    sizes = [max(1, workspace // divisor) for divisor in SHRINK]
    try:
        for size in sizes:
            try:
                build(job, size, partial, path.with_name(TIMING_CACHE))
                break
            except BuilderGaveUp as error:
                print(f"{job.stage}: workspace of {size} MiB: {error}", file=sys.stderr, flush=True)
        else:
            tried = ", ".join(map(str, sizes))
            raise BuildError(f"not built in workspaces of {tried} MiB; if it is memory, end other programs or add swap")
        partial.replace(path)
    finally:
        for left in (partial, path.with_name(TIMING_CACHE + ".partial")):  # a process that was ended removes nothing
            left.unlink(missing_ok=True)
    seconds, kind = round(time.monotonic() - started, 1), ENGINE if job.target is None else COMPILED
    facts = {"bytes": path.stat().st_size, "sha256": sha256(path), "workspace_mib": size, "seconds": seconds}
    return {"stage": job.stage, "kind": kind, "key": dict(job.key), **facts}


def build_apart(job: Job, workspace: int, plan: Path, timing_cache: Path) -> None:
    """Build one engine in a process of its own. Raises BuilderGaveUp, BuildError; what TensorRT said is printed."""
    request = {
        "module": job.key["tensorrt"].split()[0],
        "onnx": str(job.onnx),
        "shapes": job.key["shapes"],
        "workspace": workspace,
        "plan": str(plan),
        "timing_cache": str(timing_cache),
        "target": job.target,
    }
    command = [sys.executable, "-W", "ignore", __file__, "--one"]
    done = subprocess.run(
        command, input=json.dumps(request), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode == 0:
        return
    print(done.stdout, end="", file=sys.stderr, flush=True)
    reason = f"exit {done.returncode}: {(done.stdout.splitlines() or ['no message'])[-1]}"
    raise BuilderGaveUp(reason) if done.returncode < 0 or done.returncode == GAVE_UP else BuildError(reason)


def build_here(request: Mapping) -> None:
    """In the process of its own: build, write the plan and the timing cache."""
    trt = load_tensorrt(request["module"])
    builder, network, config = prepare(trt, request["onnx"], request["shapes"], request["target"])
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"] << 20)
    cache = Path(request["timing_cache"])
    for content in (cache.read_bytes() if cache.is_file() else b"", b""):  # that of another GPU or version is not taken
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, False):
            break
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit(GAVE_UP)
    Path(request["plan"]).write_bytes(plan)
    replace(cache, bytes(config.get_timing_cache().serialize()))


def prepare(trt: ModuleType, onnx: str, shapes: Mapping, target: int | None) -> tuple:
    """Builder, parsed network and configuration with the profile of `shapes`; ends the process when it does not parse.
    Precision is in the graph."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx):
        sys.exit(f"does not parse: {parser.get_error(0).desc()}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is what the graph says
    for name, each in shapes.items():
        profile.set_shape(name, *each)
    config.add_optimization_profile(profile)
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability(trt, target), 0)
    return builder, network, config


def capability(trt: ModuleType, target: int) -> object:
    """TensorRT for RTX' name of a compute capability. Raises BuildError for one that it lacks."""
    if not hasattr(trt.ComputeCapability, f"SM{target}"):
        raise BuildError(f"TensorRT for RTX {trt.__version__} does not compile for SM {target}")
    return getattr(trt.ComputeCapability, f"SM{target}")


def adopt(folder: Path) -> Build:
    """What takes the engines that trtexec has just built, STAGE.plan in `folder`, instead of building them."""

    def take(job: Job, workspace: int, plan: Path, timing_cache: Path) -> None:
        (folder / f"{job.stage}.plan").replace(plan)

    return take


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def main() -> None:
    if sys.argv[1:] == ["--one"]:
        request = json.load(sys.stdin)
        try:
            return build_here(request)
        except (BuildError, OSError) as error:
            sys.exit(_reason(error, Path(request["plan"]).parent))
        except MemoryError:
            print("out of memory")
            sys.exit(GAVE_UP)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", type=Path, help="folder that scaphoid-export wrote with --formats onnx")
    parser.add_argument("engines", type=Path, help="folder for the engines; those that fit are kept")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="which ONNX (default %(default)s)"
    )
    parser.add_argument(
        "--workspace", type=positive, default=WORKSPACE, help="MiB of scratch memory (default %(default)s)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--adopt", type=Path, help="folder of the engines that trtexec.sh has just built")
    instead.add_argument("--compile-check", type=int, metavar="SM", help="compile for compute capability SM, no GPU")
    arguments = parser.parse_args()
    target = arguments.compile_check
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        trt = load_tensorrt(TENSORRT if target is None else RTX)
        if target is not None:
            capability(trt, target)
        gpu = gpu_name() if target is None else f"none, compiled for compute capability {target}"
        builder = "trtexec" if arguments.adopt else TENSORRT
        jobs = make_jobs(arguments.artefacts, arguments.precision, trt, gpu, builder, target)
        build = adopt(arguments.adopt) if arguments.adopt else build_apart
        complete = build_all(jobs, arguments.engines, build, arguments.workspace)
    except (BuildError, OSError) as error:
        sys.exit(f"build_engines: {error}")
    except KeyboardInterrupt:
        sys.exit("build_engines: interrupted: engines built so far are kept, run the same command again")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
