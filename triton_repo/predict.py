"""`scaphoid-predict`: radiographs in, probabilities and boxes out, through a server (start one with `scaphoid-serve`).

    scaphoid-predict hand.png                            one radiograph
    scaphoid-predict MURA-v1.1/valid --csv               every study under a folder
    scaphoid-predict exam/*.dcm --overlays --out exam    DICOM; nothing but pixels leaves this machine
    scaphoid-predict --index phantoms/index.csv --split test --flow kalm
    scaphoid-predict archive --triage band.json          the first stage for all, the rest where that is uncertain

Exit code: 0 every input was predicted; 1 some inputs were rejected (duplicates too) or failed, each with a line that
says why; 2 wrong usage, or the server cannot be reached (what was finished is kept); 130 interrupted. Run the same
command again to pick up where it stopped.
"""

import asyncio
import inspect
import math
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from scaphoid.trainer.band import BandError, Fitted, read_band
from scaphoid.trainer.data.index import Radiograph, read_index
from scaphoid.trainer.flows import FLOWS
from scaphoid.trainer.journal import JOURNAL, Journal, Prediction
from scaphoid.triton_repo.client import AsyncClient, ServerUnavailable, Tls
from scaphoid.triton_repo.inputs import Collection, collect
from scaphoid.triton_repo.prediction_run import PredictionRun
from scaphoid.triton_repo.report.outcome import Outcome
from scaphoid.triton_repo.report.overlays import write_overlay
from scaphoid.triton_repo.report.report import write_report
from scaphoid.triton_repo.report.summary import shown, summarise
from scaphoid.triton_repo.requests.protocols import ADDRESS
from scaphoid.triton_repo.results import studies_of, write_csv, write_studies
from scaphoid.triton_repo.rules import BATCH
from scaphoid.triton_repo.triage import TriageClient

Flag = tyro.conf.FlagCreatePairsOff[bool]
USAGE, SOME_FAILED, INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Options:
    """Predict radiographs with a running server: files, folders (walked in depth), DICOM files, whole studies.

    Results go to --out as they come: predictions.jsonl (a line per image), studies.jsonl (a line per study: the mean of
    its images' probabilities, and the verdict on it) and report.html. Run the same command again after an interruption
    and it goes on where it stopped. Boxes are x0, y0, x1, y1 in pixels of the original radiograph.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Radiographs: PNG, JPEG, BMP, TIFF, PGM or DICOM files, and folders of them."""
    out: Path = Path("predictions")
    """Folder for the results; made when absent."""
    url: str = "127.0.0.1:8001"
    """host:port of the server's gRPC endpoint, or http://host:port; several with commas between: the healthy ones."""
    tls_ca: Annotated[Path | None, tyro.conf.arg(metavar="PEM")] = None
    """Speak TLS, with a server whose certificate this authority signed."""
    tls_certificate: Annotated[Path | None, tyro.conf.arg(metavar="PEM")] = None
    tls_key: Annotated[Path | None, tyro.conf.arg(metavar="PEM")] = None
    """With --tls-ca: the client's own certificate and its key, for a server that asks for them."""
    flow: Literal[tuple(FLOWS)] = "msfm"  # type: ignore[valid-type]
    """msfm: MSFM; msfm_fma: MSFM after suppressing bright artefacts; kalm: KALM."""
    parts: bool = True
    """Classify MSFM's seven windows too. Without them a prediction costs about half; the boxes are the same."""
    triage: Annotated[Path | None, tyro.conf.arg(metavar="BAND")] = None
    """Ask MSFM's first stage about every image, and the whole flow about those within this band alone (python -m
    scaphoid.trainer.triage fits one). The others get a probability and NO box, abnormal ones too."""
    model_version: str = ""
    """Version of the flow on the server; the newest when not given."""
    threshold: float = 0.5
    """Called abnormal at this probability or above: each image, and each study by its mean."""
    unstable_margin: float = 1e-4
    """A box is marked unstable when a decision behind it was closer to flipping than this (relative distance)."""
    index: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """An index.csv: gives each image's study, and annotated boxes to draw dashed. Without PATHS, the images too."""
    split: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """With --index and without PATHS: only the images of this split."""
    one_image_studies: Flag = False
    """Every image is a study of its own: for a flat folder of unrelated radiographs."""
    csv: Flag = False
    """Write predictions.csv too."""
    overlays: Flag = False
    """Write overlays/*.png too: each radiograph with its boxes burnt in."""
    report: bool = True
    """Write report.html: one file, readable offline."""
    resume: bool = True
    """Take over what an earlier run into --out has finished, as long as file, flow, version, weights, parts and the
    triage's band are the same. --no-resume predicts everything anew."""
    concurrency: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 8
    """Requests in flight at once, one image each."""
    timeout_s: float = 60.0
    """Time limit of one request, in seconds."""
    json: Flag = False
    """Print the summary as JSON on standard output instead of a table."""


