"""A long mixed load on the real Triton server: every good answer is compared with a stored one, every bad file must be
refused, and what the server holds (memory, descriptors, shared memory) must not grow.

The encoders are tiny, so that it counts in requests: what is under test is the server, not a network.
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from scaphoid.bench.comparison import phantoms, tell
from scaphoid.bench.peaks import machine
from scaphoid.bench.processes import Held, held, rss_by_name, shared_files
from scaphoid.bench.report import Report
from scaphoid.bench.server_load import LoadError
from scaphoid.bench.soak_images import Good, bad_images, differences, good_images
from scaphoid.bench.soak_report import ACCEPTED, LOST, REFUSED, RIGHT, WRONG, Account, judge, report_of
from scaphoid.export.export import export
from scaphoid.trainer.flows import FLOWS
from scaphoid.triton_repo.assemble import assemble
from scaphoid.triton_repo.client import AsyncClient, ClientError, RequestRejected
from scaphoid.triton_repo.supervisor.process import SHARED_MEMORY_PREFIX
from scaphoid.triton_repo.supervisor.server import Server, running_server

TINY = "test_resnet"  # timm's smallest: 0.5 million parameters
REQUEST_TIMEOUT_S = 60.0
CANARY_INTERVAL_S = 10.0
REQUEST_REFUSED = "request_refused"  # what the server tells of every bad file


@dataclass(frozen=True)
class Soak:
    """Soak the real server: clients in a closed loop, good and bad images, three ensembles, every answer compared."""

    minutes: float = 30.0
    """Length of the load; a fifth of it, 5 minutes at most, is warm-up for what is said of memory."""
    clients: int = 8
    """Requests in flight."""
    bad_share: float = 0.1
    """Share of the requests that carry a file which must be refused."""
    samples: int = 180
    """How often memory, descriptors and shared memory are looked at."""
    seed: int = 5
    out: Path = Path("runs/bench/soak")
    """Folder for artefacts, model repository, images and the report."""

    @property
    def name(self) -> str:
        """Of the report."""
        return "soak"


class Retries(logging.Handler):
    """Counts what the client logs when it tries a request again."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1

    def __enter__(self) -> "Retries":
        logging.getLogger("scaphoid.client").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("scaphoid.client").removeHandler(self)


def soak(arguments: Soak) -> Report:
    """Export, serve, load, judge. A bar that is missed is named in the report's `missed`. Raises ValueError,
    ManifestError, ServerError, LoadError and OSError."""
    if not 0 < arguments.minutes < 24 * 60 or not 0 <= arguments.bad_share < 1 or arguments.clients < 1:
        raise ValueError("soak: expected more than 0 minutes, a --bad-share of 0 to below 1 and a client or more")
    here = machine()
    images = phantoms(arguments.out / "phantoms")
    prepare(arguments.out)
    tell("answering in process what the server will be asked")
    good = good_images(arguments.out / "artefacts", tuple(FLOWS), images[:8], arguments.seed)
    if not good:
        raise LoadError("no image's answer is the same alone and in a batch: nothing to compare the server with")
    bad = bad_images(images[0])
    events: list[str] = []

    def report(line: str, event: str = "", **_: object) -> None:
        if event != REQUEST_REFUSED:
            events.append(line)

    tell("starting Triton")
    repository = arguments.out / "repository"
    with running_server(repository, tuple(FLOWS), watch_interval_s=CANARY_INTERVAL_S, report=report) as server:
        started = len(events)
        tell(f"{arguments.clients} clients, {len(good)} good and {len(bad)} bad files, {arguments.minutes:g} minutes")
        with Retries() as retries:
            account, samples = asyncio.run(load(server, arguments, good, bad))
        account.tried_again = retries.count
        names = rss_by_name(server.pid)
    left = len(shared_files(own_prefix()))
    verdict = judge(account, samples, left, events[started:])
    subject = {
        "flows": ", ".join(FLOWS),
        "networks": f"untrained {TINY}, 224 pixels, OpenVINO f32",
        "load": f"{arguments.clients} clients, each with one request in flight, {arguments.minutes:g} minutes",
        "input": f"PNG, JPEG and PGM phantoms; {100 * arguments.bad_share:g} % of the requests carry a bad file",
    }
    return report_of(subject, 60 * arguments.minutes, here, account, samples, names, verdict)


