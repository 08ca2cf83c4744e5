"""Dockerfile, compose files and Helm chart, each by its own linter or schema, and held against the code they start.

Nothing here is built or run: there is no container engine and no cluster.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import tyro
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import ValidationError

from scaphoid.export.artefacts import CONTAINER
from scaphoid.triton_repo import assemble, serve

pytest.importorskip("helm_python", reason="helm-python-sdk is not installed: pip install -e '.[dev]'")
kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed")

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "triton_repo" / "deploy"
CHART, DOCKERFILE = DEPLOY / "helm", DEPLOY / "Dockerfile"
KUBERNETES = ("1.29", "1.37")  # the chart's oldest, the newest that is known here
VARIANTS = {
    "gpu": {},
    "gpu, cache": {"engines": {"claim": "plans"}, "flows": ["msfm", "kalm"], "runtimeClassName": "nvidia"},
    "gpu, object storage": {
        "models": {"source": "objectStorage"},
        "networkPolicy": {"clients": {"podLabels": {"role": "pacs"}}},
    },
    "cpu": {"target": "cpu", "image": {"server": "registry.example/scaphoid@sha256:0", "pullSecrets": ["pull"]}},
    "cpu, object storage": {"target": "cpu", "models": {"source": "objectStorage"}},
    "tls": {"tls": {"secret": "certificates"}},
    "one": {"autoscaling": {"enabled": False}, "replicas": 1, "monitoring": {"enabled": False}},
}


def tool(name: str) -> str:
    """A program of the dev extra."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[dev]'")
    return found


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT
    )


@pytest.fixture(scope="module")
def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage, continuation lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    found, name = {"": []}, ""
    for instruction in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if match := re.match(r"FROM (\S+) AS (\w+)", instruction):
            name = match[2]
            found[name] = [match[1]]
        elif instruction.strip():
            found[name].append(instruction)
    return found


# Dockerfile


def test_hadolint_finds_nothing():
    done = run(tool("hadolint"), "--no-color", DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_hadolint_would_find_something(tmp_path):
    """The linter works: an image without a version is found."""
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN apt-get install curl\n")
    done = run(tool("hadolint"), "--no-color", tmp_path / "Dockerfile")
    assert done.returncode == 1
    assert "DL3007" in done.stdout


def test_every_image_is_pinned_and_no_older_than_the_artefacts_ask_for(stages):
    images = dict(re.match(r"ARG (\w+)=(\S+)", line).groups() for line in stages[""])
    assert set(images) == {"PYTHON", "TRITON", "TENSORRT"}
    releases = {name: re.search(r":(\d\d\.\d\d)-py3$", images[name])[1] for name in ("TRITON", "TENSORRT")}
    assert len(set(releases.values())) == 1  # plans are read by the TensorRT that wrote them
    assert releases["TRITON"] >= CONTAINER["release"]
    assert f"/{CONTAINER['image']}:" in images["TRITON"]
    assert re.fullmatch(r"python:3\.12\.\d+-slim-bookworm", images["PYTHON"])
    assert {stages[name][0] for name in ("build", "server", "engines")} == {"${PYTHON}", "${TRITON}", "${TENSORRT}"}


def test_what_is_copied_exists_and_is_let_through_to_the_build(stages):
    allowed = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copies = [shlex.split(line)[1:] for name in stages for line in stages[name] if line.startswith("COPY")]
    for words in copies:
        flags = [word for word in words if word.startswith("--")]
        for source in words[len(flags) : -1]:
            if not any(flag.startswith("--from") for flag in flags):
                assert (ROOT / source).exists(), source
                assert any(source == each or source.startswith(f"{each}/") for each in allowed), source


@pytest.mark.parametrize("target", ["cpu", "gpu", "engines"])
def test_no_image_runs_as_root(stages, target):
    instructions = [*stages["server"], *stages[target]] if target != "engines" else stages[target]
    users = [line.split()[1] for line in instructions if line.startswith("USER")]
    assert users[-1] == "1000:1000"
    assert instructions.index(f"USER {users[-1]}") > max(
        i for i, line in enumerate(instructions) if line.startswith(("COPY", "RUN"))
    )


def test_the_images_command_is_one_that_scaphoid_serve_takes(stages):
    forms = (line.partition(" ") for line in stages["server"] if line.startswith(("ENTRYPOINT", "CMD")))
    words = {name: json.loads(value) for name, _, value in forms}
    assert importlib.util.find_spec(words["ENTRYPOINT"][-1])
    arguments = tyro.cli(serve.Arguments, args=words["CMD"])
    assert arguments.repository == Path("/models/repository")
    (health,) = [line for line in stages["server"] if line.startswith("HEALTHCHECK")]
    assert f":{arguments.health_port}/ready" in health
    (ports,) = [line for line in stages["server"] if line.startswith("EXPOSE")]
    expected = (arguments.http_port, arguments.grpc_port, arguments.metrics_port, arguments.health_port)
    assert ports.split()[1:] == list(map(str, expected))


def brought(requirements: list[str]) -> set[str]:
    """The distributions that installing `requirements` brings, themselves included."""
    waiting, seen = [Requirement(line) for line in requirements], {}
    while waiting:
        each = waiting.pop()
        key = canonicalize_name(each.name), tuple(sorted(each.extras))
        if seen.setdefault(key, each) is each:
            for line in importlib.metadata.requires(each.name) or ():
                needed = Requirement(line)
                if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in (*each.extras, "")):
                    waiting.append(needed)
    return {name for name, _ in seen}


