"""Finds and loads `libscaphoid_ops.so`. Every op's module imports this one first, so importing any op makes all of them
known as `torch.ops.scaphoid.*`. A process without Python, or without this package, loads the same file by
`torch.ops.load_library(path)`."""

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


torch.ops.load_library(path())
