"""Starting from a repository, changing and replacing it: each excludes what would mix versions or lose one."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scaphoid.export import lock
from scaphoid.export.artefacts import ManifestError, read_manifest, write_manifest
from scaphoid.export.lock import InUse, locked
from scaphoid.triton_repo import assemble as assemble_module
from scaphoid.triton_repo.supervisor import leftovers
from scaphoid.triton_repo.supervisor.server import Server, running_server
from scaphoid.triton_repo.versioning import versions, versions_command

HOLD = """
import sys, time
from pathlib import Path
from scaphoid.export.lock import locked
with locked(Path(sys.argv[1]), alone=True, wait_s=0):
    print("held", flush=True)
    time.sleep(60)
"""


def begin(folder: Path, numbers: tuple[int, ...] = (1,), weights: str = "a") -> Path:
    """A repository without models, in these versions; the first is served."""
    folder.mkdir()
    content = {"flows": ["kalm"], "target": "cpu", "weights": [{"sha256": weights}]}
    versions.begin(folder, content)
    for number in numbers[1:]:
        versions.number(folder, number, content)
    versions.finish(folder, 1, numbers)
    return folder


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(versions, "LOCK_WAIT_S", 0.2)
    monkeypatch.setattr(leftovers.tempfile, "tempdir", str(tmp_path))
    return begin(tmp_path / "repository", (1, 2))


def test_who_holds_it_is_named_and_what_a_killed_process_held_is_free(repository):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(repository)], stdout=subprocess.PIPE, text=True) as holding:
        try:
            assert holding.stdout.readline() == "held\n"
            began = time.monotonic()
            with pytest.raises(InUse) as refused, versions.changing(repository):
                pass
            assert time.monotonic() - began < 10
            assert f"{repository} is in use by process {holding.pid} ({sys.executable} -c import sys" in str(
                refused.value
            )
            assert str(refused.value).endswith("within 0.2 s: let that finish, or end it, and try again")
            assert "\n" not in str(refused.value)
        finally:
            holding.send_signal(signal.SIGKILL)
    with versions.changing(repository):
        pass


def test_starts_exclude_changes_and_not_each_other(repository):
    with versions.starting(repository), versions.starting(repository, wait_s=0):
        with pytest.raises(InUse, match=f"process {os.getpid()} "), versions.changing(repository):
            pass
        assert not list(repository.parent.glob("*.unfinished"))
    with versions.changing(repository):
        with pytest.raises(InUse), versions.starting(repository, wait_s=0):
            pass
        versions_command.main(["list", str(repository)])  # waits for nobody


def test_who_waits_for_a_folder_gets_the_one_that_replaced_it(repository):
    entered, leave = threading.Event(), threading.Event()

    def wait() -> None:
        with locked(repository, alone=True, wait_s=60):
            entered.set()
            leave.wait(60)

    waiting = threading.Thread(target=wait)
    with locked(repository, alone=True, wait_s=0):
        waiting.start()
        time.sleep(0.3)
        new = begin(repository.with_name("new"))
        shutil.rmtree(repository)
        time.sleep(0.2)
        new.rename(repository)
        assert not entered.is_set()
    assert entered.wait(60)
    with pytest.raises(InUse), locked(repository, alone=False, wait_s=0):
        pass
    leave.set()
    waiting.join()


def test_a_folder_that_was_replaced_at_that_moment_is_not_what_is_held(repository, monkeypatch):
    flock, inode = fcntl.flock, repository.stat().st_ino

    def late(descriptor: int, how: int) -> None:
        if repository.stat().st_ino == inode:
            begin(repository.with_name("new"))
            repository.rename(repository.with_name("old"))
            repository.with_name("new").rename(repository)
        flock(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with (
        locked(repository, alone=True, wait_s=60),
        pytest.raises(InUse, match=f"process {os.getpid()}"),
        locked(repository, alone=True, wait_s=0),
    ):
        pass


class Serving:
    """`running_server` in a thread, without Triton: it starts until `ready` is set and serves until `over` is; `asked`
    are the versions that it was told to switch to."""

    def __init__(self, repository: Path, monkeypatch) -> None:
        self.began, self.ready, self.over, self.asked = threading.Event(), threading.Event(), threading.Event(), []

        def start(server: Server) -> None:
            server.folder = leftovers.make_folder()
            self.began.set()
            self.ready.wait(60)

        def switch(_: Server, version: int) -> dict:
            self.asked.append(version)
            return {"version": version, "seconds": 1.0}

        def serve() -> None:
            with running_server(repository, health_port=0):
                self.over.wait(60)

        monkeypatch.setattr(Server, "start", start)
        monkeypatch.setattr(Server, "switch", switch)
        self._thread = threading.Thread(target=serve)

    def __enter__(self) -> "Serving":
        self._thread.start()
        assert self.began.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.ready.set()
        self.over.set()
        self._thread.join()


def test_a_switch_while_a_server_starts_waits_for_it_and_is_the_servers(repository, monkeypatch):
    with Serving(repository, monkeypatch) as server:
        with pytest.raises(InUse):
            versions_command.switch(repository, 2)
        assert read_manifest(repository)["version"] == 1
        monkeypatch.setattr(versions, "LOCK_WAIT_S", 60)
        threading.Timer(0.5, server.ready.set).start()
        assert "version 2 is served" in versions_command.switch(repository, 2)
        assert server.asked == [2]
    assert read_manifest(repository)["version"] == 1  # it was left to the server
    assert "next start serves version 2" in versions_command.switch(repository, 2)


def test_a_server_that_takes_no_commands_from_here_is_not_said_to_be_none(repository, monkeypatch):
    with versions.serving(repository), pytest.raises(InUse) as refused:
        versions_command.switch(repository, 2)
    assert f"repository is served by process {os.getpid()} (" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert read_manifest(repository)["version"] == 1
    assert "next start serves version 2" in versions_command.switch(repository, 2)


def test_the_holder_of_the_same_inode_on_another_device_is_not_meant(tmp_path, monkeypatch):
    found, here = tmp_path.stat(), os.getpid()
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    lines = [
        f"{pid}: FLOCK ADVISORY WRITE {pid} {at}:{found.st_ino} 0 EOF" for pid, at in ((1, "ff:ff"), (here, device))
    ]
    (tmp_path / "locks").write_text("\n".join(lines))
    monkeypatch.setattr(lock, "LOCKS", tmp_path / "locks")
    assert lock.holder(tmp_path).startswith(f"process {here} ")


@pytest.fixture
def assembled(monkeypatch, tmp_path_factory):
    """assembled(repository, weights): `assemble` onto it, of artefacts without content."""
    artefacts = tmp_path_factory.mktemp("artefacts")
    write_manifest(artefacts, {})

    def assembled(repository: Path, weights: str = "b") -> dict:
        written = lambda artefacts, manifest, folder, *_: begin(folder, weights=weights)  # noqa: E731
        monkeypatch.setattr(assemble_module, "_write_repository", written)
        return assemble_module.assemble(artefacts, repository)

    return assembled


def test_assembling_onto_added_versions_is_refused_and_onto_one_replaces_it(repository, assembled, tmp_path):
    before = sorted(repository.rglob("*"))
    lost = r"repository holds versions 1, 2, which would be lost: `scaphoid-serve versions add .*repository ARTEFACTS`"
    with pytest.raises(ManifestError, match=lost):
        assembled(repository)
    assert sorted(repository.rglob("*")) == before
    (tmp_path / "artefacts").mkdir()
    write_manifest(tmp_path / "artefacts", {"flows": ["kalm"]})
    with pytest.raises(ManifestError, match="artefacts holds artefacts, which would be lost: choose another folder"):
        assembled(tmp_path / "artefacts")
    with pytest.raises(ManifestError, match="artefacts is no model repository of this release: assemble one"):
        versions_command.run(versions_command.Show(tmp_path / "artefacts"))
    for _ in range(2):
        assembled(tmp_path / "another")
    assert read_manifest(tmp_path / "another")["versions"] == [1]
    with versions.serving(repository), pytest.raises(InUse, match=r"is served by .* or stop the server first"):
        assembled(repository)  # no advice to remove what is served
    shutil.rmtree(repository / versions.VERSIONS / "2")
    write_manifest(repository, {"flows": ["kalm"], "versions": [1], "version": 1})
    (repository / "of the one before").touch()
    assembled(repository)
    assert not (repository / "of the one before").exists()


def test_assembling_onto_a_repository_that_is_served_is_refused(tmp_path, repository, assembled, monkeypatch):
    single = begin(tmp_path / "single")
    inode = single.stat().st_ino
    with Serving(single, monkeypatch) as server:
        with pytest.raises(InUse, match="is in use by"):  # it reads it
            assembled(single)
        server.ready.set()
        monkeypatch.setattr(versions, "LOCK_WAIT_S", 60)
        served = rf"single is served by process {os.getpid()} .*: `scaphoid-serve versions add .* or stop the server"
        with pytest.raises(InUse, match=served):
            assembled(single)
        assembled(single, weights="a")  # what is there already, as a container does at every start
        assert single.stat().st_ino == inode
    assembled(single, weights="a")
    assert single.stat().st_ino == inode
    (single / "damage").touch()
    assembled(single, weights="a")
    assert single.stat().st_ino != inode
