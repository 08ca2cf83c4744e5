"""How long each stage of a served flow takes, alone on the machine, by batch, and how many cores it keeps busy: what
the queueing simulation is fed with.

An ensemble takes one image a request, so larger batches are made by asking its members one after the other, as the
flow's table wires them, for several copies of an image; the server's own statistics then give each stage's time by
batch. A model of the CPU repository has a process of its own, whose CPU time is the stage's; what the server itself and
the client use belongs to every request. Needs numpy and tritonclient only.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tritonclient.grpc as triton

from scaphoid.bench.chained import as_input, chain
from scaphoid.bench.queueing import UNLIMITED, Station, Step, linear, open_loop, route_of
from scaphoid.bench.timing import session_processes
from scaphoid.trainer.contracts import ENCODED
from scaphoid.trainer.flows import FLOWS

WIRE = "wire"  # of a request's latency, what no stage accounts for: gRPC, the hops of the ensemble, the client
BESIDE = "beside"  # what server and client compute while the stages do
CORES = "cores"

Totals = dict[str, dict[int, tuple[int, float]]]
"""By model and batch: executions, and their seconds together."""


@dataclass(frozen=True)
class Execution:
    """Mean of one batch size: seconds, and seconds of all cores together."""

    seconds: float
    core_s: float


@dataclass(frozen=True)
class Line:
    """`fixed` + `image` for each image of a batch."""

    fixed: float
    image: float

    def of(self, batch: int) -> float:
        return self.fixed + self.image * batch


@dataclass(frozen=True)
class StageTime:
    """Of one model, by batch."""

    measured: Mapping[int, Execution]
    max_batch: int
    instances: int

    @property
    def seconds(self) -> Line:
        return _line({batch: each.seconds for batch, each in self.measured.items()})

    @property
    def core_s(self) -> Line:
        return _line({batch: each.core_s for batch, each in self.measured.items()})

    def threads(self, batch: int) -> float:
        """Cores that an execution keeps busy while it runs."""
        return self.core_s.of(batch) / self.seconds.of(batch)


@dataclass(frozen=True)
class ServiceTimes:
    """Of one flow: its stages, the latencies of one request after the other that they were taken from, which also say
    how much a time spreads, what of such a latency no stage accounts for, and the core-seconds of a request outside of
    the models' processes."""

    flow: str
    stages: Mapping[str, StageTime]
    alone_ms: tuple[float, ...]
    beside_s: float = 0.0
    wire_s: float = 0.0

    @property
    def mean_alone_s(self) -> float:
        return float(np.mean(self.alone_ms)) / 1e3

    @property
    def spread(self) -> tuple[float, ...]:
        """Factors on a service time: the latencies alone over their mean."""
        return tuple(each / (1e3 * self.mean_alone_s) for each in self.alone_ms)

    def network(self, wanted: Sequence[str], cores: int) -> tuple[list[Station], tuple[Step, ...], dict[str, float]]:
        """Stations, route and resources for the simulation."""
        on_wire_s = min(self.beside_s, self.wire_s)
        share = on_wire_s / self.wire_s if self.wire_s else 0.0
        stations = [
            Station(WIRE, linear(0, self.wire_s), CORES, lambda _: share, UNLIMITED),
            Station(BESIDE, linear(0, self.beside_s - on_wire_s), CORES, instances=UNLIMITED),
        ]
        for name, each in self.stages.items():
            work = linear(each.seconds.fixed, each.seconds.image, self.spread)
            stations.append(Station(name, work, CORES, each.threads, each.instances, each.max_batch))
        route = (*route_of(FLOWS[self.flow], wanted, (WIRE,)), Step(BESIDE))
        return stations, route, {CORES: float(cores)}


