"""Versions of artefacts, the link to the one in use, and the way back."""

import errno
import shutil
from functools import partial
from pathlib import Path

import pytest

from scaphoid.export.artefacts import ManifestError, write_manifest
from scaphoid.export.edge.command import main
from scaphoid.export.edge.versions import CURRENT, VersionError, add, current, rollback, use


@pytest.fixture
def make(tmp_path):
    def artefacts(name: str):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model").write_text(name)
        write_manifest(folder, {"flows": ["kalm"]})
        return folder

    return artefacts


def test_install_go_back_and_install_again(make, tmp_path):
    root = tmp_path / "root"
    first, second, third = (add(root, make(name)) for name in ("one", "two", "three"))
    assert [folder.name[:5] for folder in (first, second, third)] == ["0001-", "0002-", "0003-"]
    with pytest.raises(VersionError, match="no current version"):
        current(root)
    for folder in (first, second, third):
        assert use(root, folder.name) == folder
        assert current(root) == folder
    assert (root / CURRENT / "artefacts" / "model").read_text() == "three"
    assert rollback(root) == second
    assert current(root) == second
    assert not third.exists()
    assert rollback(root) == first  # not back to the one that was left
    with pytest.raises(VersionError, match="no version before 0001"):
        rollback(root)
    assert current(root) == first
    again = add(root, tmp_path / "three")
    assert again.name[:5] == "0004-"
    assert use(root, again.name) == again


def test_the_same_artefacts_are_one_version(make, tmp_path):
    root, one = tmp_path / "root", make("one")
    assert add(root, one) == add(root, one)


def test_the_link_is_replaced_in_one_step_and_never_points_to_something_damaged(make, tmp_path):
    root = tmp_path / "root"
    first, second = add(root, make("one")), add(root, make("two"))
    use(root, first.name)
    (root / ".current.new").symlink_to("left behind by a power cut")
    (second / "artefacts" / "model").write_text("changed")
    with pytest.raises(ManifestError, match="changed"):
        use(root, second.name)
    assert current(root) == first
    with pytest.raises(VersionError, match="no version '0009'"):
        use(root, "0009")
    use(root, first.name)
    assert current(root) == first


def test_a_damaged_source_is_not_added(make, tmp_path):
    source = make("one")
    (source / "more").touch()
    with pytest.raises(ManifestError, match="not in the manifest"):
        add(tmp_path / "root", source)
    assert not list((tmp_path / "root").rglob("*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(make, tmp_path, monkeypatch, capsys):
    def full(source, to, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(to))

    source, root = make("one"), tmp_path / "root"
    monkeypatch.setattr(shutil, "copytree", partial(shutil.copytree, copy_function=full))
    assert main(["add", str(root), str(source)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "one was not copied into" in said
    assert "No space left on device" in said
    assert "[(" not in said
    assert not list((root / "versions").iterdir())


@pytest.mark.parametrize("make_it", [Path.mkdir, Path.touch])
def test_what_is_no_link_is_not_replaced(make, tmp_path, make_it):
    version = add(tmp_path / "root", make("one"))
    make_it(tmp_path / "root" / CURRENT)
    with pytest.raises(VersionError, match="current is no link that was made here: move it away first"):
        use(tmp_path / "root", version.name)
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == [CURRENT, "versions"]


def test_by_command(make, tmp_path, capsys):
    root = str(tmp_path / "root")
    for name in ("one", "two"):
        assert main(["add", root, str(make(name))]) == 0
        assert main(["use", root, capsys.readouterr().out.split()[-1]]) == 0
    capsys.readouterr()
    assert main(["rollback", root]) == 0
    assert capsys.readouterr().out.startswith("0001-")
    assert main(["rollback", root]) == 2
    assert "no version before" in capsys.readouterr().err
