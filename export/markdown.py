"""Text and tables of the documents that go with artefacts. Imports nothing heavy."""

import re
from collections.abc import Iterable, Iterator


def plain(text: str) -> str:
    """`text` in one line, as it reads: names and licences come from files, and are not taken for markup."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return re.sub(r"[\\|<\[\]`]", r"\\\g<0>", line)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a table."""
    header = tuple(header)
    for cells in (header, ("---",) * len(header), *rows):
        yield f"| {' | '.join(map(plain, cells))} |"
