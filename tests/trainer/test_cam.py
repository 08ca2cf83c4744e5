"""Class activation maps of a classifier whose weights are made to look at brightness."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from scaphoid.trainer import cam, evaluate
from scaphoid.trainer.checkpoint import save_model
from scaphoid.trainer.data.index import Index, Radiograph, write_index
from scaphoid.trainer.localization import CAM_THRESHOLDS
from scaphoid.trainer.models.kalm import Kalm, KalmConfig
from scaphoid.trainer.models.plain import Plain, PlainConfig


class Brightness(torch.nn.Module):
    """A backbone whose one feature is the local mean of the normalised image."""

    num_features = 1

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 8)


@pytest.fixture
def model() -> Plain:
    model = Plain(PlainConfig("test_resnet", 96))
    model.encoder.backbone = Brightness()
    model.encoder.classifier = torch.nn.Linear(1, 2)
    model.encoder.classifier.weight.data = torch.tensor([[-1.0], [1.0]])
    return model.eval()


def dataset(root: Path, count: int) -> Index:
    """Dark pictures with one bright square, which is the lesion of every second one (the others are normal)."""
    rng, radiographs = np.random.default_rng(count), []
    root.mkdir()
    for number in range(count):
        pixels = rng.integers(10, 30, (120, 160)).astype(np.uint8)
        x, y = int(rng.integers(0, 120)), int(rng.integers(0, 80))
        if label := number % 2:
            pixels[y : y + 40, x : x + 40] = 220
        cv2.imwrite(str(root / f"{number}.png"), pixels)
        boxes = ((x, y, x + 40, y + 40),) if label else ()
        radiographs.append(Radiograph(f"{number}.png", f"p{number}", "s", "", "hand", label, boxes, 160, 120, "valid"))
    index = Index(root, tuple(radiographs))
    write_index(index)
    return index


def test_boxes_stand_on_the_lesions_and_beside_the_system(model, tmp_path, monkeypatch, capsys):
    index, validation = dataset(tmp_path / "held", 12), dataset(tmp_path / "other", 8)
    monkeypatch.setattr(cam, "load_model", lambda path: model)
    options = cam.Options(Path("w"), index.root, validation.root, tmp_path / "out" / "cam.jsonl", split="valid")
    assert cam.run(options) in CAM_THRESHOLDS
    records = [json.loads(line) for line in options.out.read_text().splitlines()]
    assert [Path(record["image"]).name for record in records] == [each.image for each in index.radiographs]
    predictions = tmp_path / "predictions.jsonl"
    system = [record | {"flow": "msfm", "box": [0, 0, 160, 120], "peak": None} for record in records]
    predictions.write_text("".join(json.dumps(record) + "\n" for record in system))
    arguments = [str(predictions), "--index", str(index.root), "--beside", str(options.out), "--json"]
    assert evaluate.main(arguments) == 0
    methods = json.loads(capsys.readouterr().out)["localization"]["together"]["methods"]
    assert methods["cam"]["pcl_0.5"]["value"] == 1
    assert methods["cam"]["pointing"]["value"] == 1
    assert methods["msfm"]["pcl_0.5"]["value"] == 0
    assert methods["msfm"]["pointing"]["value"] is None


def test_the_threshold_is_not_chosen_on_what_is_reported(model, tmp_path, monkeypatch):
    index = dataset(tmp_path / "held", 4)
    monkeypatch.setattr(cam, "load_model", lambda path: model)
    options = cam.Options(Path("w"), index.root, index.root, tmp_path / "cam.jsonl")
    with pytest.raises(ValueError, match=r"validation: 0\.png is among the radiographs to predict"):
        cam.run(options)
    normal = Index(index.root, tuple(replace(each, label=0, boxes=()) for each in index.radiographs))
    with pytest.raises(ValueError, match="has a box"):
        cam.threshold_of(model, normal, 10)


def test_another_system_is_refused(tmp_path):
    save_model(tmp_path / "kalm.safetensors", Kalm(KalmConfig("test_resnet", 96, key_size=48)))
    with pytest.raises(ValueError, match="is of kalm: class activation maps need a plain classifier"):
        cam.run(cam.Options(tmp_path / "kalm.safetensors", tmp_path, tmp_path, tmp_path / "cam.jsonl"))
