"""CUDA kernels under the names that their sources give them."""

import pytest

from scaphoid.kernels.kernel_names import readable_names, shortened


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void scaphoid::(anonymous namespace)::crop<float, (int)4>(scaphoid::Crop, float*)", "crop<float, 4>"),
        ("scaphoid::(anonymous namespace)::map(float const*, int)", "map"),
        ("void scaphoid::_GLOBAL__N__0ca0264f_4_t_cu_f4::slow<float, true>(float)", "slow<float, true>"),
    ],
)
def test_kernel_names_are_shortened(name, short):
    assert shortened(name) == short


def test_mangled_names_become_readable():
    mangled = "_ZN8scaphoid4cropIfLi4EEEvPf"
    assert readable_names([mangled]) == {mangled: "crop<float, 4>"}
    assert readable_names([]) == {}
