"""What converts models tells nobody."""

import subprocess
import sys

import pytest

ASKED = """
{before}
from openvino_telemetry import Telemetry
print(Telemetry("an app", "1.0", "an id", enable_opt_in_dialog=False).consent)
"""


@pytest.mark.parametrize(
    ("before", "consent"),
    [
        ("", "True"),
        ("import scaphoid.export.no_telemetry", "False"),
        ("import scaphoid.export.gate", "False"),
    ],
)
def test_reporting_conversions_is_declined(before, consent, tmp_path):
    pytest.importorskip("openvino_telemetry")
    program = ASKED.format(before=before)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [consent]
    assert (consent == "True") or not list(tmp_path.iterdir())
