"""Builds `libscaphoid_ops.so`; setuptools calls it (`[tool.setuptools.cmdclass]` in pyproject.toml).

The library uses LibTorch's stable ABI alone, so that one file serves several torch releases, Python, TorchScript and
Triton's libtorch: no Python symbol, no ABI tag in its name.
"""

from pathlib import Path

from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest release that can load the library


class BuildOps(BuildExtension):
    """`build_ext` for the op library: where torch is, which ABI, which warnings."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, use_ninja=True, no_python_abi_suffix=True, **kwargs)

    def build_extensions(self) -> None:
        here = Path.cwd()
        for extension in self.extensions:
            extension.library_dirs += library_paths()
            extension.libraries += ["c10", "torch", "torch_cpu"]
            extension.extra_compile_args = [
                f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
                "-DPy_LIMITED_API=0x030A0000",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-ffp-contract=off",  # the same rounding on every processor
                "-fno-math-errno",
                "-Wall",
                "-Wextra",
                *(f"-isystem{path}" for path in include_paths()),  # our warnings, not torch's
                f"-ffile-prefix-map={here}=.",  # registrations carry __FILE__: no path of the building machine
            ]
            extension.extra_link_args = ["-Wl,--no-undefined", "-Wl,--as-needed"]
        super().build_extensions()
