"""What keeps a server and its users safe: no code from data, keys, certificates, the bill of materials."""

import ast
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from scaphoid.export.artefacts import ManifestError, write_manifest
from scaphoid.triton_repo import keys, sbom
from scaphoid.triton_repo.certificates import CertificateError, make_certificates, server_options
from scaphoid.triton_repo.requests.failures import ServerUnavailable
from scaphoid.triton_repo.requests.shared_regions import SharedRegions
from scaphoid.triton_repo.supervisor import leftovers

ROOT = Path(__file__).parents[2]
FOLDERS = ("trainer", "kernels", "export", "triton_repo", "bench")
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# Each reads a TorchScript or exported program from a folder whose manifest was verified.
PROGRAM_LOADERS = {"export/formats.py", "triton_repo/backends/pytorch/model.py"}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def code_from_data(path: str, source: str) -> list[str]:
    """Every place where what is read could be executed."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(f"imports {node.module}")
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if name == "torch.load" and given.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if name in ("torch.jit.load", "torch.export.load") and path not in PROGRAM_LOADERS:
            found.append(name)
        if name in ("eval", "exec", "os.system", "yaml.load") or given.get("shell"):
            found.append(name)
        if given.get("allow_pickle"):
            found.append(f"{name} with allow_pickle")
    return found


def test_nothing_that_is_read_is_executed():
    found = {str(path.relative_to(ROOT)): path.read_text() for path in sources()}
    assert len(found) > 100
    assert {path: places for path, text in found.items() if (places := code_from_data(path, text))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.jit.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert code_from_data("trainer/anything.py", line)


def test_keys_differ_by_api_and_the_one_that_is_shared_is_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(leftovers.tempfile, "tempdir", str(tmp_path))
    folder = leftovers.make_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keys.leave_local_key(folder, (8000, 8001), "a key")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("local-*")} == {0o600}
    assert keys.find_local_key(8001) == "a key"
    assert keys.find_local_key(8002) is None
    options = keys.restrictions("of the administrator", "a key", guard_http=True)
    assert any("model-repository" in option and "of the administrator" in option for option in options)
    assert not any("model-repository" in option and "a key" in option for option in options)
    assert "--http-restricted-api=shared-memory,inference:scaphoid-key=a key" in options
    assert "--grpc-restricted-protocol=shared-memory:scaphoid-key=a key" in options
    assert not any("inference" in option for option in keys.restrictions("of the administrator", "a key", False))
    gone = folder.rename(folder.with_name(f"{leftovers.FOLDER_PREFIX}{2**22 + 1}-x"))  # no process has this number
    assert keys.find_local_key(8001) is None
    assert (gone / "local-8001.key").exists()


def test_without_a_key_there_is_no_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ServerUnavailable, match=r"no key.*as that user"):
        SharedRegions("127.0.0.1:8001").check()


def test_certificates_are_signed_name_the_server_and_keep_their_keys(tmp_path):
    make_certificates(tmp_path / "tls", ["triton.example", "127.0.0.1"], days=2)
    files = {path.name: path for path in (tmp_path / "tls").iterdir()}
    assert set(files) == {f"{name}.{kind}" for name in ("ca", "server", "client") for kind in ("pem", "key")}
    assert {stat.S_IMODE(path.stat().st_mode) for name, path in files.items() if name.endswith("key")} == {0o600}
    command = ["openssl", "verify", "-CAfile", files["ca.pem"], "-purpose", "sslserver", "-verify_ip", "127.0.0.1"]
    subprocess.run([*command, files["server.pem"]], check=True, capture_output=True)
    refused = subprocess.run([*command, files["client.pem"]], check=False, capture_output=True)
    assert refused.returncode
    assert all(Path(option.partition("=")[2]).exists() for option in server_options(tmp_path / "tls")[2:])
    with pytest.raises(CertificateError, match=r"ca\.pem is there already"):
        make_certificates(tmp_path / "tls", ["triton.example"])
    (tmp_path / "hospital").mkdir()
    (tmp_path / "hospital" / "server.key").write_text("its own")
    with pytest.raises(CertificateError, match=r"server\.key is there already"):
        make_certificates(tmp_path / "hospital", ["triton.example"])
    assert [path.read_text() for path in (tmp_path / "hospital").iterdir()] == ["its own"]
    with pytest.raises(CertificateError, match=r"nowhere/server\.pem is missing"):
        server_options(tmp_path / "nowhere")
    with pytest.raises(CertificateError, match="host name"):
        make_certificates(tmp_path / "other", [])


def test_the_bill_of_materials_lists_files_packages_and_native_libraries(tmp_path):
    pytest.importorskip("cyclonedx")
    bundle = tmp_path / "bundle"
    (bundle / "encoder").mkdir(parents=True)
    (bundle / "encoder" / "model.xml").write_text("<net/>")
    write_manifest(bundle, {"version": 3})
    paths = list(sbom.write_sbom(bundle, tmp_path / "out"))
    bill = json.loads(paths[0].read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"] == "3"
    components = {component["name"]: component for component in bill["components"]}
    assert components["encoder/model.xml"]["type"] == "machine-learning-model"
    assert len(components["encoder/model.xml"]["hashes"][0]["content"]) == 64
    numpy = components["numpy"]
    assert numpy["purl"].startswith("pkg:pypi/numpy@")
    assert numpy["licenses"][0]["license"]["name"]
    library = next(part for part in numpy["components"] if "_multiarray_umath" in part["name"])
    installed = Path(__import__("numpy").__file__).parents[1] / library["name"]
    assert library["hashes"][0]["content"] == __import__("hashlib").sha256(installed.read_bytes()).hexdigest()
    assert "pytest" not in components  # a tool of developers serves nobody
    table = paths[1].read_text()
    assert "| numpy |" in table
    assert os.linesep in table
    (bundle / "encoder" / "model.xml").write_text("<another/>")
    with pytest.raises(ManifestError, match="changed"):
        list(sbom.write_sbom(bundle, tmp_path / "out"))
