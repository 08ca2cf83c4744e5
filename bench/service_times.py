"""How long each stage of a served flow takes, alone on the machine, by batch: what the queueing simulation is fed with.

An ensemble takes one image a request, so larger batches are made by asking its members one after the other, as the
flow's table wires them, for several copies of an image; the server's own statistics then give each stage's time by
batch. Needs numpy and tritonclient only.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tritonclient.grpc as triton

from scaphoid.bench.queueing import UNLIMITED, Station, Step, linear, open_loop, route_of
from scaphoid.trainer.contracts import ENCODED, STAGES, Stage
from scaphoid.trainer.flows import FLOWS

WIRE = "wire"  # gRPC, the hops of the ensemble, the client
CORES = "cores"

Times = dict[int, tuple[int, float]]
"""By batch: executions, and their seconds together."""


@dataclass(frozen=True)
class StageTime:
    """An execution takes `fixed_s` and `image_s` for each image of its batch, fitted to `measured_s` by batch."""

    fixed_s: float
    image_s: float
    measured_s: Mapping[int, float]
    max_batch: int
    instances: int

    def of(self, batch: int) -> float:
        return self.fixed_s + self.image_s * batch


@dataclass(frozen=True)
class ServiceTimes:
    """Of one flow: its stages, the rest of a request (`wire_s`), the latencies of one request after the other that they
    were taken from, which also say how much a time spreads, and how many cores an encoder keeps busy while it runs."""

    flow: str
    stages: Mapping[str, StageTime]
    alone_ms: tuple[float, ...]
    encoder_cores: float
    wire_s: float = 0.0

    @property
    def mean_alone_s(self) -> float:
        return float(np.mean(self.alone_ms)) / 1e3

    @property
    def spread(self) -> tuple[float, ...]:
        """Factors on a service time: the latencies alone over their mean."""
        return tuple(each / (1e3 * self.mean_alone_s) for each in self.alone_ms)

    def network(self, wanted: Sequence[str], cores: int) -> tuple[list[Station], tuple[Step, ...], dict[str, float]]:
        """Stations, route and resources for the simulation; whatever is no encoder runs on one core."""
        stations = [Station(WIRE, linear(0, self.wire_s), CORES, instances=UNLIMITED)]
        for name, each in self.stages.items():
            threads = min(cores, self.encoder_cores) if STAGES[name].kind == "encoder" else 1
            work = linear(each.fixed_s, each.image_s, self.spread)
            stations.append(Station(name, work, CORES, threads, each.instances, each.max_batch))
        return stations, route_of(FLOWS[self.flow], wanted, (WIRE,)), {CORES: float(cores)}


def service_times(
    url: str,
    flow: str,
    wanted: Sequence[str],
    images: Sequence[bytes],
    batches: Sequence[int],
    repeats: int,
    cpu_s: Callable[[], float],
) -> ServiceTimes:
    """Ask the server at `url` (gRPC) for `repeats` answers of the ensemble, one request at a time, and its members for
    a fifth of that at each of `batches`; those above a model's largest are left out. `cpu_s` gives the seconds that the
    server's processes have used so far. Raises InferenceServerException when a request fails."""
    with triton.InferenceServerClient(url) as server:
        names = [step.stage.name for step in FLOWS[flow].steps_for(wanted)]
        configs = {name: server.get_model_config(name).config for name in dict.fromkeys(names)}
        outputs = [triton.InferRequestedOutput(name) for name in wanted]

        def whole(number: int) -> None:
            server.infer(flow, [_input(ENCODED.name, ENCODED.dtype, _tiled(images, number, 1))], outputs=outputs)

        members = {name: _member(server, STAGES[name]) for name in configs}
        whole(0)
        used_s = cpu_s()
        found, alone_ms = _measured(server, 1, repeats, whole)
        used_s = (cpu_s() - used_s) / (repeats + 1)
        times = {name: {1: found[name]} for name in configs}
        for batch in batches:
            if 1 < batch <= min(config.max_batch_size for config in configs.values()):

                def chained(number: int, batch: int = batch) -> None:
                    FLOWS[flow].run(members, {ENCODED.name: _tiled(images, number, batch)}, wanted)

                found, _ = _measured(server, batch, max(8, repeats // 5), chained)
                for name in configs:
                    times[name][batch] = found[name]
    stages = {
        name: StageTime(*_line(by_batch), by_batch, configs[name].max_batch_size, _instances(configs[name]))
        for name, by_batch in times.items()
    }
    encoders_s = sum(times[name][1] for name in names if STAGES[name].kind == "encoder")
    others_s = sum(times[name][1] for name in names) - encoders_s
    without_wire = ServiceTimes(flow, stages, tuple(alone_ms), max(1.0, (used_s - others_s) / encoders_s))
    return replace(without_wire, wire_s=max(0.0, without_wire.mean_alone_s - _idle_s(without_wire, wanted)))


def _idle_s(times: ServiceTimes, wanted: Sequence[str]) -> float:
    """What one request takes through the stages alone, by the simulation: some of them run side by side."""
    plain = replace(times, alone_ms=(1.0,))
    stations, route, resources = plain.network(wanted, UNLIMITED)
    return float(open_loop(stations, route, resources, [0.0]).latencies_s[0])


def _measured(server, batch: int, repeats: int, ask: Callable[[int], None]) -> tuple[dict[str, float], list[float]]:
    """Seconds of an execution of `batch`, by model, and ms of each call of `ask`; the first is a warm-up, in which an
    engine compiles for a new batch."""
    ask(0)
    before, latencies_ms = _times(server), []
    for number in range(repeats):
        began = time.perf_counter()
        ask(number)
        latencies_ms.append(1e3 * (time.perf_counter() - began))
    found = {}
    for name, times in _times(server).items():
        (count, seconds), (earlier, earlier_s) = times.get(batch, (0, 0.0)), before.get(name, {}).get(batch, (0, 0.0))
        if count > earlier:
            found[name] = (seconds - earlier_s) / (count - earlier)
    return found, latencies_ms


def _member(server, stage: Stage) -> Callable[..., tuple[np.ndarray, ...]]:
    """A model of the repository as a function of its stage's tensors."""
    outputs = [triton.InferRequestedOutput(tensor.name) for tensor in stage.outputs]

    def call(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        inputs = [_input(tensor.name, tensor.dtype, array) for tensor, array in zip(stage.inputs, arrays, strict=True)]
        answer = server.infer(stage.name, inputs, outputs=outputs)
        return tuple(answer.as_numpy(tensor.name) for tensor in stage.outputs)

    return call


def _input(name: str, dtype: str, array: np.ndarray) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), dtype)
    tensor.set_data_from_numpy(array)
    return tensor


def _tiled(images: Sequence[bytes], number: int, batch: int) -> np.ndarray:
    return np.tile(np.frombuffer(images[number % len(images)], np.uint8), (batch, 1))


def _times(server) -> dict[str, Times]:
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


def _line(times: Mapping[int, float]) -> tuple[float, float]:
    """Fixed and per image, both at least 0, through the times by batch; one batch alone is all per image."""
    sizes, seconds = np.array(list(times), np.float64), np.array(list(times.values()))
    if len(sizes) < 2:
        return 0.0, float(seconds[0] / sizes[0])
    slope, fixed = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    if fixed < 0:
        return 0.0, float(np.mean(seconds / sizes))
    return (float(fixed), float(slope)) if slope > 0 else (float(np.mean(seconds)), 0.0)


def _instances(config) -> int:
    return max(1, sum(group.count for group in config.instance_group))
