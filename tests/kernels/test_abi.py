"""What the op library asks of the process that loads it: LibTorch's stable ABI alone, with CUDA and without."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FLAVOURS = pytest.mark.parametrize("flavour", ["cpu", "cuda"])
LIBTORCH = Path(find_spec("torch").origin).parent / "lib"


def symbols(path: Path, *options: str) -> set[str]:
    """Dynamic symbols of a library, without versions."""
    listed = subprocess.run(["nm", "-D", *options, path], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines()}


def needed(path: Path) -> set[str]:
    """The libraries that a library asks for, without versions."""
    listed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"NEEDED.*\[(\S+?)\.so", listed))


@FLAVOURS
def test_stable_abi_alone(libraries, flavour):
    audit = pytest.importorskip("torch_abi_audit.cli", reason="torch-abi-audit is not installed")
    assert audit.main(["--check", "torch", str(libraries[flavour])]) == 0


@FLAVOURS
def test_a_torch_without_cuda_has_all_it_asks_for(libraries, flavour):
    """What is not weak and torch's comes from libtorch_cpu and libc10, which every torch has."""
    listed = subprocess.run(["nm", "-D", "-u", libraries[flavour]], capture_output=True, text=True, check=True).stdout
    wanted = set(re.findall(r" U ((?:aoti_)?torch_\w+|\S*c10\S*)$", listed, re.MULTILINE))
    assert "torch_call_dispatcher" in wanted
    assert wanted <= symbols(LIBTORCH / "libtorch_cpu.so", "--defined-only") | symbols(LIBTORCH / "libc10.so")
    system = {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert needed(libraries[flavour]) <= {"libtorch", "libtorch_cpu", "libc10", *system}


def test_cuda_loads_without_libtorch_cuda(libraries, tmp_path):
    """A process with libtorch_cpu alone, as in a CPU torch: `libtorch` there brings nothing else."""
    source = tmp_path / "load.cpp"
    source.write_text(
        "#include <dlfcn.h>\n#include <cstdio>\n"
        "int main(int, char** arguments) {\n"
        "  if (!dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL)) return std::puts(dlerror()), 1;\n"
        '  return dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream") ? 2 : 0;\n'
        "}\n"
    )
    cpu = [f"-L{LIBTORCH}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{LIBTORCH}"]
    stand_in = ["g++", "-shared", "-o", tmp_path / "libtorch.so", "-Wl,--no-as-needed", *cpu]
    subprocess.run(stand_in, check=True)
    subprocess.run(["g++", source, "-o", tmp_path / "load", "-ldl"], check=True)
    environment = {"LD_LIBRARY_PATH": f"{tmp_path}:{LIBTORCH}"}
    loaded = subprocess.run([tmp_path / "load", libraries["cuda"]], env=environment, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stdout + loaded.stderr


@FLAVOURS
def test_no_path_of_the_building_machine(libraries, flavour):
    content = libraries[flavour].read_bytes()
    for path in (Path.home(), Path(__file__).parents[2], LIBTORCH.parent):
        assert str(path).encode() not in content, f"{path} is compiled in"


@FLAVOURS
def test_exports_the_c_interface_alone(libraries, flavour):
    ours = {name for name in symbols(libraries[flavour], "--defined-only") if not name.startswith("_Z")}
    assert ours
    assert all(name.startswith("scaphoid_") for name in ours)
    assert any(name.endswith("_cuda") for name in ours) == (flavour == "cuda")
