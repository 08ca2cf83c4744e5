"""A benchmark's report: markdown to read and JSON to compare, with the machine, versions and commit in each.

A column of numbers has its unit in its name, `p50 (ms)`; a table without one is refused.
"""

import json
import math
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from scaphoid.bench.peaks import Machine, Peaks
from scaphoid.export.artefacts import versions

UNIT = re.compile(r".+ \(\S.*\)$")
FORMAT = 1

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """`rows` of cells under `columns`; None is a value that does not exist, shown as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(self.columns)} columns, but a row has {len(row)} cells: {row}")
            for column, cell in zip(self.columns, row, strict=True):
                if isinstance(cell, int | float) and not UNIT.match(column):
                    raise ValueError(f"{self.title}: column {column!r} holds {cell!r}, so name its unit: 'p50 (ms)'")

    def markdown(self) -> str:
        numbers = [any(isinstance(row[place], int | float) for row in self.rows) for place in range(len(self.columns))]
        lines = [
            "| " + " | ".join(self.columns) + " |",
            "|" + "|".join("---:" if number else "---" for number in numbers) + "|",
            *("| " + " | ".join(map(shown, row)) + " |" for row in self.rows),
        ]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"

    def records(self) -> list[dict[str, Cell]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def shown(cell: Cell) -> str:
    """A cell as text: three digits that count, or all before the point."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    digits = 0 if cell == 0 else max(0, 2 - math.floor(math.log10(abs(cell))))
    return f"{cell:,.{digits}f}"


@dataclass(frozen=True)
class Report:
    """`subject` says what was measured; `facts` what else a reader must know, a line each. A report of what was not
    measured has no `machine` and no `peaks`. `missed` are the bars that were not reached, a line each."""

    title: str
    subject: dict[str, Cell]
    facts: tuple[str, ...]
    machine: Machine | None
    peaks: Peaks | None
    tables: tuple[Table, ...]
    missed: tuple[str, ...] = ()

    @property
    def all_tables(self) -> tuple[Table, ...]:
        return (*self.tables, peaks_table(self.peaks)) if self.peaks else self.tables

    def markdown(self) -> str:
        subject = [f"- {name}: {shown(value)}" for name, value in self.subject.items()]
        made = [
            f"- {'measured' if self.machine else 'made'} {now()}, commit {commit()}",
            "- " + ", ".join(f"{name} {value}" for name, value in software().items()),
        ]
        facts = [f"- {fact}" for fact in (*(f"MISSED: {line}" for line in self.missed), *self.facts)]
        parts = [f"# {self.title}\n", "\n".join([*subject, *facts]) + "\n"]
        parts += [table.markdown() for table in self.all_tables]
        hardware = machine_lines(self.machine) if self.machine else []
        return "\n".join([*parts, "## Machine and versions\n", "\n".join([*hardware, *made]) + "\n"])

    def json(self) -> str:
        content = {
            "format": FORMAT,
            "title": self.title,
            "measured": now(),
            "commit": commit(),
            "versions": software(),
            "subject": self.subject,
            "facts": self.facts,
            "missed": self.missed,
            "machine": asdict(self.machine) if self.machine else None,
            "tables": {table.title: table.records() for table in self.all_tables},
        }
        return json.dumps(content, indent=2) + "\n"

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """`name`.md and `name`.json in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        markdown, data = folder / f"{name}.md", folder / f"{name}.json"
        markdown.write_text(self.markdown())
        data.write_text(self.json())
        return markdown, data


def machine_lines(machine: Machine) -> list[str]:
    return [
        f"- CPU: {machine.cpu}, {machine.cores} cores, {shown(machine.memory_gib)} GiB memory",
        f"- instructions: {', '.join(machine.instructions) or 'unknown'}; engine precisions: "
        f"{', '.join(machine.engine_precisions)}; {machine.precision_note}",
        f"- load average in the minute before: {shown(machine.load_1min)} tasks",
    ]


def peaks_table(peaks: Peaks) -> Table:
    rows: list[tuple[Cell, ...]] = [
        *((f"matrix product, {name}", value, None) for name, value in peaks.gflops.items()),
        ("memory copy, read and write", None, peaks.copy_gb_per_s),
    ]
    for each in peaks.bandwidths:
        threads = f"{each.threads} thread" + "s" * (each.threads > 1)
        rows.append((f"memory read, {threads}", None, each.read_gb_per_s))
        rows.append((f"memory copy, read and write, {threads}", None, each.copy_gb_per_s))
    return Table("Measured peaks of the machine", ("what", "arithmetic (GFLOPS)", "memory (GB/s)"), tuple(rows))


def software() -> dict[str, str]:
    return {"Python": platform.python_version()} | versions()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def commit() -> str:
    """The commit of the sources that run, and whether they were changed since; `unknown` outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", here, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (", with local changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
