import numpy as np
import pytest

from scaphoid.export.parity import BARS, Difference, Parity, difference, map_difference
from scaphoid.trainer.flows import FLOWS

KALM = FLOWS["kalm"]


def answer(**changed):
    values = {name: np.full((1, 1), 0.25, np.float32) for name in KALM.outputs}
    return values | {"box": np.array([[10, 20, 30, 50]], np.float32)} | changed


def test_the_largest_difference_counts():
    other = answer(local_probability=np.float32([[0.5]]), box=np.float32([[10, 20, 30, 47.5]]))
    found = difference("a.png", KALM, answer(), other)
    assert (found.probability, found.pixels, found.margin) == (0.25, 2.5, 0.25)
    assert found.iou == pytest.approx(27.5 / 30)


def test_map_error_is_relative_and_of_the_first_encoder():
    def maps(a, c):
        return {"global_activation": np.array(a), "global_class_activation": np.array(c)}

    assert map_difference(maps([10.0, 2], [4.0, 0]), maps([10.0, 2.5], [4.0, 1])) == pytest.approx(0.25)


def parity(precision, *rows, map_error=0.01):
    differences = tuple(Difference(str(n), p, x, i, m) for n, (p, x, i, m) in enumerate(rows))
    return Parity(differences, map_error, BARS[precision])


GOOD, FLIPPED, FLIPPED_SURE = (1e-5, 0.1, 0.99, 0.5), (0.2, 80.0, 0.1, 0.001), (0.2, 80.0, 0.1, 0.5)
MOVED = (1e-5, 80.0, 0.1, 0.001)


def test_f32_counts_every_image_and_forgives_no_probability():
    assert parity("f32", *[GOOD] * 200, MOVED).passed
    assert not parity("f32", *[GOOD] * 100, MOVED).passed
    assert not parity("f32", *[GOOD] * 1000, FLIPPED).passed
    assert [each.image for each in parity("f32", GOOD, FLIPPED).exceptions] == ["1"]


def test_reduced_precision_counts_images_whose_margin_exceeds_the_map_error():
    uncertain = parity("bf16", GOOD, *[FLIPPED] * 9)
    assert uncertain.passed
    assert len(uncertain.exceptions) == 9  # listed, though they do not count
    assert not parity("bf16", *[GOOD] * 9, FLIPPED_SURE).passed
    assert not parity("bf16", FLIPPED).passed  # nothing that counts proves nothing