class UsageError(Exception):
    """Something about the command itself is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    description = f"{inspect.cleandoc(Options.__doc__ or '')}\n\n{inspect.cleandoc(__doc__ or '')}"
    options = tyro.cli(Options, args=argv, prog="scaphoid-predict", description=description)
    console = Console(stderr=True, highlight=False)
    try:
        return _predict(options, console)
    except (UsageError, BandError, ServerUnavailable, OSError) as error:
        console.print(f"[bold red]error:[/] {shown(str(error))}", soft_wrap=True)
        return USAGE
    except KeyboardInterrupt:
        console.print("interrupted: what was finished is kept; run the same command again to go on", soft_wrap=True)
        return INTERRUPTED


def _predict(options: Options, console: Console) -> int:
    radiographs = _radiographs(options)
    paths = options.paths or tuple(radiographs)
    _check(options, paths)
    real = {path.resolve(): radiograph for path, radiograph in radiographs.items()}
    studies = {path: f"{item.body_part}/{item.patient}/{item.study}" for path, item in real.items()}
    fitted = _fitted(options)
    collection = collect(paths, studies, options.one_image_studies, skip=options.out)
    truth = {str(source.path): real.get(source.path.resolve()) for source in collection.sources}
    started = time.monotonic()
    try:
        run = asyncio.run(_run(options, fitted, collection, console))
    except ServerUnavailable as error:
        raise ServerUnavailable(
            f"{error}. What was finished is in {options.out}: run the same command again"
        ) from error
    given = [str(source.path) for source in collection.sources] + [str(item.path) for item in collection.rejections]
    predictions = [run.predictions[image] for image in dict.fromkeys(given)]
    outcome = Outcome(
        flow=options.flow,
        model_version=run.client.version,
        phantoms=run.client.phantoms,
        accepted=run.client.accepted,
        url=options.url,
        parts=run.parts,
        threshold=options.threshold,
        unstable_margin=options.unstable_margin,
        predictions=predictions,
        studies=studies_of(predictions, options.threshold),
        truth={image: item for image, item in truth.items() if item is not None},
        band=None if fitted is None else fitted.band,
    )
    files = _write(options, outcome, console)
    summarise(outcome, files, time.monotonic() - started, options.json)
    return 0 if all(item.status == "ok" for item in predictions) and len(given) == len(predictions) else SOME_FAILED


async def _run(options: Options, fitted: Fitted | None, collection: Collection, console: Console) -> PredictionRun:
    """Predict the whole collection, with a line for each input that was not predicted, and a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console)
    task = progress.add_task("predicting", total=len(collection.sources) + len(collection.rejections))

    def finished(prediction: Prediction) -> None:
        progress.advance(task)
        if prediction.status != "ok":
            console.print(
                f"[yellow]{prediction.status}[/] {shown(f'{prediction.image}: {prediction.reason}')}", soft_wrap=True
            )

    client, triage = _clients(options, fitted)
    async with triage or client:
        with _journal(options) as journal, progress:
            run = PredictionRun(
                client,
                journal,
                parts="parts_probability" in client.outputs,
                threshold=options.threshold,
                concurrency=options.concurrency,
                salt=_salt(options.out),
                finished=finished,
                triage=triage,
            )
            run.reject(collection.rejections)
            await run.predict(collection.sources)
    if skipped := collection.skipped.total():
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in collection.skipped.most_common(6))
        files = "1 file" if skipped == 1 else f"{skipped} files"
        console.print(f"[dim]skipped {files} in the folders, no images: {shown(kinds)}[/]", soft_wrap=True)
    return run


def _clients(options: Options, fitted: Fitted | None) -> tuple[AsyncClient, TriageClient | None]:
    """The client of the whole flow and, with a band, the triage that it is part of; not yet connected."""
    servers = options.url.split(",")
    settings = {
        "version": options.model_version,
        "timeout_s": options.timeout_s,
        "in_flight": options.concurrency,
        "priority": BATCH if _is_batch(options) else 0,
        "tls": _tls(options),
    }
    if fitted is None:
        return AsyncClient(servers, options.flow, parts=options.parts, **settings), None
    triage = TriageClient(servers, fitted, **settings)
    return triage.full, triage


def _is_batch(options: Options) -> bool:
    """Whether a program's work is asked for, folders or an index, which a person's few files go before. A repository
    without priorities takes all alike."""
    return not options.paths or any(path.is_dir() for path in options.paths)