def test_the_supervisor_needs_only_what_the_image_has():
    """What serving and assembling import comes with requirements.txt, and nothing in that is there for nothing."""
    lines = [line for line in (DEPLOY / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    program = (
        "import sys, importlib.metadata\n"
        "import scaphoid.triton_repo.serve, scaphoid.triton_repo.assemble\n"
        "owners = importlib.metadata.packages_distributions()\n"
        "print(*{owner for name in sys.modules for owner in owners.get(name.split('.')[0], [])})"
    )
    used = {canonicalize_name(name) for name in run(sys.executable, "-c", program).stdout.split()}
    used -= {"scaphoid", "setuptools"}  # copied into the image; brought along by the editable install
    used -= {"openvino-telemetry"}  # declined where it is
    assert "numpy" in used
    assert used <= brought(lines)
    assert {canonicalize_name(Requirement(line).name) for line in lines} <= used


def test_the_gpu_script_calls_what_exists():
    text = (DEPLOY / "prepare_gpu.sh").read_text()
    assert os.access(DEPLOY / "prepare_gpu.sh", os.X_OK)
    assert run("bash", "-n", DEPLOY / "prepare_gpu.sh").returncode == 0
    words = {"$artefacts": "a", "$engines": "e", "$repository": "r", "$precision": "f16"}
    for name, value in words.items():
        text = text.replace(f'"{name}"', value)
    commands = [shlex.split(each) for each in re.findall(r"python3 -m (.+)", re.sub(r"\\\n\s*", "", text))]
    modules = {command[0]: command[1:] for command in commands}
    build = run(sys.executable, "-m", "scaphoid.export.tensorrt_engines.build_engines", "--help").stdout
    assert all(flag in build for flag in modules["scaphoid.export.tensorrt_engines.build_engines"] if flag[:2] == "--")
    arguments = tyro.cli(assemble.Arguments, args=modules["scaphoid.triton_repo.assemble"])
    assert (arguments.target, arguments.engines, arguments.precision) == ("gpu", Path("e"), "f16")


# Compose


def compose_file(text: str) -> dict:
    """What it says. Raises ValidationError for anything that the Compose specification does not know."""
    content = yaml.safe_load(text)
    compose_spec.ComposeSpecification.model_validate(content, extra="forbid")
    return content


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def compose(request) -> dict:
    return compose_file((DEPLOY / f"compose.{request.param}.yaml").read_text())


@pytest.mark.parametrize("mistake", ["read_onyl: true", "depends_on: {engines: {condition: done}}", "ports: {a: 1}"])
def test_compose_files_hold_nothing_that_is_unknown(mistake):
    with pytest.raises(ValidationError):
        compose_file(f"services: {{server: {{image: a, {mistake}}}}}")


def test_compose_services_are_locked_down(compose, stages):
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged")
        if "build" in service:
            assert service["user"] == "1000:1000"
            assert service["build"]["target"] in stages
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    server = compose["services"]["server"]
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert {volume["target"]: volume["read_only"] for volume in server["volumes"]} in (
        {"/models/repository": True},
        {"/models": True},
    )
    assert server["shm_size"] == "1g"
    assert any(mount.startswith("/tmp:") for mount in server["tmpfs"])


def test_compose_waits_for_and_mounts_what_it_names(compose):
    services, volumes = compose["services"], compose.get("volumes", {})
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        mounts = service.get("volumes", [])
        named = [each.split(":")[0] if isinstance(each, str) else each["source"] for each in mounts]
        assert {name for name in named if not name.startswith("$")} <= set(volumes), name


# Chart


# A process of its own: Helm's engine brings the runtime of Go, which does not live beside every library of a test run.
HELM = """
import json, sys
import helm_python as helm

task, chart, values = json.load(sys.stdin)
if task == "lint":
    found = helm.lint(chart, values, strict=True)
elif task == "render":
    found = dict(helm.Chart.load(chart).render(values, name="clinic", namespace="radiology"))
else:
    found = helm.Chart.load(chart).validate_schema(values)
json.dump(found, sys.stdout, default=str)
"""


def helm(task: str, values: dict) -> dict:
    """Raises CalledProcessError, with Helm's message in `stderr`."""
    asked = json.dumps((task, str(CHART), values))
    done = subprocess.run([sys.executable, "-c", HELM], input=asked, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def rendered(values: dict) -> dict[str, dict]:
    """Manifests by kind."""
    found = {}
    for path, text in helm("render", values).items():
        if path.endswith(".yaml"):
            found |= {each["kind"]: each for each in yaml.safe_load_all(text) if each}
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_lint_finds_nothing(variant):
    report = helm("lint", VARIANTS[variant])
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize(("variant", "version"), list(product(VARIANTS, KUBERNETES)))
def test_manifests_are_what_kubernetes_takes(variant, version):
    """By the API's own schemas, unknown fields refused. A PodMonitor is the Prometheus operator's: below."""
    manifests = rendered(VARIANTS[variant])
    for kind, manifest in manifests.items():
        if kind != "PodMonitor":
            kubernetes.validate(manifest, version, strict=True)
    assert {"Deployment", "Service", "NetworkPolicy"} <= set(manifests)
    assert ("HorizontalPodAutoscaler" in manifests) == (variant != "one")
    assert ("PodDisruptionBudget" in manifests) == (variant != "one")


def test_kubernetes_refuses_what_it_does_not_know():
    manifest = rendered({})["Deployment"]
    manifest["spec"]["template"]["spec"]["containers"][0]["securityContxt"] = {}
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(manifest, KUBERNETES[-1], strict=True)


def test_the_pod_monitor_is_what_the_prometheus_operator_takes():
    """By types made from the operator's own schema; a field that it does not know is lost on the way through them."""
    operator = pytest.importorskip("cloudcoil.models.prometheus_operator.v1", reason="pip install -e '.[dev]'")

    def through(manifest: dict) -> dict:
        return operator.PodMonitor.model_validate(manifest).model_dump(mode="json", by_alias=True, exclude_unset=True)

    manifest = rendered({"monitoring": {"labels": {"release": "prometheus"}}})["PodMonitor"]
    assert through(manifest) == manifest
    manifest["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    assert through(manifest) != manifest
    del manifest["spec"]["selector"]
    with pytest.raises(ValueError, match=r"spec\.selector"):
        through(manifest)


@pytest.mark.parametrize(
    "values",
    [{"targt": "cpu"}, {"target": "tpu"}, {"models": {"source": "git"}}, {"flows": ["msfn"]}, {"replicas": 0}],
)
def test_wrong_values_are_refused(values):
    with pytest.raises(subprocess.CalledProcessError) as error:
        helm("validate", values)
    assert "HelmValuesError" in error.value.stderr


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_are_locked_down_and_the_server_writes_nowhere_but_tmpfs(variant):
    pod = rendered(VARIANTS[variant])["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        expected = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["securityContext"] == expected
        assert container["resources"]["limits"]["memory"]
    (server,) = pod["containers"]
    writable = {mount["mountPath"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/dev/shm", "/tmp"}
    mounted = {mount["name"] for each in [*pod.get("initContainers", []), server] for mount in each["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_servers_arguments_and_probes_are_the_codes(variant):
    (server,) = rendered(VARIANTS[variant])["Deployment"]["spec"]["template"]["spec"]["containers"]
    arguments = tyro.cli(serve.Arguments, args=[str(word) for word in server["args"]])
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    expected = {name: getattr(arguments, f"{name}_port") for name in ("http", "grpc", "metrics", "health")}
    if arguments.tls:
        del expected["http"]  # stays on loopback
        assert str(arguments.tls) in {mount["mountPath"] for mount in server["volumeMounts"]}
    assert (arguments.tls is not None) == (variant == "tls")
    assert ports == expected
    for probe, path in (("startupProbe", "/ready"), ("readinessProbe", "/ready"), ("livenessProbe", "/live")):
        assert server[probe]["httpGet"] == {"path": path, "port": "health"}
    assert str(arguments.repository) in {mount["mountPath"] for mount in server["volumeMounts"]} | {
        "/models/repository"
    }


def test_a_gpu_pod_prepares_its_engines_where_the_server_finds_them():
    pod = rendered({})["Deployment"]["spec"]["template"]["spec"]
    (engines,), (server,) = pod["initContainers"], pod["containers"]
    assert engines["args"][:3] == ["/artefacts", "/engines", server["args"][0]]
    assert engines["resources"]["limits"]["nvidia.com/gpu"] == server["resources"]["limits"]["nvidia.com/gpu"] == 1
    mounts = {mount["mountPath"]: mount["name"] for mount in engines["volumeMounts"]}
    assert mounts["/models"] in {mount["name"] for mount in server["volumeMounts"] if mount["mountPath"] == "/models"}
    cpu = rendered(VARIANTS["cpu"])["Deployment"]["spec"]["template"]["spec"]
    assert "initContainers" not in cpu
    assert "nvidia.com/gpu" not in cpu["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("variant", ["gpu", "cpu", "tls"])
def test_everything_that_selects_pods_selects_these(variant):
    manifests = rendered(VARIANTS[variant])
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        manifests["PodMonitor"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifests["Deployment"]["metadata"]["name"])
    assert "replicas" not in manifests["Deployment"]["spec"]  # the autoscaler's
    (server,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    names = {port["name"] for port in server["ports"]}
    used = [port["targetPort"] for port in manifests["Service"]["spec"]["ports"]]
    used += [each["port"] for each in manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]]
    used += [port["port"] for rule in manifests["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]]
    assert names == set(used)
    assert manifests["NetworkPolicy"]["spec"]["egress"] == []


def test_the_autoscaler_reads_the_metric_that_the_adapter_makes():
    adapter = yaml.safe_load((CHART / "files" / "prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    (metric,) = rendered({})["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "nv_inference_queue_duration_us" in rule["metricsQuery"]
