"""The whole way once, on this machine: phantoms, shipped weights, export, the real Triton server, prediction, report.

make demo
"""

import contextlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import tyro
from pydicom.data import get_testdata_file
from rich.console import Console
from rich.table import Table

from scaphoid.export.artefacts import read_manifest
from scaphoid.export.export import export
from scaphoid.trainer import evaluate
from scaphoid.trainer.data.fracatlas import read_fracatlas
from scaphoid.trainer.data.index import FILE_NAME, Index, read_index, write_index
from scaphoid.trainer.data.phantom.generate import TEST, generate_frozen, image_path
from scaphoid.trainer.data.phantom.render import twin
from scaphoid.trainer.data.phantom.study import planned_views
from scaphoid.triton_repo import predict
from scaphoid.triton_repo.assemble import assemble
from scaphoid.triton_repo.client import Client
from scaphoid.triton_repo.supervisor.server import Server, running_server

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "trainer" / "weights"
FRACATLAS = ROOT.parent / "shared" / "data" / "fracatlas"
CR_RADIOGRAPHS = ("RG1_UNCR.dcm", "RG1_J2KR.dcm", "RG3_UNCR.dcm", "RG3_J2KR.dcm")  # real, from the package pydicom-data
FLOWS = ("msfm", "msfm_fma", "kalm")
LATENCY_REQUESTS = 40
GATE_IMAGES = 32  # of the export's gate; scaphoid-export takes 256

console = Console()


@dataclass(frozen=True)
class Options:
    """Run the whole way: phantoms, export, Triton, prediction, evaluation, report. Not for clinical use."""

    out: Path = Path("demo")
    """Folder for everything that the demo writes; phantoms that are complete in it are used again."""
    twins: Annotated[int, tyro.conf.arg(metavar="N")] = 100
    """Held-out phantoms to predict again with their lesion removed."""


def main() -> None:
    options = tyro.cli(Options)
    started = time.monotonic()
    phantoms = draw_phantoms(options.out / "phantoms")
    twins = draw_twins(options.out / "twins", options.twins)
    repository = build_repository(options.out)
    with step("starting Triton"), contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server(repository, FLOWS))
        serve = stack.pop_all()
    with serve:
        results = predict_all(server, options.out, phantoms, twins)
        with step("measuring latency, one request at a time"):
            latencies = {flow: measure_latency(server, flow, phantoms) for flow in FLOWS}
    reports = {
        flow: evaluate_flow(flow, folder, phantoms, results) for flow, folder in results.items() if flow in FLOWS
    }
    show(reports, latencies)
    console.print(f"\nLook at [bold]{options.out / 'predictions'}[/]:")
    for name, folder in results.items():
        console.print(f"  {name:12} {folder / 'report.html'}")
    console.print("The weights know drawn phantoms alone: on real radiographs they show the way, not a finding.")
    console.print(f"Research use only; not a medical device. {time.monotonic() - started:.0f} s in all.")


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    started = time.monotonic()
    console.print(f"[bold]{title}[/] …")
    yield
    console.print(f"  {time.monotonic() - started:.1f} s")


def draw_phantoms(folder: Path) -> Index:
    """The frozen held-out phantoms."""
    if not (folder / FILE_NAME).exists():
        with step(f"drawing {TEST.images} held-out phantoms"):
            generate_frozen(folder, TEST, workers=2)
    return read_index(folder)


def draw_twins(folder: Path, count: int) -> Index:
    """The first `count` held-out phantoms that show a lesion, drawn again without it, under the same relative paths."""
    test = {radiograph.image: radiograph for radiograph in read_index(folder.parent / "phantoms").radiographs}
    shown = [
        (study, view, test[image_path(study, view, TEST.split)])
        for study, view in planned_views(TEST.seed, TEST.images)
        if test[image_path(study, view, TEST.split)].boxes
    ][:count]
    if not (folder / FILE_NAME).exists():
        with step(f"drawing {len(shown)} of them again without their lesion"):
            for study, view, radiograph in shown:
                path = folder / radiograph.image
                path.parent.mkdir(parents=True, exist_ok=True)
                if not cv2.imwrite(str(path), twin(study, view)[1].image):
                    raise OSError(f"{path}: could not be written; check the free space and the permissions")
            write_index(Index(folder, tuple(radiograph for _, _, radiograph in shown)))
    return read_index(folder)


def build_repository(out: Path) -> Path:
    """Encoders to OpenVINO, glue to TorchScript, preprocessing to DALI, and the Triton repository around them."""
    with step("exporting the shipped weights and assembling the Triton repository"):
        export([WEIGHTS / "msfm.safetensors", WEIGHTS / "kalm.safetensors"], out / "artefacts", images=GATE_IMAGES)
        assemble(out / "artefacts", out / "repository")
    return out / "repository"


