"""The last step of an export: what passed the gate takes its place, what failed goes to OUT.rejected."""

import json
import shutil
from pathlib import Path

from scaphoid.export.artefacts import MODEL_CARD, PARITY, PARITY_REPORT, write_manifest
from scaphoid.export.model_card import model_card
from scaphoid.export.parity_report import markdown

REJECTED = ".rejected"
EARLIER = ".earlier"  # for the moment between two renames


class GateError(Exception):
    """An export that differs from eager fp32 by more than the tolerances: where it is, and a line for each output."""


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
    if out.exists():
        out.rename(earlier)
    try:
        partial.rename(out)
    except OSError:
        if earlier.exists():
            earlier.rename(out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
    return content
