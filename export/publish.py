"""The place of an export: what it may replace; and the last step: what passed the gate takes its place, what failed
goes to OUT.rejected."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scaphoid.export.artefacts import (
    MANIFEST,
    MODEL_CARD,
    PARITY,
    PARITY_REPORT,
    ManifestError,
    read_manifest,
    write_manifest,
)
from scaphoid.export.lock import InUse, locked
from scaphoid.export.model_card import model_card
from scaphoid.export.parity_report import markdown
from scaphoid.export.trained import ExportError
from scaphoid.export.workspace import Workspace, beside

REJECTED = ".rejected"
READERS_S = 120.0  # to wait for those who read the artefacts that are replaced


class GateError(Exception):
    """An export that differs from eager fp32 by more than the tolerances: where it is, and a line for each output."""


@contextmanager
def place_of(out: Path) -> Iterator[Workspace]:
    """Where an export into `out` is written. Raises ExportError when another process exports into it, and for what
    `out`, or the folders beside it that an export writes, hold and no export may replace."""
    try:
        with beside(out) as work:
            rejected = _rejected(out)
            if not _may_be_rejected(rejected):
                raise ExportError(f"{rejected} is in the way and is not deleted unasked: choose another --out")
            if held := _not_ours(out):
                raise ExportError(f"--out {out} is not empty and {held}: choose another --out")
            work.new.mkdir()
            yield work
    except InUse as error:
        raise ExportError(f"--out {out}: another process exports into it, or reads what is there ({error})") from None


def _rejected(out: Path) -> Path:
    return out.with_name(out.name + REJECTED)


def _may_be_rejected(folder: Path) -> bool:
    """Whether nothing is there, or what the gate has rejected: it has a report, and no manifest as all else has."""
    if not folder.exists() and not folder.is_symlink():
        return True
    return not folder.is_symlink() and (folder / PARITY).is_file() and not (folder / MANIFEST).exists()


def _not_ours(out: Path) -> str:
    """What `out` holds that scaphoid-export did not write; empty when an export may replace it all."""
    if not out.exists() or not any(out.iterdir()):
        return ""
    try:
        manifest = read_manifest(out)
    except ManifestError as error:
        return f"holds no artefacts ({error})" if (out / MANIFEST).exists() else "holds no artefacts"
    if "version" in manifest:
        return "is a model repository"
    listed = {out / MANIFEST, *(out / name for name in manifest["files"])}
    others = sorted(each for each in out.rglob("*") if each not in listed and (each.is_symlink() or not each.is_dir()))
    return f"holds {others[0].relative_to(out)}, which its manifest does not list" if others else ""


def publish(work: Workspace, content: dict, report: dict, accept: str = "") -> dict:
    """Make what was exported to `work.new` the artefacts of its place, OUT, with the gate's `report`, a model card and
    a manifest of `content`; returns the manifest's content.

    A report that failed needs `accept`, the reason, which the manifest keeps with what failed. Without one GateError is
    raised: earlier artefacts stay, and what was exported becomes OUT.rejected, without a manifest.
    """
    (work.new / PARITY).write_text(json.dumps(report, indent=1) + "\n")
    (work.new / PARITY_REPORT).write_text(markdown(report))
    rejected = _rejected(work.place)
    shutil.rmtree(rejected, ignore_errors=True)
    accept = " ".join(accept.split())
    if not report["passed"] and not accept:
        work.new.rename(rejected)
        lines = "\n  ".join(report["failures"])
        raise GateError(
            f"not published: differs from eager fp32 by more than the tolerances. See {rejected / PARITY_REPORT}; "
            f'--accept "reason" publishes it all the same, and says so\n  {lines}'
        )
    parity = {key: report[key] for key in ("passed", "images", "notes", "failures")}
    content = content | {"parity": parity | ({} if report["passed"] else {"accepted": accept})}
    content |= {"reference": report["reference"]}
    (work.new / MODEL_CARD).write_text(model_card(content, report))
    write_manifest(work.new, content)
    if work.place.exists():
        with locked(work.place, alone=True, wait_s=READERS_S):  # whoever assembles from it
            work.exchange()
    else:
        work.exchange()
    return content
