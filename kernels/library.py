"""Finds and loads `libscaphoid_ops.so`. Every op's module imports this one first, so importing any op makes all of them
known as `torch.ops.scaphoid.*`. A process without Python, or without this package, loads the same file by
`torch.ops.load_library(path)`."""

import ctypes
from pathlib import Path

import torch


def path() -> Path:
    """Where the op library lies: beside this module, where the build puts it. Raises ImportError when not built."""
    library = Path(__file__).with_name("libscaphoid_ops.so")
    if not library.is_file():
        raise ImportError(
            f"the op library {library.name} is missing from {library.parent}; "
            "build it with: pip install --no-build-isolation -e ."
        )
    return library


def cuda_architectures() -> tuple[str, ...]:
    """The GPU code in the library, such as ("sm_80", "sm_90", "compute_90"): machine code for two architectures, PTX
    for later ones. Empty when it was built without CUDA."""
    ask = ctypes.CDLL(str(path())).scaphoid_cuda_architectures
    ask.restype = ctypes.c_char_p
    return tuple(ask().decode().split())


torch.ops.load_library(path())

if __name__ == "__main__":
    print(
        "op library:", " ".join(["CPU and CUDA for", *cuda_architectures()] if cuda_architectures() else ["CPU only"])
    )
