"""The few lines about a run on standard output."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scaphoid.triton_repo.report.outcome import Outcome


def summarise(outcome: Outcome, files: Sequence[Path], seconds: float, as_json: bool) -> None:
    """Prints what came out, as a table or as one line of JSON."""
    statuses = Counter(prediction.status for prediction in outcome.predictions)
    verdicts = Counter(study.verdict or "no verdict" for study in outcome.studies)
    if as_json:
        counts = {"images": {status: statuses[status] for status in ("ok", "rejected", "failed")}}
        counts["studies"] = {verdict: verdicts[verdict] for verdict in ("abnormal", "normal", "no verdict")}
        about = {"flow": outcome.flow, "model_version": outcome.model_version, "threshold": outcome.threshold}
        if outcome.band is not None:
            about["triage"] = {"band": list(outcome.band), "first_stage_only": len(outcome.first_stage_only)}
        print(json.dumps({"schema": "scaphoid.summary/1", **about, **counts, "files": [str(path) for path in files]}))
        return
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut leads nowhere
    table.add_row("images", ", ".join(f"{count} {status}" for status, count in statuses.items()))
    table.add_row("studies", ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    version = f" version {outcome.model_version}" if outcome.model_version else ""
    table.add_row("model", f"{outcome.flow}{version}, abnormal at {outcome.threshold:g} or above")
    if outcome.band is not None:
        alone = f"{len(outcome.first_stage_only)} by the first stage alone (outside the band {outcome.band})"
        table.add_row("triage", alone)
        table.add_row("", "those have a probability and no box")
    if outcome.accepted:
        table.add_row("", escape(outcome.accepted))
    if outcome.phantoms:
        table.add_row("", f"trained on drawn phantoms (generator {outcome.phantoms}), never on a patient")
    table.add_row("", "research use only; not a medical device")
    table.add_row("time", f"{seconds:.1f} s")
    for path in files:
        table.add_row("", shown(str(path)))
    Console(highlight=False, soft_wrap=True).print(table)


def shown(text: str) -> str:
    """Text from outside, fit for a terminal: no control characters, no half characters, no markup."""
    printable = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return escape(printable)