def prepare(out: Path) -> None:
    """Artefacts and model repository of all flows on untrained, tiny networks; taken again where they exist."""
    if (out / "repository" / "manifest.json").is_file():
        return
    import torch

    from scaphoid.trainer.checkpoint import save_model
    from scaphoid.trainer.models.kalm import Kalm, KalmConfig
    from scaphoid.trainer.models.msfm import Msfm, MsfmConfig

    tell("exporting tiny untrained models")
    torch.manual_seed(0)
    weights = [out / "msfm.safetensors", out / "kalm.safetensors"]
    save_model(weights[0], Msfm(MsfmConfig(TINY, image_size=224, part_size=112)))
    save_model(weights[1], Kalm(KalmConfig(TINY, image_size=224, key_size=112)))
    export(weights, out / "artefacts", images=2, accept="untrained: the server alone is under test")
    assemble(out / "artefacts", out / "repository")


def own_prefix() -> str:
    """Of the names of the shared memory of servers that this process supervises."""
    return f"{SHARED_MEMORY_PREFIX}{os.getpid()}-"


async def load(
    server: Server, arguments: Soak, good: Sequence[Good], bad: Mapping[str, bytes]
) -> tuple[Account, list[Held]]:
    """The load, and a sample of what the server holds every so often."""
    account = Account()
    began = time.monotonic()
    end = began + 60 * arguments.minutes
    async with AsyncExitStack() as stack:
        users = []
        for number in range(arguments.clients):
            connections = {
                name: await stack.enter_async_context(AsyncClient(server.grpc_url, name, timeout_s=REQUEST_TIMEOUT_S))
                for name in FLOWS
            }
            generator = random.Random(arguments.seed * 1000 + number)
            users.append(user(connections, generator, arguments.bad_share, good, bad, end, account))
        sampler = asyncio.create_task(sample(server, began, 60 * arguments.minutes / arguments.samples))
        await asyncio.gather(*users)
        sampler.cancel()
        return account, (await asyncio.gather(sampler, return_exceptions=True))[0]


async def user(
    connections: Mapping[str, AsyncClient],
    generator: random.Random,
    bad_share: float,
    good: Sequence[Good],
    bad: Mapping[str, bytes],
    end: float,
    account: Account,
) -> None:
    """One client: a request after the other, to any flow, until `end`."""
    while time.monotonic() < end:
        flow = generator.choice(list(connections))
        sent = time.perf_counter()
        if generator.random() < bad_share:
            name = generator.choice(list(bad))
            await ask_bad(connections[flow], flow, name, bad[name], account)
        else:
            await ask_good(connections[flow], flow, generator.choice(good), account)
        account.latencies_ms.append(1e3 * (time.perf_counter() - sent))


async def ask_good(connection: AsyncClient, flow: str, image: Good, account: Account) -> None:
    try:
        off = differences((await connection.infer(image.encoded)).tensors, image.answers[flow])
        outcome, fault = (WRONG, f"outputs {', '.join(off)} differ") if off else (RIGHT, "")
    except ClientError as error:
        outcome, fault = LOST, str(error)
        await asyncio.sleep(0.2)  # a server that is away refuses at once: no busy loop
    account.good[flow, outcome] += 1
    if fault:
        account.faults.setdefault(f"good image {outcome} by {flow}", fault)


async def ask_bad(connection: AsyncClient, flow: str, name: str, encoded: bytes, account: Account) -> None:
    try:
        await connection.infer(encoded)
        outcome, fault = ACCEPTED, "was answered"
    except RequestRejected:
        outcome, fault = REFUSED, ""
    except ClientError as error:
        outcome, fault = LOST, str(error)
        await asyncio.sleep(0.2)
    account.bad[flow, outcome] += 1
    if fault:
        account.faults.setdefault(f"bad file ({name}) {outcome} by {flow}", fault)


async def sample(server: Server, began: float, interval_s: float) -> list[Held]:
    """What the server holds, every `interval_s` until cancelled."""
    samples: list[Held] = []
    try:
        while True:
            await asyncio.sleep(interval_s)
            samples.append(held(server.pid, own_prefix(), time.monotonic() - began))
    except asyncio.CancelledError:
        return samples
