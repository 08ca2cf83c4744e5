"""`scaphoid-bench triage` without a server: what is refused before anything is done."""

import pytest

from scaphoid.bench import triage as bench
from scaphoid.bench.triage import Triage, triage
from scaphoid.export.artefacts import ManifestError


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    def drawn(*_: object, **__: object) -> None:
        pytest.fail("phantoms were drawn")

    monkeypatch.setattr(bench, "generate", drawn)
    monkeypatch.setattr(bench, "generate_frozen", drawn)


def test_a_missing_repository_is_refused_before_anything_is_drawn(tmp_path, nothing_is_drawn):
    """The phantoms take minutes."""
    with pytest.raises(ManifestError, match=r"nowhere has no manifest\.json"):
        triage(Triage(tmp_path / "nowhere", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_flow_without_a_first_stage_is_refused(tmp_path, nothing_is_drawn):
    with pytest.raises(ValueError, match="'kalm' has no first stage to ask: expected one of msfm"):
        triage(Triage(tmp_path / "nowhere", "kalm", out=tmp_path / "out"))
