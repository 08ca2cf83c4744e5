"""What the supervisor and Triton tell Prometheus, and that the dashboard asks for nothing else."""

import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

import scaphoid.triton_repo.monitoring.metrics
from scaphoid.export.artefacts import MANIFEST
from scaphoid.trainer.journal import Prediction
from scaphoid.triton_repo.monitoring.drift import JournalReader
from scaphoid.triton_repo.monitoring.metrics import SupervisorCollector
from scaphoid.triton_repo.supervisor.api import TritonApi
from scaphoid.triton_repo.supervisor.canary import IMAGE
from scaphoid.triton_repo.supervisor.health import FAULTS, Health
from scaphoid.triton_repo.supervisor.ports import free_ports
from scaphoid.triton_repo.supervisor.server import running_server
from scaphoid.triton_repo.versioning.versions import CONTENT, VERSIONS, begin, weights_hash

DASHBOARD = Path(scaphoid.triton_repo.monitoring.metrics.__file__).parents[1] / "deploy" / "grafana.json"
METRIC = re.compile(r"\b(?:nv|scaphoid)_[a-z_]+")
SELECTED = re.compile(r"\b((?:nv|scaphoid)_[a-z_]+)\{([^}]*)\}")


def parsed(text: str) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of every sample; prometheus_client's own parser renames Triton's counters."""
    found = [re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line) for line in text.splitlines() if not line.startswith("#")]
    return [(each[1], dict(re.findall(r'(\w+)="([^"]*)"', each[2] or "")), float(each[3])) for each in found]


def samples(text: str) -> dict[str, list[dict[str, str]]]:
    """Labels of every sample, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for name, labels, _ in parsed(text):
        found.setdefault(name, []).append(labels)
    return found


def values(text: str, name: str) -> dict[tuple[str, ...], float]:
    """By the values of the labels, in the labels' alphabetical order."""
    return {tuple(labels.values()): value for each, labels, value in parsed(text) if each == name}


def test_health_becomes_metrics(tmp_path):
    begin(tmp_path, {"flows": ["kalm"], "weights": [{"sha256": "a"}]})
    (port, *_) = free_ports("127.0.0.1")
    health = Health(("kalm",))
    text = SupervisorCollector(health, TritonApi("127.0.0.1", port), tmp_path, JournalReader([])).text
    assert values(text().decode(), "scaphoid_ready") == {(): 0}
    health.serving()
    health.answered("kalm", 0.25)
    health.not_serving("dead", "backend_died")
    health.recovered(9.5)
    health.failed("kalm", "no")
    health.answered("kalm", 0.5)
    found = text().decode()
    assert values(found, "scaphoid_ready") == {(): 1}
    assert values(found, "scaphoid_canary_latency_seconds") == {("kalm",): 0.5}
    assert values(found, "scaphoid_canary_failures_total") == {("kalm",): 1}
    assert values(found, "scaphoid_restarts_total") == {(): 1}
    assert values(found, "scaphoid_recovery_seconds") == {(): 9.5}
    faults = dict.fromkeys(((kind,) for kind in FAULTS), 0) | {("backend_died",): 1}
    assert values(found, "scaphoid_faults_total") == faults
    assert values(found, "scaphoid_version") == {("1", weights_hash({"weights": [{"sha256": "a"}]})): 1}


@pytest.mark.parametrize("text", ["[]", "{", '{"reference": "x"}', "{}"])
@pytest.mark.parametrize("file", [MANIFEST, f"{VERSIONS}/1/{CONTENT}"])
def test_an_edited_repository_leaves_the_other_metrics(tmp_path, file, text):
    weights = weights_hash(begin(tmp_path, {"flows": ["kalm"], "weights": [{"sha256": "a"}]}))
    (tmp_path / file).write_text(text)
    journal = tmp_path.with_name(f"{tmp_path.name}.jsonl")
    journal.write_text(journal_line(weights, probability=0.25, margin=0.5, status="ok"))
    (port, *_) = free_ports("127.0.0.1")
    collector = SupervisorCollector(Health(("kalm",)), TritonApi("127.0.0.1", port), tmp_path, JournalReader([journal]))
    found = collector.text().decode()
    assert values(found, "scaphoid_predictions_total") == {("kalm", "ok"): 1}
    assert values(found, "scaphoid_ready") == {(): 0}
    assert values(found, "scaphoid_drift_index") == {}


def journal_line(weights: str, **also: object) -> str:
    about = {"image": "a", "study": "a", "flow": "kalm", "model_version": f"1@{weights}", "parts": False}
    return Prediction(**about, threshold=0.5, **also).line()


@pytest.mark.slow
def test_the_dashboard_asks_for_metrics_that_exist_and_logs_name_requests(tiny_kalm, tmp_path):
    from scaphoid.triton_repo.assemble import assemble

    weights = weights_hash(assemble(tiny_kalm[0], tmp_path / "repository"))
    journal, told = tmp_path / "predictions.jsonl", []
    answer = {"probability": 0.25, "margin": 0.5, "status": "ok"}
    journal.write_text(journal_line(weights, **answer) + journal_line(weights, status="rejected"))

    def report(line: str, **fields: object) -> None:
        told.append({"message": line, **fields})

    with running_server(
        tmp_path / "repository", watch_interval_s=1.0, report=report, health_port=0, journals=[journal]
    ) as server:
        ask(server.grpc_url, IMAGE, "0123456789abcdef0123456789abcdef")
        with pytest.raises(InferenceServerException):
            ask(server.grpc_url, b"not an image Doe^Jane", "fedcba9876543210fedcba9876543210")
        scraped = [
            urllib.request.urlopen(f"http://{url}/metrics", timeout=30).read().decode()
            for url in (server.health_url, server.metrics_url)
        ]
    found = samples("".join(scraped))
    expressions = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel.get("targets", ())
    ]
    assert len(expressions) > 15
    for expression in expressions:
        names = METRIC.findall(expression)
        assert names
        assert not set(names) - found.keys(), expression
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            for label in labels.split(", "):
                assert any(label in each for name in names for each in found[name]), (expression, label)
        for name, selection in SELECTED.findall(expression):
            for label, wanted in re.findall(r'(\w+)=~?"([^"]*)"', selection):
                assert any(re.fullmatch(wanted, each.get(label, "")) for each in found[name]), expression
    assert values(scraped[0], "scaphoid_refused_total") == {("preprocess", "INVALID_ARGUMENT"): 1}
    assert values(scraped[0], "scaphoid_stage_images_total")["key_area_result", "1"] >= 2
    assert values(scraped[0], "scaphoid_predictions_total") == {("kalm", "ok"): 1, ("kalm", "rejected"): 1}
    assert ("kalm", "probability", f"1@{weights}") in values(scraped[0], "scaphoid_drift_index")
    (refused,) = [fields for fields in told if fields["event"] == "request_refused"]
    assert (refused["request_id"], refused["model"]) == ("fedcba9876543210fedcba9876543210", "preprocess")
    assert refused["status"] == "INVALID_ARGUMENT"
    assert "Doe" not in str(told)


def ask(url: str, encoded: bytes, request_id: str) -> None:
    given = tritonclient.grpc.InferInput("encoded", [1, len(encoded)], "UINT8")
    given.set_data_from_numpy(np.frombuffer(encoded, np.uint8)[None])
    with tritonclient.grpc.InferenceServerClient(url) as client:
        assert client.infer("kalm", [given], request_id=request_id).get_response().id == request_id
