"""Versions of the models: added, switched and rolled back in files, and under a real server with requests running."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scaphoid.export import workspace
from scaphoid.export.artefacts import MANIFEST, ManifestError, read_manifest, sha256, verify, write_manifest
from scaphoid.triton_repo.configs import CONFIG, read
from scaphoid.triton_repo.supervisor.api import ServerError
from scaphoid.triton_repo.supervisor.canary import IMAGE
from scaphoid.triton_repo.supervisor.server import running_server
from scaphoid.triton_repo.versioning import switch as switch_module
from scaphoid.triton_repo.versioning import versions, versions_command
from scaphoid.triton_repo.versioning.versions import (
    CONTENT,
    VERSIONS,
    begin,
    changing,
    contents,
    finish,
    number,
    pinned,
    scratch,
    starting,
)

STAGE = 'name: "key_area_crop" backend: "pytorch" max_batch_size: 8'
FLOW = """name: "kalm" platform: "ensemble" max_batch_size: 1
ensemble_scheduling { step { model_name: "key_area_crop" model_version: 1 } }"""


def verified(repository: Path) -> dict:
    """The manifest that a server would start with."""
    with starting(repository) as manifest:
        return manifest


def config(path: Path) -> ModelConfig:
    return text_format.Parse(path.read_text(), ModelConfig())


def served(repository: Path) -> list[int]:
    """The version that every configuration in its place names, one number each."""
    stage, flow = (config(repository / name / CONFIG) for name in ("key_area_crop", "kalm"))
    (step,) = flow.ensemble_scheduling.step
    return [*stage.version_policy.specific.versions, *flow.version_policy.specific.versions, step.model_version]


FAILED = {"passed": False, "failures": ["boxes differ"], "accepted": "a trial"}


@pytest.fixture
def repository(tmp_path) -> Path:
    """Two models, one of them a flow, in two versions; the first is served."""
    folder = tmp_path / "repository"
    for name, text in (("key_area_crop", STAGE), ("kalm", FLOW)):
        for version in ("1", "2"):
            (folder / name / version).mkdir(parents=True)
            (folder / name / version / "model").write_text(version)
        (folder / name / CONFIG).write_text(text)
    (folder / "kalm" / "configs").mkdir()
    (folder / "kalm" / "configs" / "bounded.pbtxt").write_text(FLOW)
    (folder / "MODEL_CARD.md").write_text("card of 1")
    begin(folder, {"flows": ["kalm"], "weights": [{"sha256": "a"}]})
    (folder / "MODEL_CARD.md").write_text("card of 2")
    number(folder, 2, {"flows": ["kalm"], "weights": [{"sha256": "b"}]})
    finish(folder, 1, [1, 2])
    return folder


def test_a_version_is_its_configurations_documents_and_content(repository):
    assert served(repository) == [1, 1, 1]
    assert (repository / "MODEL_CARD.md").read_text() == "card of 1"
    content = finish(repository, 2, [1, 2], previous=1)
    assert served(repository) == [2, 2, 2]
    assert config(repository / "kalm" / "configs" / "bounded.pbtxt").ensemble_scheduling.step[0].model_version == 2
    assert (repository / "MODEL_CARD.md").read_text() == "card of 2"
    assert (content["version"], content["previous"], content["weights"]) == (2, 1, [{"sha256": "b"}])
    assert verified(repository)["weights"] == [{"sha256": "b"}]
    assert [each["weights"][0]["sha256"] for each in contents(repository)] == ["a", "b"]


def test_a_repository_is_not_added_as_artefacts(repository):
    from scaphoid.triton_repo.versioning.add_version import add_version

    with pytest.raises(ManifestError, match="repository is a model repository: give the artefacts"):
        add_version(repository, repository)
    assert verified(repository)["versions"] == [1, 2]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", ["raised", "killed"])
def test_an_unfinished_change_is_undone(repository, monkeypatch, capsys, how):
    before = {path: sha256(path) for path in sorted(repository.rglob("*")) if path.is_file()}

    def half() -> None:
        versions.lay_beside(repository, ["key_area_crop"], [1, 2])
        versions.lay_out(repository, 2, "kalm")
        (repository / "key_area_crop" / "3").mkdir()
        (repository / VERSIONS / "3" / "kalm").mkdir(parents=True)
        (repository / f"kalm/{CONFIG}{versions.PARTIAL}").touch()
        workspace.make(scratch(repository))
        (scratch(repository) / "repository").mkdir()
        assert served(repository) == [1, 2, 2, 2]
        if how == "killed":  # nothing more of this process runs
            monkeypatch.setattr(versions, "settle", lambda repository: None)
        raise Killed

    with pytest.raises(Killed), changing(repository):
        half()
    monkeypatch.undo()
    capsys.readouterr()
    versions_command.main(["list", str(repository)])
    assert capsys.readouterr().out.count("\n") == 2  # its versions 1 and 2
    assert verified(repository)["version"] == 1
    assert {path: sha256(path) for path in sorted(repository.rglob("*")) if path.is_file()} == before
    assert list(repository.parent.iterdir()) == [repository]


def test_a_damaged_repository_is_not_changed(repository):
    (repository / "key_area_crop" / "2" / "model").write_text("other")
    with pytest.raises(ManifestError, match="changed since its manifest"):
        versions_command.switch(repository, 2)
    assert read_manifest(repository)["version"] == 1


def test_without_a_server_the_next_start_serves_the_other_version(repository, capsys):
    versions_command.main(["switch", str(repository), "2"])
    assert "next start serves version 2" in capsys.readouterr().out
    assert verified(repository)["version"] == 2
    versions_command.main(["list", str(repository)])
    assert "1@ca978112: kalm, rollback goes back to it" in capsys.readouterr().out
    versions_command.main(["rollback", str(repository)])
    assert verified(repository)["version"] == 1
    for words, message in (
        (["rollback"], "no version to roll back to"),
        (["switch", "1"], "version 1 is served already"),
        (["switch", "7"], "no version 7: there are 1, 2"),
    ):
        with pytest.raises(SystemExit, match=message):
            versions_command.main([words[0], str(repository), *words[1:]])


def test_only_steps_and_policy_follow_the_version():
    assert pinned(config_of(FLOW), 5) == pinned(pinned(config_of(FLOW), 9), 5)
    assert pinned(config_of(STAGE), 5).version_policy.specific.versions == [5]


def config_of(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


class Triton:
    """Stands in for the API: notes what is loaded, with the versions in its file, and fails at call `at`."""

    def __init__(self, repository: Path, at: int) -> None:
        self.repository, self.at, self.calls, self.loaded = repository, at, 0, {}

    def call(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise ServerError("no")

    def load(self, name, config=None, files=None):
        self.call()
        if config is None:
            config = read(self.repository / name / CONFIG)
            self.loaded[name] = list(config.version_policy.specific.versions)

    def unload(self, name):
        self.call()

    def await_unloaded(self, models, version, timeout_s):
        self.call()
        assert (models, version) == (["kalm"], 1)


@pytest.mark.parametrize("at", range(1, 9))
def test_a_switch_that_fails_anywhere_leaves_the_present_version(repository, monkeypatch, at):
    triton, told = Triton(repository, at), []

    def canary(api, flow, model=""):
        triton.call()

    monkeypatch.setattr(switch_module, "canary", canary)
    monkeypatch.setattr(switch_module, "_stages", lambda flows, target: ["key_area_crop"])
    before = {path: sha256(path) for path in sorted(repository.rglob("*")) if path.is_file()}
    if at == 4:  # unloading the flow that was tried: what of it
        switch_module.switch(triton, repository, ["kalm"], 2, lambda line, **fields: told.append(line))
        assert triton.loaded == {"kalm": [2], "key_area_crop": [2]}
        assert served(repository) == [2, 2, 2]
        assert verified(repository)["previous"] == 1
        assert triton.calls == 8  # load stage, load, ask and unload the candidate, load flow, ask, wait, load stage
        return
    with pytest.raises(ServerError, match="version 2 is not served: no; version 1 is, further"):
        switch_module.switch(triton, repository, ["kalm"], 2, lambda line, **fields: told.append(line))
    assert len(told) == 1
    assert triton.loaded == {"kalm": [1], "key_area_crop": [1]}
    assert verified(repository)["version"] == 1
    assert {path: sha256(path) for path in sorted(repository.rglob("*")) if path.is_file()} == before


def test_a_switch_says_when_the_present_version_is_not_served_either(repository, monkeypatch):
    class Dead(Triton):
        def load(self, name, config=None, files=None):
            raise ServerError("connection refused")

    monkeypatch.setattr(switch_module, "_stages", lambda flows, target: ["key_area_crop"])
    with pytest.raises(ServerError, match="version 1 was not loaded again: connection refused"):
        switch_module.switch(Dead(repository, 0), repository, ["kalm"], 2, lambda line, **fields: None)
    assert verified(repository)["version"] == 1


@pytest.mark.parametrize("damage", ["{", "[]", '{"flows": 3}', '{"flows": ["kalm"], "weights": [{}]}', "{}"])
def test_a_damaged_version_is_one_line(repository, damage):
    path = repository / VERSIONS / "2" / CONTENT
    path.write_text(damage)
    with pytest.raises(SystemExit, match=r"versions: \S+content\.json") as refused:
        versions_command.main(["list", str(repository)])
    assert "\n" not in str(refused.value)


def test_a_foreign_folder_of_the_scratchs_name_stays(repository):
    foreign = scratch(repository)
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    with changing(repository):
        pass
    assert (foreign / "chapter1.tex").exists()
    with pytest.raises(FileExistsError, match=r"repository\.adding is in the way"):
        workspace.make(foreign)
    (foreign / "chapter1.tex").rename(repository.with_name("chapter1.tex"))
    (foreign / workspace.MARK).touch()
    (foreign / "repository").mkdir()
    with changing(repository):
        pass
    assert not foreign.exists()


@pytest.fixture(scope="module")
def broken(tiny_kalm, tmp_path_factory) -> Path:
    """Artefacts in order but for what they answer: no number."""
    torch = pytest.importorskip("torch")

    class NoNumber(torch.nn.Module):
        def forward(self, global_logits, local_logits, key_box, key_margin, original_size):
            one = global_logits[:, :1] * float("nan")
            return one, one, one, key_box * float("nan"), one

    folder = tmp_path_factory.mktemp("broken") / "artefacts"
    shutil.copytree(tiny_kalm[1], folder)
    torch.jit.save(torch.jit.script(NoNumber()), folder / "key_area_result" / "model.pt")
    write_manifest(folder, {key: value for key, value in read_manifest(folder).items() if key != "files"})
    return folder


@pytest.fixture(scope="module")
def assembled(tiny_kalm, broken) -> Path:
    """A repository with three versions: 1 is served, 2 is well, 3 is broken."""
    from scaphoid.triton_repo.assemble import assemble
    from scaphoid.triton_repo.versioning.add_version import add_version

    repository = tiny_kalm[0].with_name("versions")
    assemble(tiny_kalm[0], repository)
    assert [add_version(repository, artefacts) for artefacts in (tiny_kalm[1], broken)] == [2, 3]
    return repository


@pytest.mark.slow
def test_what_may_not_be_added(assembled, tiny_kalm, tmp_path):
    from scaphoid.triton_repo.versioning.add_version import add_version

    before = (assembled / MANIFEST).read_bytes()
    for damage, message in (
        (lambda folder, manifest: (folder / "key_area_crop" / "model.pt").write_bytes(b"?"), "changed since"),
        (lambda folder, manifest: manifest["parity"].update(FAILED), "boxes differ"),
        (lambda folder, manifest: manifest.update(precision="bf16"), "encoder is configured differently"),
    ):
        folder = tmp_path / "artefacts"
        shutil.copytree(tiny_kalm[1], folder)
        manifest = verify(folder)
        damage(folder, manifest)
        if "changed" not in message:
            write_manifest(folder, {key: value for key, value in manifest.items() if key != "files"})
        with pytest.raises(ManifestError, match=message):
            add_version(assembled, folder)
        shutil.rmtree(folder)
    assert (assembled / MANIFEST).read_bytes() == before
    assert verified(assembled)["versions"] == [1, 2, 3]


@pytest.mark.slow
def test_what_a_killed_add_left_is_gone_with_the_next_command(assembled, tiny_kalm, capsys):
    beside = sorted(assembled.parent.iterdir())
    program = ["scaphoid.triton_repo.serve", "versions", "add", str(assembled), str(tiny_kalm[1])]
    with subprocess.Popen([sys.executable, "-m", *program]) as adding:
        deadline = time.monotonic() + 120
        while not (scratch(assembled) / "repository.partial").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        adding.kill()
    assert adding.returncode == -signal.SIGKILL
    assert sorted(assembled.parent.iterdir()) != beside
    versions_command.main(["list", str(assembled)])
    assert [line.partition("@")[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]
    assert sorted(assembled.parent.iterdir()) == beside
    assert verified(assembled)["versions"] == [1, 2, 3]


@pytest.mark.slow
def test_switch_and_rollback_lose_no_request(assembled, tiny_kalm, load):
    from scaphoid.export.runner import Runner

    expected = {
        str(version): float(Runner(artefacts, "kalm", threads=1)([IMAGE], ["probability"])["probability"].item())
        for version, artefacts in enumerate(tiny_kalm, start=1)
    }
    assert abs(expected["1"] - expected["2"]) > 1e-3

    def answered_by(version: str) -> None:
        began = time.monotonic()
        while len(late := [found for sent, _, found, _ in [*requests.answers] if sent >= began]) < 20:
            time.sleep(0.02)
        assert {*late} == {version}

    told = []

    def report(line: str, **fields: object) -> None:
        told.append(line)

    with (
        running_server(assembled, watch_interval_s=1.0, health_port=0, report=report) as server,
        load(server.grpc_url, "kalm", IMAGE) as requests,
    ):
        answered_by("1")
        print(versions_command.switch(assembled, 2))
        answered_by("2")
        with pytest.raises(ServerError, match=r"version 3 is not served: .*finite.*; version 2 is, further"):
            versions_command.switch(assembled, 3)
        answered_by("2")
        versions_command.main(["rollback", str(assembled)])
        answered_by("1")
        loaded = {key for key, state in server.api.versions().items() if state == "READY"}
        assert {version for _, version in loaded} == {"1"}  # what is not served takes no memory
    print(f"{len(requests.answers)} answers, {len(requests.failures)} failures, {told}")
    assert not requests.failures
    for _, _, version, probability in requests.answers:
        assert abs(probability - expected[version]) < 1e-4
    assert not [line for line in told if "restarting" in line], told
    assert json.loads((assembled / MANIFEST).read_text())["version"] == 1
    assert verified(assembled)["versions"] == [1, 2, 3]