def service_times(
    url: str,
    leader: int,
    flow: str,
    wanted: Sequence[str],
    images: Sequence[bytes],
    batches: Sequence[int],
    repeats: int,
) -> ServiceTimes:
    """Ask the server at `url` (gRPC), whose processes are the session of `leader`, for `repeats` answers of the
    ensemble, one request at a time, and its members for a fifth of that at each of `batches`; those above a model's
    largest are left out. Raises InferenceServerException when a request fails."""
    with triton.InferenceServerClient(url) as server:
        names = list(dict.fromkeys(step.stage.name for step in FLOWS[flow].steps_for(wanted)))
        configs = {name: server.get_model_config(name).config for name in names}
        outputs = [triton.InferRequestedOutput(name) for name in wanted]
        members = chain(server, flow, wanted)

        def whole(image: bytes) -> None:
            server.infer(flow, [as_input(ENCODED, np.frombuffer(image, np.uint8)[None])], outputs=outputs)

        found, alone_ms, beside_s = _measured(server, leader, names, images, 1, repeats, whole)
        times = {name: {1: found[name]} for name in names}
        for batch in batches:
            if 1 < batch <= min(config.max_batch_size for config in configs.values()):

                def chained(image: bytes, batch: int = batch) -> None:
                    members([image] * batch)

                found, _, _ = _measured(server, leader, names, images, batch, max(8, repeats // 5), chained)
                for name in names:
                    times[name][batch] = found[name]
    stages = {
        name: StageTime(by_batch, configs[name].max_batch_size, _instances(configs[name]))
        for name, by_batch in times.items()
    }
    without_wire = ServiceTimes(flow, stages, tuple(alone_ms), beside_s)
    return replace(without_wire, wire_s=max(0.0, without_wire.mean_alone_s - _idle_s(without_wire, wanted)))


def _idle_s(times: ServiceTimes, wanted: Sequence[str]) -> float:
    """What one request takes through the stages alone, by the simulation: some of them run side by side."""
    plain = replace(times, alone_ms=(1.0,), beside_s=0.0)
    stations, route, resources = plain.network(wanted, UNLIMITED)
    return float(open_loop(stations, route, resources, [0.0]).latencies_s[0])


def _measured(
    server,
    leader: int,
    names: Sequence[str],
    images: Sequence[bytes],
    batch: int,
    repeats: int,
    ask: Callable[[bytes], None],
) -> tuple[dict[str, Execution], list[float], float]:
    """An execution of `batch`, by model; ms of each call of `ask`; and core-seconds of a call outside of the models.
    The first call is a warm-up, in which an engine compiles for a new batch."""
    ask(images[0])
    before, cores_before, latencies_ms = _totals(server), model_core_s(session_processes(leader), names), []
    own_s = time.process_time()
    for number in range(repeats):
        began = time.perf_counter()
        ask(images[number % len(images)])
        latencies_ms.append(1e3 * (time.perf_counter() - began))
    own_s = time.process_time() - own_s
    after, cores = _totals(server), model_core_s(session_processes(leader), names)
    found = {}
    for name in names:
        (count, seconds), (earlier, earlier_s) = after[name][batch], before.get(name, {}).get(batch, (0, 0.0))
        count, seconds = count - earlier, seconds - earlier_s
        core_s = cores[name] - cores_before[name] if name in cores else seconds
        found[name] = Execution(seconds / count, core_s / count)
    return found, latencies_ms, (own_s + cores[""] - cores_before[""]) / repeats


def model_core_s(processes: Iterable[tuple[Sequence[str], float]], names: Sequence[str]) -> Counter[str]:
    """Seconds of CPU by model, of those that have processes of their own, named by an argument such as `encoder_0_0`;
    those of all other processes under the empty name."""
    found = Counter({"": 0.0})
    for arguments, seconds in processes:
        own = [name for name in names if any(re.fullmatch(rf"{name}(_\d+)+", argument) for argument in arguments)]
        found[own[0] if own else ""] += seconds
    return found


def _totals(server) -> Totals:
    statistics = server.get_inference_statistics()
    return {
        model.name: {
            each.batch_size: (
                each.compute_infer.count,
                (each.compute_input.ns + each.compute_infer.ns + each.compute_output.ns) / 1e9,
            )
            for each in model.batch_stats
        }
        for model in statistics.model_stats
    }


def _line(times: Mapping[int, float]) -> Line:
    """Fixed and per image, both at least 0, through the times by batch; one batch alone is all per image."""
    sizes, seconds = np.array(list(times), np.float64), np.array(list(times.values()))
    if len(sizes) < 2:
        return Line(0.0, float(seconds[0] / sizes[0]))
    slope, fixed = np.polyfit(sizes, seconds, 1, w=1 / np.maximum(seconds, 1e-9))
    if fixed < 0:
        return Line(0.0, float(np.mean(seconds / sizes)))
    return Line(float(fixed), float(slope)) if slope > 0 else Line(float(np.mean(seconds)), 0.0)


def _instances(config) -> int:
    return max(1, sum(group.count for group in config.instance_group))
