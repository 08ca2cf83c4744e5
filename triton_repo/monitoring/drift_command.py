"""`scaphoid-serve drift`: the journals' predictions beside what the model answered on the images of its gate.

scaphoid-serve drift repository predictions/*/predictions.jsonl
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from scaphoid.export.artefacts import ManifestError
from scaphoid.trainer.journal import weights_of
from scaphoid.triton_repo.monitoring.drift import WINDOW, JournalReader, references_of
from scaphoid.triton_repo.versioning.versions import contents


@dataclass(frozen=True)
class Arguments:
    """Have the radiographs changed? The latest predictions in journals beside the model's own on the images of its
    export's gate. Export with --gate-data: beside phantoms every hospital differs."""

    repository: tyro.conf.Positional[Path]
    """The model repository whose versions answered."""
    journals: tyro.conf.Positional[tuple[Path, ...]]
    """predictions.jsonl files."""
    json: bool = False
    """Print JSON."""


def main(words: list[str]) -> None:
    arguments = tyro.cli(Arguments, prog="scaphoid-serve drift", args=words)
    if missing := [path for path in arguments.journals if not path.is_file()]:
        sys.exit(f"scaphoid-serve drift: {missing[0]} is not a file: expected predictions.jsonl of scaphoid-predict")
    try:
        known = contents(arguments.repository)
    except (ManifestError, OSError) as error:
        sys.exit(f"scaphoid-serve drift: {error}")
    if not known:
        sys.exit(f"scaphoid-serve drift: {arguments.repository} is not a model repository: assemble one first")
    references = references_of(known)
    reader = JournalReader(arguments.journals)
    reader.read()
    if unknown := [key for key in reader.watched if (key[0], weights_of(key[1])) not in references]:
        flow, version = unknown[0]
        print(f"no reference for {flow} {version} in {arguments.repository}: left out", file=sys.stderr)
    drifts = reader.drifts(references)
    if not drifts:
        sys.exit("scaphoid-serve drift: no prediction of a version in this repository; is it the right one?")
    if arguments.json:
        print(json.dumps([asdict(each) | {"verdict": each.verdict} for each in drifts], indent=2))
        return
    images = [each.get("parity", {}).get("images", {}) for each in known]
    origin = ", ".join(dict.fromkeys(each["origin"] for each in images if "origin" in each))
    table = Table(*("flow", "version", "quantity", "predictions", "index", "by chance", ""))
    for each in drifts:
        cells = (str(each.predictions), f"{each.index:.3f}", f"{each.chance:.3f}", each.verdict)
        table.add_row(each.flow, each.version, each.quantity, *cells)
    console = Console()
    console.print(table)
    console.print(
        f"Population stability index of the latest {WINDOW} predictions against {origin}; `by chance`: exceeded"
    )
    console.print("in 1 of 100 cases without any change. Above that, 0.1 is worth a look and 0.25 a drift.")


if __name__ == "__main__":
    main(sys.argv[1:])
