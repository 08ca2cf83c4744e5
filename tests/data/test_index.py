import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaphoid.trainer.data.index import (
    COLUMNS,
    Index,
    InvalidIndexError,
    Radiograph,
    read_index,
    split_by_patient,
    write_index,
)

ABNORMAL = Radiograph(
    image="MURA-v1.1/train/XR_WRIST/patient00001/study1_positive/image1.png",
    patient="patient00001",
    study="study1_positive",
    view="lateral",
    body_part="wrist",
    label=1,
    boxes=((1.5, 2.25, 100.0, 36.75), (0.0, 0.0, 7.0, 5.0)),
    width=101,
    height=37,
    split="train",
)


def radiograph(number: int, patient: int, label: int = 0) -> Radiograph:
    boxes = None if label else ()
    return dataclasses.replace(ABNORMAL, image=f"{number}.png", patient=f"p{patient}", label=label, boxes=boxes)


def test_written_and_read_back_is_the_same(tmp_path):
    unknown = dataclasses.replace(ABNORMAL, image="b.png", boxes=None, view="")
    unseen = dataclasses.replace(ABNORMAL, image='with "quotes", comma.png', boxes=())
    index = Index(tmp_path, (ABNORMAL, unknown, unseen, radiograph(3, 2)))
    assert read_index(write_index(index)) == index
    assert read_index(tmp_path) == index
    assert index.path(ABNORMAL) == tmp_path / ABNORMAL.image


def test_where_selects_by_fields():
    index = Index(Path("."), (ABNORMAL, radiograph(1, 1), radiograph(2, 2, label=1)))
    assert [r.image for r in index.where(label=1, patient="p2").radiographs] == ["2.png"]
    with pytest.raises(ValueError, match="colour"):
        index.where(colour="grey")


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        ("label", "2", "0 (normal) or 1"),
        ("label", "", "a value"),
        ("patient", "", "a value"),
        ("image", "/etc/x.png", "below the index's folder"),
        ("image", "../x.png", "below the index's folder"),
        ("width", "12.5", "a number of pixels"),
        ("height", "0", "a number of pixels"),
        ("boxes", "[[1, 2, 3]]", "x0, y0, x1, y1"),
        ("boxes", "[[1, 2, 1, 9]]", "x0 < x1"),
        ("boxes", "[[0, 0, 102, 9]]", "x1 <= 101"),
        ("boxes", "[[0, 0, NaN, 9]]", "x0 < x1"),
        ("boxes", '[["a", 0, 5, 9]]', "x0, y0, x1, y1"),
        ("boxes", "{", "JSON"),
    ],
)
def test_errors_name_file_line_column_and_what_was_expected(tmp_path, column, cell, expected):
    path = write_index(Index(tmp_path, (ABNORMAL, dataclasses.replace(ABNORMAL, image="b.png"))))
    lines = path.read_text().splitlines()
    row = {name: str(getattr(ABNORMAL, name)) for name in COLUMNS} | {"image": "b.png", "boxes": ""} | {column: cell}
    lines[2] = ",".join('"' + row[name].replace('"', '""') + '"' for name in COLUMNS)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidIndexError) as error:
        read_index(path)
    message = str(error.value)
    assert f"{path}, line 3, column {column}" in message
    assert expected in message
    assert repr(cell) in message


@pytest.mark.parametrize("cell", ["[" * 100_000, f"[[0, 0, 1, {'9' * 400}]]"])
def test_boxes_too_deep_or_too_large_are_refused_in_a_short_line(tmp_path, cell):
    path = write_index(Index(tmp_path, (dataclasses.replace(ABNORMAL, boxes=None),)))
    path.write_text(path.read_text().replace(",,101,", f',"{cell}",101,'))
    with pytest.raises(InvalidIndexError, match=r"line 2, column boxes: expected nothing, or a JSON list") as error:
        read_index(path)
    assert len(str(error.value)) < 1000


def test_boxes_of_a_normal_radiograph_are_refused(tmp_path):
    path = write_index(Index(tmp_path, (dataclasses.replace(ABNORMAL, label=0),)))
    with pytest.raises(InvalidIndexError, match="label is 0"):
        read_index(path)


def test_duplicates_short_lines_missing_columns_and_missing_files_are_refused(tmp_path):
    path = write_index(Index(tmp_path, (ABNORMAL, ABNORMAL)))
    with pytest.raises(InvalidIndexError, match=r"line 3, column image.*line 2"):
        read_index(path)
    path.write_text(",".join(COLUMNS) + "\na.png,p\n")
    with pytest.raises(InvalidIndexError, match="line 2, column study"):
        read_index(path)
    path.write_text("image,patient\na.png,p\n")
    with pytest.raises(InvalidIndexError, match=r"line 1.*missing: study, view"):
        read_index(path)
    path.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(InvalidIndexError, match="at least one"):
        read_index(path)
    with pytest.raises(FileNotFoundError, match="no such index"):
        read_index(tmp_path / "elsewhere")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 23), st.integers(0, 1)), min_size=2, max_size=90),
    st.floats(0.05, 0.95),
    st.integers(0, 9),
)
def test_split_is_patient_disjoint_complete_and_seeded(rows, fraction, seed):
    index = Index(Path("."), tuple(radiograph(i, patient, label) for i, (patient, label) in enumerate(rows)))
    if len({r.patient for r in index.radiographs}) < 2:
        with pytest.raises(ValueError, match="two patients"):
            split_by_patient(index, fraction, seed)
        return
    first, second = split_by_patient(index, fraction, seed)
    assert not {r.patient for r in first.radiographs} & {r.patient for r in second.radiographs}
    assert sorted(first.radiographs + second.radiographs, key=lambda r: int(r.image[:-4])) == list(index.radiographs)
    assert min(len(first), len(second)) > 0
    assert split_by_patient(index, fraction, seed) == (first, second)


def test_split_keeps_the_fraction_and_the_share_of_abnormal_patients():
    index = Index(Path("."), tuple(radiograph(i, i // 3, label=int(i % 12 < 3)) for i in range(600)))
    first, second = split_by_patient(index, 0.2, seed=4)
    assert abs(len(second) - 120) <= 6
    assert sum(r.label for r in second.radiographs) / len(second) == pytest.approx(0.25, abs=0.04)
    assert split_by_patient(index, 0.2, seed=5) != (first, second)
    with pytest.raises(ValueError, match="fraction"):
        split_by_patient(index, 1.0, seed=4)


def test_readers_and_phantoms_import_no_torch():
    modules = (
        "index, scaphoid.trainer.data.mura, scaphoid.trainer.data.fracatlas, scaphoid.trainer.data.phantom.generate"
    )
    code = f"import scaphoid.trainer.data.{modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
