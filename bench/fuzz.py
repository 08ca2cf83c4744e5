"""Fuzzes the real Triton server: damaged radiographs and malformed requests between good ones.

No damage may crash a process, hang, or change a good neighbour's answer, and what is refused must say why. A case that
is found here can be had again by its number: `mutations.mutant(number)`, `malformed.malformed(..., number)`.
"""

import asyncio
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scaphoid.bench.malformed import Target, malformed
from scaphoid.bench.mutations import PATIENT, encode, mutant, originals, picture
from scaphoid.bench.peaks import machine
from scaphoid.bench.report import Report, Table
from scaphoid.trainer.data.guard import RejectedImage
from scaphoid.triton_repo.client import AsyncClient, ClientError, Outputs, Quarantined, RequestRejected
from scaphoid.triton_repo.inputs import load_image
from scaphoid.triton_repo.supervisor.process import children
from scaphoid.triton_repo.supervisor.server import Server, running_server

IN_FLIGHT = 8
GOOD_SHARE, MALFORMED_SHARE = 0.25, 0.1  # good requests are on top of the cases, malformed ones among them
TIMEOUT_S = 60.0
RTOL = ATOL = 2e-3  # fp32 sums depend on what else is in the batch
NO_REASON = re.compile(r"Traceback|\bat 0x|server error INTERNAL|server error UNKNOWN")
ERROR_LENGTH = 300
Stored = dict[str, dict[str, np.ndarray]]  # flow -> output -> value


@dataclass(frozen=True)
class Fuzz:
    """Fuzz a server that is started for it: damaged images, DICOM files and malformed requests, between good ones."""

    repository: Path
    """Model repository; a tiny backbone makes it count in cases."""
    cases: int = 10_000
    seed: int = 1
    out: Path = Path("runs/bench/fuzz")
    """Folder for the report."""
    name = "fuzz"


@dataclass
class Findings:
    """`problems` has a line for everything that must not be; the counts tell what there was to find it in."""

    good: int = 0
    answered: Counter[str] = field(default_factory=Counter)  # damaged, and readable all the same; by format
    refused: Counter[str] = field(default_factory=Counter)  # by reason, numbers left out
    by: Counter[str] = field(default_factory=Counter)  # who refused
    malformed: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def fuzz(arguments: Fuzz) -> Report:
    """Start a server, fuzz it. Raises ManifestError, ServerError, OSError and ValueError."""
    if arguments.cases < 1:
        raise ValueError("fuzz: expected one case or more")
    here = machine()
    with running_server(arguments.repository) as server:
        found = asyncio.run(fuzz_server(server, arguments.cases, arguments.seed))
    return report(arguments, found, here)


async def fuzz_server(server: Server, cases: int, seed: int) -> Findings:
    """`cases` numbered from `seed` * 10 million, IN_FLIGHT at once, over gRPC, HTTP and every flow."""
    found, numbers = Findings(), iter(range(seed * 10_000_000, seed * 10_000_000 + cases))
    processes, began = _processes(server), time.monotonic()
    running: set[int] = set()
    clients = [
        AsyncClient(url, flow, timeout_s=TIMEOUT_S, in_flight=IN_FLIGHT)
        for flow in server.flows
        for url in (server.grpc_url, f"http://{server.http_url}")
    ]
    for client in clients:
        await client.__aenter__()
    try:
        good = await _good(clients)
        target = Target(server.http_url, server.grpc_url, server.flows[0], good[0][0])
        expected = float(good[0][1][server.flows[0]]["probability"].item())

        async def worker() -> None:
            for number in numbers:
                if server.process.exit_code is not None:
                    return
                running.add(number)
                rng = random.Random(-number)
                client = rng.choice(clients)
                if rng.random() < GOOD_SHARE:
                    await _ask_good(client, *rng.choice(good), found)
                if rng.random() < MALFORMED_SHARE:
                    await _send_malformed(target, expected, number, found)
                else:
                    await _ask_damaged(client, number, found)
                if server.process.exit_code is not None:
                    found.problems.append(f"the server ended while cases {sorted(running)} were in flight")
                running.discard(number)

        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
        if server.process.exit_code is None:
            for client in clients:
                await _ask_good(client, *good[0], found)
    finally:
        for client in clients:
            await client.__aexit__()
    if (now := _processes(server)) != processes:
        found.problems.append(f"processes ended: {sorted(processes - now)} of {len(processes)}")
    found.seconds = time.monotonic() - began
    return found


def _processes(server: Server) -> set[int]:
    return {server.pid, *children(server.pid)}


async def _good(clients: Sequence[AsyncClient]) -> list[tuple[bytes, Stored]]:
    """Sound files of every format, and what each flow answers while nothing else is asked."""
    files = [encode(picture(seed, (90 + 10 * seed, 70 + 9 * seed)), "PNG") for seed in range(4)]
    files += [load_image(data).encoded for data in originals().values()]
    flows = {client.flow: client for client in clients}
    return [(data, {flow: (await client.infer(data)).tensors for flow, client in flows.items()}) for data in files]


