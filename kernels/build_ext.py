"""Builds `libscaphoid_ops.so` for setuptools (`[tool.setuptools.cmdclass]` in pyproject.toml) by `build_ops.py`.

The library uses LibTorch's stable ABI alone, so that one file serves several torch releases, Python, TorchScript and
Triton's libtorch: no Python symbol, no ABI tag in its name.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext


class BuildOps(build_ext):
    """`build_ext` for the op library; how it is compiled is `build_ops.py`'s business."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        # A process of its own: while setuptools builds, this package cannot be imported.
        out = self.get_ext_fullpath(ext.name)
        build = Path(__file__).with_name("build_ops.py")
        subprocess.run([sys.executable, build, "torch", "--out", out], check=True)