def _fitted(options: Options) -> Fitted | None:
    """The band of --triage. Raises BandError, and UsageError when it cannot be read."""
    if options.triage is None:
        return None
    try:
        fitted = read_band(options.triage)
    except OSError as error:
        raise UsageError(
            f"--triage {options.triage}: {error.strerror}; python -m scaphoid.trainer.triage fits a band"
        ) from error
    fitted.check_asked(options.flow, options.parts)
    return fitted


def _tls(options: Options) -> Tls | None:
    if options.tls_ca is None:
        return None
    return Tls(options.tls_ca, options.tls_certificate, options.tls_key)


def _journal(options: Options) -> Journal:
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        return Journal(options.out / JOURNAL, options.resume)
    except (ValueError, OSError) as error:
        raise UsageError(f"--out {options.out}: {error}") from error


def _salt(out: Path) -> bytes:
    """The salt of the DICOM studies' pseudonyms: random, and kept so that a resumed run names the studies alike."""
    path = out / ".study_salt"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        path.touch(mode=0o600)
        path.write_bytes(salt := secrets.token_bytes(32))
        return salt


def _radiographs(options: Options) -> dict[Path, Radiograph]:
    """The index's radiographs by path; empty without --index."""
    if options.index is None:
        return {}
    try:
        index = read_index(options.index)
    except (ValueError, OSError) as error:
        raise UsageError(f"--index: {error}") from error
    if options.split is not None and not options.paths:
        index = index.where(split=options.split)
        if not len(index):
            raise UsageError(f"--split {options.split}: the index {options.index} has no image of this split")
    return {index.path(radiograph): radiograph for radiograph in index.radiographs}


def _check(options: Options, paths: Sequence[Path]) -> None:
    if not paths:
        raise UsageError("nothing to predict: give files or folders, or --index (scaphoid-predict --help explains)")
    if options.split is not None and (options.index is None or options.paths):
        raise UsageError("--split chooses among the images of --index; give no PATHS with it")
    if not 0 <= options.threshold <= 1:
        raise UsageError(f"--threshold: expected a probability between 0 and 1, got {options.threshold}")
    if options.concurrency < 1:
        raise UsageError(f"--concurrency: expected 1 or more, got {options.concurrency}")
    if not 0 < options.timeout_s < math.inf:
        raise UsageError(f"--timeout-s: expected more than 0 seconds, got {options.timeout_s}")
    if not options.unstable_margin >= 0:
        raise UsageError(f"--unstable-margin: expected 0 or more, got {options.unstable_margin}")
    for url in options.url.split(","):
        if not ADDRESS.fullmatch(url):
            raise UsageError(f"--url: expected HOST:PORT of the server's gRPC endpoint, got {url!r}")
    for pem in (options.tls_ca, options.tls_certificate, options.tls_key):
        if pem is not None and (options.tls_ca is None or not pem.is_file()):
            raise UsageError(f"--tls-ca, --tls-certificate and --tls-key are files, --tls-ca one of them; got {pem}")
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise UsageError("--tls-certificate and --tls-key go together")
    if not re.fullmatch(r"\d*", options.model_version):
        raise UsageError(f"--model-version: expected a number, got {options.model_version!r}")
    if taken := [path for path in (options.out, *options.out.parents) if path.exists() and not path.is_dir()]:
        raise UsageError(f"--out {options.out}: {taken[0]} is a file: results need a folder of their own")
    if options.out.resolve() in {path.resolve() for path in options.paths}:
        raise UsageError(f"--out {options.out} is one of the inputs: results need a folder of their own")


def _write(options: Options, outcome: Outcome, console: Console) -> list[Path]:
    """The files besides the journal that this run was asked for."""
    files = [options.out / JOURNAL, options.out / "studies.jsonl"]
    write_studies(files[-1], outcome.studies)
    if options.csv:
        files.append(options.out / "predictions.csv")
        write_csv(files[-1], outcome.predictions)
    if options.overlays:
        files.append(options.out / "overlays")
        done = [prediction for prediction in outcome.predictions if prediction.status == "ok"]
        for prediction in track(done, "drawing overlays", console=console):
            try:
                write_overlay(files[-1], prediction, outcome.truth.get(prediction.image))
            except (OSError, ValueError) as error:
                console.print(f"no overlay of {shown(f'{prediction.image}: {error}')}", soft_wrap=True)
    if options.report:
        files.append(options.out / "report.html")
        with console.status("writing the report"):
            write_report(files[-1], outcome)
    return files


if __name__ == "__main__":
    sys.exit(main())
