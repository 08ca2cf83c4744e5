"""Names of CUDA kernels as their sources have them."""

import re
import shutil
import subprocess
from collections.abc import Sequence


def readable_names(mangled: Sequence[str]) -> dict[str, str]:
    """By mangled name: no namespace, return type or parameters, but template arguments. Without a c++filt
    names stay as they are."""
    if shutil.which("c++filt") is None:
        return {name: name for name in mangled}
    said = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return {name: shortened(long) for name, long in zip(mangled, said.splitlines(), strict=True)}


def shortened(name: str) -> str:
    """`void scaphoid::(anonymous namespace)::crop<float, (int)4>(Crop, float*)` -> `crop<float, 4>`."""
    name = re.sub(
        r"\(anonymous namespace\)::|_GLOBAL__N_\w*::|\bscaphoid::|^void |\((?:unsigned )?(?:int|bool|char)\)", "", name
    )
    depth = 0
    for place, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:place]
    return name
