import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scaphoid.kernels.activation_maps import activation_maps, activation_maps_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(seed: int, shape: tuple[int, ...], classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return features, torch.randn(classes, shape[1], generator=generator, dtype=torch.float64).to(dtype)


def laid_out(features: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return features.contiguous(memory_format=torch.channels_last)
    if layout == "every other":
        return torch.stack((features, torch.full_like(features, math.nan)), -1).flatten(3)[..., ::2]
    if layout == "transposed":
        return features.transpose(2, 3).contiguous().transpose(2, 3)
    return features


def assert_close_to_exact(features: Tensor, weight: Tensor, maps: tuple[Tensor, Tensor]) -> None:
    """Within what sums in the maps' dtype may err, of maps computed in float64."""
    wide, rows = features.double(), weight.double()
    activation, class_activation = activation_maps_reference(wide, rows)
    of_class = torch.einsum("kc,bchw->bkhw", rows.abs(), wide.abs())
    error = torch.finfo(maps[0].dtype).eps * (8 + math.sqrt(features.shape[1]))
    assert ((maps[0] - activation).abs() <= error * wide.abs().sum(1)).all()
    assert ((maps[1] - class_activation).abs() <= error * of_class.square().sum(1).sqrt()).all()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 70),
    h=st.integers(1, 19),
    w=st.integers(1, 19),
    classes=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    half_weight=st.booleans(),
    layout=st.sampled_from(["contiguous", "channels_last", "every other", "transposed"]),
    seed=st.integers(0, 2**31),
)
def test_matches_reference(batch, channels, h, w, classes, dtype, half_weight, layout, seed):
    features, weight = draw(seed, (batch, channels, h, w), classes, dtype)
    if not half_weight and dtype != torch.float64:
        weight = weight.float()
    maps = activation_maps(laid_out(features, layout), weight)
    assert [each.shape for each in maps] == [(batch, h, w)] * 2
    assert {each.dtype for each in maps} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert_close_to_exact(features, weight, maps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_real_encoders(dtype, layout):
    for shape in ((2, 1283, 14, 14), (1, 8, 57, 55)):  # the second is larger than a tile
        features, weight = draw(1, shape, 2, dtype)
        maps = activation_maps(laid_out(features.abs(), layout), weight)
        assert_close_to_exact(features.abs(), weight, maps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_map_depends_neither_on_its_batch_nor_on_threads(layout):
    features, weight = draw(2, (5, 100, 37, 41), 3, torch.float32)
    features = laid_out(features, layout)
    whole = activation_maps(features, weight)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for ours, theirs in zip(activation_maps(features, weight), whole, strict=True):
            assert torch.equal(ours, theirs)
        for b in range(5):
            alone = activation_maps(laid_out(features[b : b + 1], layout), weight)
            assert all(torch.equal(one[0], each[b]) for one, each in zip(alone, whole, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_sums_are_exact_where_float_can_be():
    """Small whole numbers: any order gives the same."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-8, 9, (2, 77, 9, 5), generator=generator)
    weight = torch.tensor([[3.0], [-4.0]]).expand(2, 77)
    for dtype in DTYPES:
        activation, class_activation = activation_maps(features.to(dtype), weight.to(dtype))
        assert torch.equal(activation.double(), features.sum(1).double())
        assert torch.equal(class_activation.double(), 5 * features.sum(1).abs().double())


def test_constant_features():
    activation, class_activation = activation_maps(torch.full((1, 64, 3, 4), 0.5), torch.ones(2, 64))
    assert torch.equal(activation, torch.full((1, 3, 4), 32.0))
    torch.testing.assert_close(class_activation, torch.full((1, 3, 4), 32 * math.sqrt(2)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_cell(value, dtype, layout):
    features, weight = draw(3, (2, 21, 5, 7), 2, dtype)
    clean = activation_maps(laid_out(features, layout), weight)
    features[1, 20, 2, 3] = value
    maps = activation_maps(laid_out(features, layout), weight)
    torch.testing.assert_close(maps[0][1, 2, 3].item(), value, equal_nan=True, rtol=0, atol=0)
    assert not math.isfinite(maps[1][1, 2, 3])
    for ours, theirs in zip(maps, clean, strict=True):
        theirs[1, 2, 3] = ours[1, 2, 3] = 0
        assert torch.equal(ours, theirs)


def test_subnormal_and_largest_halves_are_widened_exactly():
    bits = torch.tensor([0x0001, 0x03FF, 0x0400, 0x7BFF, -0x7FFF], dtype=torch.int16)
    features = bits.view(torch.float16).reshape(1, 1, 1, 5)
    assert torch.equal(activation_maps(features, torch.ones(1, 1))[0], features[:, 0].float())


def test_huge_strides():
    """Every image is the same memory; then a view whose rows lie far apart."""
    features, weight = draw(4, (1, 5, 3, 3), 2, torch.float32)
    maps = activation_maps(features.expand(40, 5, 3, 3), weight)
    expected = activation_maps(features, weight)
    assert all(torch.equal(each, one.expand(40, 3, 3)) for each, one in zip(maps, expected, strict=True))
    wide = torch.zeros(1, 5, 3, 1 << 16)
    wide[..., ::30000] = features
    for ours, theirs in zip(activation_maps(wide[..., ::30000], weight), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout):
    features, weight = draw(5, (2, 5, 3, 2), 3, torch.float64)
    leaves = laid_out(features, layout).requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(activation_maps, leaves)
    assert torch.autograd.gradgradcheck(activation_maps, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_reference(dtype):
    features, weight = draw(6, (2, 37, 5, 4), 2, dtype)
    leaves = features.requires_grad_(), weight.requires_grad_()
    cotangents = [torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    ours, theirs = (
        torch.autograd.grad(sum((m * c).sum() for m, c in zip(op(*leaves), cotangents, strict=True)), leaves)
        for op in (activation_maps, activation_maps_reference)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other)


def test_the_norm_has_gradient_zero_at_zero():
    features = torch.zeros(1, 3, 2, 2)
    features[0, :, 0, 0] = 1
    leaves = features.requires_grad_(), torch.ones(2, 3, requires_grad=True)
    by_features, by_weight = torch.autograd.grad(activation_maps(*leaves)[1].sum(), leaves)
    assert by_features[0, :, 0, 1:].abs().max() == 0
    assert by_features[0, :, 1].abs().max() == 0
    torch.testing.assert_close(by_features[0, :, 0, 0], torch.full((3,), math.sqrt(2)))
    torch.testing.assert_close(by_weight, torch.full((2, 3), 1 / math.sqrt(2)))


@pytest.mark.parametrize(
    ("features", "weight", "message"),
    [
        (torch.zeros(1, 3, 2), torch.zeros(2, 3), r"activation_maps: features must be \[B, C, h, w\]; got float32 \[1"),
        (torch.zeros(1, 3, 2, 2).int(), torch.zeros(2, 3), r"features must be float16, .* got int32 \[1, 3, 2, 2\]"),
        (torch.zeros(1, 0, 2, 2), torch.zeros(2, 0), r"at least one channel and one cell; got float32 \[1, 0, 2, 2\]"),
        (torch.zeros(1, 3, 0, 2), torch.zeros(2, 3), r"at least one channel and one cell; got float32 \[1, 3, 0, 2\]"),
        (
            torch.zeros(1, 3, 2, 2),
            torch.zeros(2, 4),
            r"weight must be float32 \[K, C\], here \[\*, 3\]; got .*\[2, 4\]",
        ),
        (
            torch.zeros(1, 3, 2, 2),
            torch.zeros(3),
            r"weight must be float32 \[K, C\], here \[\*, 3\]; got float32 \[3\]",
        ),
        (torch.zeros(1, 3, 2, 2), torch.zeros(0, 3), r"between 1 and 8 classes \(rows\); got float32 \[0, 3\]"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(9, 3), r"between 1 and 8 classes \(rows\); got float32 \[9, 3\]"),
        (torch.zeros(1, 3, 2, 2).half(), torch.zeros(2, 3).bfloat16(), r"or of the features' float16; got bfloat16"),
        (torch.zeros(1, 3, 2, 2).double(), torch.zeros(2, 3), r"weight must be float64 or .* float64; got float32"),
    ],
)
def test_refuses(features, weight, message):
    with pytest.raises(RuntimeError, match=message):
        activation_maps(features, weight)


class Features(ctypes.Structure):
    """`scaphoid_features` (scaphoid_ops.h)."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "h", "w", "classes")),
        *((name, ctypes.c_int) for name in ("dtype", "weight_dtype", "channels_last")),
    ]


C_DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}


def by_cuda_source(simt, features: Tensor, weight: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """The CUDA op under the SIMT executor."""
    batch, channels, h, w = features.shape
    dtypes = C_DTYPES[features.dtype], C_DTYPES[weight.dtype]
    of = Features(batch, channels, h, w, len(weight), *dtypes, channels_last)
    dense = (features.permute(0, 2, 3, 1) if channels_last else features).contiguous()
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    maps = torch.full((2, batch, h, w), math.nan, dtype=dtype)
    pointers = (ctypes.c_void_p(each.data_ptr()) for each in (dense, weight.contiguous(), *maps))
    assert simt.scaphoid_activation_maps_cuda(ctypes.byref(of), *pointers, None) == 0, simt.scaphoid_simt_error()
    return maps[0], maps[1]


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 1, 1, 1), (2, 37, 5, 7), (1, 64, 4, 9)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [*((each, each) for each in DTYPES), (torch.float16, torch.float32)]
)
@pytest.mark.parametrize("classes", [2, 5])
def test_cuda_source_matches_float64(simt, shape, dtype, weight_dtype, classes):
    features, weight = draw(7, shape, classes, dtype)
    weight = weight.to(weight_dtype)
    results = []
    for seed, channels_last in enumerate((False, True, False)):
        simt.scaphoid_simt_seed(seed)
        results.append(by_cuda_source(simt, features, weight, channels_last))
        assert_close_to_exact(features, weight, results[-1])
    assert all(torch.equal(ours, theirs) for maps in results[1:] for ours, theirs in zip(maps, results[0], strict=True))
