"""What the supervisor knows, as Prometheus text: canaries, restarts, each stage's queue and computing, predictions and
their drift. Triton's own metrics stay at its own /metrics.

Stages come from Triton's statistics API, which counts an execution once, whatever its batch; Triton's metrics count it
for every request in it. Refusals come from the stand-in backends' log, for core 2.51 counts a request that a Python
backend refuses as a success of the stage, and as two failures of the flow; native backends count their own.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from scaphoid.export.artefacts import ManifestError, read_manifest
from scaphoid.triton_repo.monitoring.drift import STEPS, JournalReader, Watched, references_of
from scaphoid.triton_repo.supervisor.api import TritonApi
from scaphoid.triton_repo.supervisor.health import FAULTS, Health
from scaphoid.triton_repo.versioning import versions
from scaphoid.triton_repo.versioning.versions import weights_hash

MODEL = ("model", "version")
COMPUTE = ("compute_input", "compute_infer", "compute_output")


class SupervisorCollector(Collector):
    """Asks and reads anew for every scrape."""

    def __init__(self, health: Health, api: TritonApi, repository: Path, journals: JournalReader) -> None:
        self._health, self._api, self._repository, self._journals = health, api, repository, journals
        self._reading = threading.Lock()

    def text(self) -> bytes:
        with self._reading:
            registry = CollectorRegistry()
            registry.register(self)
            return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._canaries()
        yield from self._stages()
        yield from self._predictions()

    def _canaries(self) -> Iterator[Metric]:
        health, now = self._health, time.monotonic()
        yield GaugeMetricFamily("scaphoid_ready", "1 when every flow answers", float(not health.why_not()))
        answered = GaugeMetricFamily("scaphoid_canary_answered", "1 when the last canary was answered", labels=["flow"])
        latency = GaugeMetricFamily("scaphoid_canary_latency_seconds", "Of the last one that was", labels=["flow"])
        age = GaugeMetricFamily("scaphoid_canary_age_seconds", "Since the last canary", labels=["flow"])
        failures = CounterMetricFamily("scaphoid_canary_failures", "Canaries without an answer", labels=["flow"])
        for flow, last in health.canaries.items():
            answered.add_metric([flow], float(last.answered))
            latency.add_metric([flow], last.latency_s)
            age.add_metric([flow], now - last.at_s)
            failures.add_metric([flow], last.failures)
        yield from (answered, latency, age, failures)
        faults = CounterMetricFamily("scaphoid_faults", "Faults of the server, by kind", labels=["kind"])
        for kind in FAULTS:
            faults.add_metric([kind], health.faults[kind])
        yield faults
        refused = CounterMetricFamily("scaphoid_refused", "Requests that a backend refused", labels=["model", "status"])
        for key, count in health.refused().items():
            refused.add_metric(key, count)
        yield refused
        yield CounterMetricFamily("scaphoid_restarts", "Times that the server was started anew", health.restarts)
        yield GaugeMetricFamily("scaphoid_recovery_seconds", "From the last fault to serving", health.recovery_s)

        version = GaugeMetricFamily("scaphoid_version", "The one that is served", labels=["version", "weights"])
        with suppress(ManifestError, OSError):  # an edited one: everything else is told all the same
            manifest = read_manifest(self._repository)
            version.add_metric([str(manifest.get("version", versions.FIRST)), weights_hash(manifest)], 1)
        yield version

    def _stages(self) -> Iterator[Metric]:
        try:
            models = self._api.statistics()
        except OSError:
            return  # it is being started; scaphoid_ready says so
        executions = CounterMetricFamily("scaphoid_stage_executions", "Batches that a stage ran", labels=MODEL)
        images = CounterMetricFamily("scaphoid_stage_images", "Images that a stage ran", labels=MODEL)
        queue = CounterMetricFamily("scaphoid_stage_queue_seconds", "That requests waited for a stage", labels=MODEL)
        compute = CounterMetricFamily("scaphoid_stage_compute_seconds", "That a stage computed", labels=MODEL)
        for model in models:
            labels, stats = [model["name"], model["version"]], model["inference_stats"]
            executions.add_metric(labels, model["execution_count"])
            images.add_metric(labels, model["inference_count"])
            queue.add_metric(labels, stats["queue"]["ns"] / 1e9)
            compute.add_metric(
                labels, sum(batch[part]["ns"] for batch in model["batch_stats"] for part in COMPUTE) / 1e9
            )
        yield from (executions, images, queue, compute)

    def _predictions(self) -> Iterator[Metric]:
        journals = self._journals
        journals.read()
        lines = CounterMetricFamily("scaphoid_predictions", "Lines of the journals", labels=["flow", "status"])
        for key, count in journals.counts.items():
            lines.add_metric(key, count)
        labels = ["flow", "version"]
        spread = HistogramMetricFamily("scaphoid_prediction_probability", "Of abnormal", labels=labels)
        for key, watched in journals.watched.items():
            spread.add_metric(key, buckets(watched), watched.total)
        labels = ["flow", "version", "quantity"]
        index = GaugeMetricFamily("scaphoid_drift_index", "Population stability index", labels=labels)
        limit = GaugeMetricFamily("scaphoid_drift_chance", "Exceeded by chance in 1 of 100", labels=labels)
        try:
            references = references_of(versions.contents(self._repository))
        except (ManifestError, OSError):  # `scaphoid-serve drift` says which
            references = {}
        for drift in journals.drifts(references):
            index.add_metric([drift.flow, drift.version, drift.quantity], drift.index)
            limit.add_metric([drift.flow, drift.version, drift.quantity], drift.chance)
        yield from (lines, spread, index, limit)


def buckets(watched: Watched) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    total, found = 0, []
    for step in STEPS:
        total += watched.probabilities[step]
        found.append((f"{step:g}", total))
    return [*found, ("+Inf", total)]