async def _ask_good(client: AsyncClient, encoded: bytes, stored: Stored, found: Findings) -> None:
    found.good += 1
    try:
        tensors = (await client.infer(encoded)).tensors
    except ClientError as error:
        found.problems.append(f"a good image was not answered by {client.flow}: {type(error).__name__}: {error}")
        return
    for name, value in stored[client.flow].items():
        if not np.allclose(tensors[name], value, rtol=RTOL, atol=ATOL):
            found.problems.append(f"a good image was answered wrongly by {client.flow}: {name}")


async def _ask_damaged(client: AsyncClient, number: int, found: Findings) -> None:
    case = mutant(number)
    encoded, by = case.encoded, "server"
    try:
        if case.is_dicom and number % 4:  # every fourth DICOM file goes to the server, which takes none
            by = "client"
            encoded = (await asyncio.to_thread(load_image, case.encoded)).encoded
            by = "server"
        outputs = await client.infer(encoded)
    except (RejectedImage, RequestRejected) as error:
        found.by[by] += 1
        found.refused[re.sub(r"-?\d+", "N", str(error))] += 1
        if problem := _unclear(str(error)):
            found.problems.append(f"case {number} ({case.what}): {problem}: {str(error)[:ERROR_LENGTH]!r}")
    except Quarantined:
        found.by["quarantine"] += 1
    except ClientError as error:
        found.problems.append(f"case {number} ({case.what}): {type(error).__name__}: {error}")
    else:
        found.answered[case.what.partition(":")[0]] += 1
        if problem := _implausible(outputs):
            found.problems.append(f"case {number} ({case.what}): {problem}")


def _unclear(error: str) -> str:
    """What is wrong with an error message, if anything is."""
    if not error.strip() or NO_REASON.search(error):
        return "refused without a reason"
    if "\n" in error or len(error) > ERROR_LENGTH or not error.isprintable():
        return "refused in more than a line of text"
    if PATIENT.partition("^")[0] in error:
        return "refused with the patient's name"
    if "cannot be read (" in error:
        return "refused by an exception that nobody expected"
    return ""


def _implausible(outputs: Outputs) -> str:
    """What cannot be in an answer, if something is."""
    tensors = outputs.tensors
    if not all(np.isfinite(value).all() for value in tensors.values()):
        return "answered with a number that is not finite"
    if any(not 0 <= value.item() <= 1 for name, value in tensors.items() if name.endswith("probability")):
        return "answered with a probability beyond 0 and 1"
    x0, y0, x1, y1 = tensors["box"]
    return "" if 0 <= x0 < x1 and 0 <= y0 < y1 else "answered with an empty box"


async def _send_malformed(target: Target, expected: float, number: int, found: Findings) -> None:
    try:
        back = await asyncio.to_thread(malformed, target, number)
    except OSError as error:
        found.problems.append(f"case {number}: the server cannot be reached any more ({error})")
        return
    if back.probability is not None:
        found.malformed[back.what, "answered as if it were sound"] += 1
        if not math.isclose(back.probability, expected, abs_tol=ATOL):
            found.problems.append(f"case {number} ({back.what}): answered wrongly")
        return
    found.malformed[back.what, re.sub(r"\d+", "N", back.reason)[:100]] += 1
    if not back.reason.strip():
        found.problems.append(f"case {number} ({back.what}): no answer and no reason")


def report(arguments: Fuzz, found: Findings, here: object) -> Report:
    answered, refused, requests = found.answered.total(), found.refused.total(), found.malformed.total()
    conclusions = (
        f"{len(found.problems)} problems in {arguments.cases:,} cases of seed {arguments.seed}, {found.seconds:.0f} s",
        f"{answered:,} damaged images could still be read and were answered, {refused:,} were refused with a reason "
        f"({found.by['client']:,} DICOM files by the client), {requests:,} malformed requests",
        f"{found.good:,} good images between them, every answer compared with the stored one",
        *found.problems[:20],
    )
    tables = (
        Table("Answered, by format", ("format", "answered (files)"), tuple(found.answered.most_common())),
        Table("Refused, by reason", ("reason", "refused (files)"), tuple(found.refused.most_common())),
        Table(
            "Malformed requests",
            ("request", "what came back", "times (requests)"),
            tuple((what, reason, count) for (what, reason), count in sorted(found.malformed.items())),
        ),
    )
    subject = {"repository": arguments.repository.name, "cases": arguments.cases, "seed": arguments.seed}
    missed = ("problems found by fuzzing",) if found.problems else ()
    return Report("Fuzzing the server", subject, conclusions, here, None, tables, missed)
