"""The place of an export: what it may replace, the folder it writes to first, and the last step: what passed the gate
takes its place, what failed goes to OUT.rejected."""

import fcntl
import json
import os
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
from scaphoid.export.model_card import model_card
from scaphoid.export.parity_report import markdown
from scaphoid.export.trained import ExportError

PARTIAL = ".partial"
REJECTED = ".rejected"
EARLIER = ".earlier"  # for the moment between two renames


class GateError(Exception):
    """An export that differs from eager fp32 by more than the tolerances: where it is, and a line for each output."""


@contextmanager
def partial_of(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` for the export to fill, gone afterwards unless it was renamed. Raises ExportError
    when another process exports into `out`, and for what `out` holds and no export may replace."""
    partial = out.with_name(out.name + PARTIAL)
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _lock(descriptor, partial):
            raise ExportError(f"--out {out}: another process exports into it: let that finish, or choose another --out")
        try:
            _put_back(out)
            if held := _not_ours(out):
                raise ExportError(f"--out {out} is not empty and {held}: choose another --out")
            for each in partial.iterdir():  # left by an export that was killed
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
            yield partial
        finally:
            if _is(descriptor, partial):  # neither published, nor another process's by now
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, partial: Path) -> bool:
    """Whether this process alone has `partial` now; the kernel releases it when the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is(descriptor, partial)


def _is(descriptor: int, folder: Path) -> bool:
    return folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())


def _put_back(out: Path) -> None:
    """What an export that was killed between its two renames has left."""
    earlier = out.with_name(out.name + EARLIER)
    if (earlier / MANIFEST).is_file() and not out.exists():
        earlier.rename(out)


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


def publish(partial: Path, out: Path, content: dict, report: dict, accept: str = "") -> dict:
    """Make the exported folder `partial` the artefacts `out`, with the gate's `report`, a model card and a manifest of
    `content`; returns the manifest's content.

    A report that failed needs `accept`, the reason, which the manifest keeps with what failed. Without one GateError is
    raised: earlier artefacts in `out` stay, and `partial` becomes OUT.rejected, without a manifest.
    """
    (partial / PARITY).write_text(json.dumps(report, indent=1) + "\n")
    (partial / PARITY_REPORT).write_text(markdown(report))
    rejected = out.with_name(out.name + REJECTED)
    shutil.rmtree(rejected, ignore_errors=True)
    accept = " ".join(accept.split())
    if not report["passed"] and not accept:
        partial.rename(rejected)
        lines = "\n  ".join(report["failures"])
        raise GateError(
            f"not published: differs from eager fp32 by more than the tolerances. See {rejected / PARITY_REPORT}; "
            f'--accept "reason" publishes it all the same, and says so\n  {lines}'
        )
    parity = {key: report[key] for key in ("passed", "images", "notes", "failures")}
    content = content | {"parity": parity | ({} if report["passed"] else {"accepted": accept})}
    content |= {"reference": report["reference"]}
    (partial / MODEL_CARD).write_text(model_card(content, report))
    write_manifest(partial, content)
    earlier = out.with_name(out.name + EARLIER)
    shutil.rmtree(earlier, ignore_errors=True)
    try:
        if out.exists():
            out.rename(earlier)
        partial.rename(out)
    except BaseException:  # an interruption too
        if earlier.exists() and not out.exists():
            earlier.rename(out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
    return content