def predict_all(server: Server, out: Path, phantoms: Index, twins: Index) -> dict[str, Path]:
    """Predictions of the phantoms by every flow, of their twins, and of real radiographs; the folder of each."""
    radiographs = [get_testdata_file(name, download=False) for name in CR_RADIOGRAPHS]
    jobs = {flow: (["--index", phantoms.root / FILE_NAME], flow) for flow in FLOWS}
    jobs["twins"] = (["--index", twins.root / FILE_NAME], "msfm")
    jobs["cr"] = ([*radiographs, "--one-image-studies"], "msfm")
    if FRACATLAS.is_dir():
        jobs["fracatlas"] = (["--index", index_fracatlas(out / "fracatlas")], "msfm")
    folders = {}
    for name, (what, flow) in jobs.items():
        folders[name] = out / "predictions" / name
        with step(f"predicting {name}"):
            command = [*what, "--flow", flow, "--url", server.grpc_url, "--out", folders[name], "--no-resume"]
            status = predict.main([str(word) for word in command])
            if status and name != "fracatlas":
                sys.exit(f"demo: scaphoid-predict {name} ended with exit code {status}")
    return folders


def index_fracatlas(folder: Path) -> Path:
    """The canonical index of FracAtlas in `folder`, its images linked rather than copied."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (images := folder / "images").exists():
        images.symlink_to((FRACATLAS / "images").resolve(), target_is_directory=True)
    return write_index(Index(folder, read_fracatlas(FRACATLAS).radiographs))


def measure_latency(server: Server, flow: str, phantoms: Index) -> list[float]:
    """Milliseconds of single requests, one after the other, after a warm-up of three."""
    encoded = [phantoms.path(radiograph).read_bytes() for radiograph in phantoms.radiographs[: LATENCY_REQUESTS + 3]]

    taken = []
    with Client(server.grpc_url, flow) as client:
        for image in encoded:
            started = time.monotonic()
            client.infer(image)
            taken.append(1000 * (time.monotonic() - started))
    return taken[3:]


def evaluate_flow(flow: str, folder: Path, phantoms: Index, results: dict[str, Path]) -> dict:
    command = [str(folder / "predictions.jsonl"), "--index", str(phantoms.root), "--out", str(folder / "evaluation")]
    if flow == "msfm":
        command += ["--twins", str(results["twins"] / "predictions.jsonl")]
    command += ["--map-size", *map(str, activation_size(flow, folder.parents[1] / "artefacts"))]
    with step(f"evaluating {flow}"), contextlib.redirect_stdout(None):
        if status := evaluate.main([*command, "--json"]):
            sys.exit(f"demo: scaphoid-evaluate {flow} ended with exit code {status}")
    return json.loads((folder / "evaluation" / "evaluation.json").read_text())


def activation_size(flow: str, artefacts: Path) -> list[int]:
    """Rows and columns of the activation map of the flow's first encoder, as the manifest has them: what boxes a method
    can form at all depends on it."""
    encoder = "global_encoder" if flow == "kalm" else "encoder"
    outputs = read_manifest(artefacts)["stages"][encoder]["outputs"]
    return next(output["dims"] for output in outputs if output["name"] == "activation")


def show(reports: dict[str, dict], latencies: dict[str, list[float]]) -> None:
    """The short table: image-level AUROC, localisation beside its oracle, drop without lesion, latency."""
    # The shipped MSFM weights were trained without suppression: its flow shows that it runs, not what it is worth.
    heads = ("msfm_fma (trained without)" if flow == "msfm_fma" else flow for flow in reports)
    table = Table("", *heads, title=f"{TEST.images} held-out phantoms")

    def estimate(value: dict | None) -> str:
        if not value or value["low"] is None:
            return "undefined" if value else ""
        return f"{value['value']:.3f} ({value['low']:.3f}-{value['high']:.3f})"

    for name, level in (("AUROC, image", "image"), ("AUROC, study", "study")):
        cells = (
            report["classification"]["probability"][level]["together"]["metrics"]["auroc"]
            for report in reports.values()
        )
        table.add_row(name, *map(estimate, cells))
    for label, metric in (("box centre in lesion", "centre_hit"), ("PCL at IoU 0.5", "pcl_0.5")):
        for suffix, method in (
            ("", None),
            ("  of the geometric oracle", "oracle"),
            ("  the same in its object box", "oracle in its object box"),
            ("  of a centre box", "centre box"),
        ):
            cells = []
            for flow, report in reports.items():
                methods = report["localization"]["together"]["methods"]
                cells.append(estimate(methods.get(method or flow, {}).get(metric)))
            table.add_row(suffix or label, *cells)
    drops = ((report["twins"] or {}).get("median_drop") for report in reports.values())
    table.add_row("median drop without lesion", *map(estimate, drops))
    for name, share in (("latency p50, ms", 50), ("latency p95, ms", 95)):
        cuts = (statistics.quantiles(latencies[flow], n=100)[share - 1] for flow in reports)
        table.add_row(name, *(f"{cut:.0f}" for cut in cuts))
    console.print(table)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
