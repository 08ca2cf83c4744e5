"""MSFM, KALM and the plain classifier as they are trained: loss terms, shared weights, what moves and what must not."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from scaphoid.trainer.config import Schedule
from scaphoid.trainer.losses import stage_loss
from scaphoid.trainer.models.backbone import PACKAGED
from scaphoid.trainer.models.kalm import Kalm, KalmConfig
from scaphoid.trainer.models.msfm import Msfm, MsfmConfig
from scaphoid.trainer.models.plain import Plain, PlainConfig
from scaphoid.trainer.stages.encoder import ActivationEncoder
from scaphoid.trainer.train import create_optimizer, set_training, suppress

BACKBONE = "test_resnet"  # timm's resnet for tests: batch norm, stride 32, 0.4 million parameters
SIZE, PART = 96, 64
UNFROZEN = Schedule((1,), 3, "sgd", 0.1)


def radiographs(count: int = 3, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.randint(
        0, 256, (count, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def awake(model: nn.Module) -> nn.Module:
    """timm starts the last norm of every block at zero, and no gradient passes it in the first step."""
    for norm in norms(model):
        norm.weight.data[:] = 1
    return model


def msfm(**changes: object) -> Msfm:
    torch.manual_seed(0)
    return Msfm(MsfmConfig(BACKBONE, SIZE, PART, **changes))


def kalm() -> Kalm:
    torch.manual_seed(0)
    return Kalm(KalmConfig(BACKBONE, SIZE, 0.5, 48))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are bitwise the same."""
    return [name for name in one if torch.equal(one[name], other[name])]


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [one for one in module.modules() if isinstance(one, nn.BatchNorm2d)]


def step(model: nn.Module, phase: str, optimizer: torch.optim.Optimizer, image: Tensor) -> None:
    labels = torch.arange(len(image)) % 2
    terms = model.training_logits(phase, image)
    loss = sum(stage_loss(logits, labels, torch.ones(len(image)), "ce") for logits in terms)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# -- MSFM


def test_msfm_has_a_loss_term_for_main_object_and_each_window():
    model = msfm().eval()
    assert [logits.shape for logits in model.training_logits("main", radiographs())] == [(3, 2)]
    assert [logits.shape for logits in model.training_logits("joint", radiographs())] == [(3, 2)] * 9


def test_training_terms_are_the_flows_logits():
    """In eval mode, training computes what inference computes."""
    model = msfm().eval()
    with torch.no_grad():
        terms = model.training_logits("joint", radiographs())
        probabilities = model.probabilities("joint", radiographs())
    main, of_object, *parts = (torch.softmax(logits, 1)[:, 1:] for logits in terms)
    of_parts = torch.stack(parts).mean(0)
    torch.testing.assert_close(probabilities["main_probability"], main)
    torch.testing.assert_close(probabilities["object_probability"], of_object)
    torch.testing.assert_close(probabilities["parts_probability"], of_parts)
    torch.testing.assert_close(probabilities["probability"], (main + of_object) / 2)
    torch.testing.assert_close(probabilities["probability_with_parts"], (main + of_object + of_parts) / 3)


def test_one_encoder_and_classifier_for_all_stages():
    model = msfm().eval()
    stages = model.stages()
    assert stages["parts_encoder"].encoder is stages["encoder"] is model.encoder
    assert model.fma_encoder is not model.encoder
    before = model.training_logits("joint", radiographs())
    with torch.no_grad():
        model.encoder.classifier.bias += torch.tensor([0.0, 1.0])
    for one, other in zip(before, model.training_logits("joint", radiographs()), strict=True):
        torch.testing.assert_close(other - one, torch.tensor([[0.0, 1.0]]).expand(3, 2))


def test_each_stage_updates_the_running_statistics():
    model = msfm()
    set_training(model, "joint", UNFROZEN)
    model.training_logits("joint", radiographs())
    assert {int(norm.num_batches_tracked) for norm in norms(model.encoder)} == {3}
    set_training(model, "main", UNFROZEN)
    model.training_logits("main", radiographs())
    assert {int(norm.num_batches_tracked) for norm in norms(model.encoder)} == {4}


def test_no_gradient_from_the_parts_reaches_the_object_stage():
    """Boxes and crops carry none: the parts' term alone gives the gradient of the windows as fixed images."""
    model = msfm().eval()
    image = radiographs(1)
    terms = model.training_logits("joint", image)
    windows = []
    hook = model.part_crops.register_forward_hook(lambda module, inputs, outputs: windows.append(outputs[2]))
    model.training_logits("joint", image)
    hook.remove()
    gradients = []
    for logits in (terms[2], model.encoder(windows[0][:, 0])[0]):
        gradients.append(torch.autograd.grad(logits[:, 1].sum(), list(model.encoder.parameters()), retain_graph=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("phase", Msfm.phases)
def test_the_fma_encoder_is_frozen(phase):
    model = awake(msfm(fma=True))
    set_training(model, phase, UNFROZEN)
    assert not any(module.training for module in model.fma_encoder.modules())
    assert not any(parameter.requires_grad for parameter in model.fma_encoder.parameters())
    before, trained = state_of(model.fma_encoder), state_of(model.encoder)
    step(
        model,
        phase,
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1),
        suppress(model, radiographs()),
    )
    assert same(before, model.fma_encoder.state_dict()) == list(before)
    assert same(trained, model.encoder.state_dict()) == []


def test_feature_map_augmentation_dims_where_the_frozen_encoder_is_hot():
    model, image = msfm(fma=True).eval(), radiographs()
    with torch.no_grad():
        activation = ActivationEncoder(model.fma_encoder)(image)
        dimmed = suppress(model, image)
    assert torch.equal(dimmed, model.suppress(image, activation))
    assert 0 < (dimmed != image).float().mean() < 1
    assert suppress(msfm(), image) is image
    assert suppress(Plain(PlainConfig(BACKBONE, SIZE)), image) is image


def test_inference_of_an_fma_run_sees_the_dimmed_image_too():
    model, image = msfm(fma=True).eval(), radiographs()
    bare = copy.deepcopy(model)
    bare.config = MsfmConfig(BACKBONE, SIZE, PART)
    with torch.no_grad():
        for phase in Msfm.phases:
            seen = model.probabilities(phase, image)["probability"]
            assert torch.equal(seen, bare.probabilities(phase, suppress(model, image))["probability"])
            assert not torch.equal(seen, bare.probabilities(phase, image)["probability"])


def test_the_packaged_fma_encoder_is_imagenets_whatever_the_encoder_starts_from():
    model = Msfm(MsfmConfig(PACKAGED, SIZE, PART), pretrained=False)
    assert all(not torch.equal(n.running_var, torch.ones_like(n.running_var)) for n in norms(model.fma_encoder))
    assert all(torch.equal(n.running_var, torch.ones_like(n.running_var)) for n in norms(model.encoder))


# -- KALM


def test_the_local_phase_leaves_the_global_encoder_bitwise_and_moves_the_size_layers():
    model = kalm()
    set_training(model, "local", UNFROZEN)
    assert not any(module.training for module in model.global_encoder.modules())
    optimizer = create_optimizer(model, Schedule((0, 1), 3, "adam", 1e-2))
    of_global, of_local, sizes = map(state_of, (model.global_encoder, model.local_encoder, model.key_area_crop))
    for seed in range(2):
        step(model, "local", optimizer, radiographs(seed=seed))
    assert same(of_global, model.global_encoder.state_dict()) == list(of_global)
    assert same(of_local, model.local_encoder.state_dict()) == []
    assert same(sizes, model.key_area_crop.state_dict()) == []


def test_the_global_phase_trains_the_global_encoder_alone():
    model = awake(kalm())
    set_training(model, "global", UNFROZEN)
    before = state_of(model)
    step(model, "global", create_optimizer(model, Schedule((1, 0), 3, "adam", 1e-2)), radiographs())
    kept = [name for name in before if not name.startswith("global_encoder.")]
    assert same(before, model.state_dict()) == kept


def test_kalm_training_computes_what_inference_computes():
    model = kalm().eval()
    with torch.no_grad():
        image = radiographs()
        of_global, of_local = (model.training_logits(phase, image) for phase in model.phases)
        probabilities = model.probabilities("local", image)
    assert len(of_global) == len(of_local) == 1
    first, second = (torch.softmax(logits[0], 1)[:, 1:] for logits in (of_global, of_local))
    torch.testing.assert_close(probabilities["global_probability"], first)
    # Training crops in float, inference in uint8.
    torch.testing.assert_close(probabilities["local_probability"], second, rtol=0, atol=5e-3)
    fused = (probabilities["global_probability"] + probabilities["local_probability"]) / 2
    torch.testing.assert_close(probabilities["probability"], fused)
    assert torch.equal(model.probabilities("global", image)["probability"], probabilities["global_probability"])


def test_kalm_crops_the_key_area_from_the_large_image():
    """I448, not I224: what the half-scale global CNN cannot see changes the key image."""
    model = kalm().eval()
    image = radiographs(1)
    stages = model.stages()
    _, activation, _ = stages["global_encoder"](image)
    box, key_image, _ = stages["key_area_crop"](image, activation)
    assert key_image.shape == (1, 1, 48, 48)
    assert box[0].tolist()[2] - box[0].tolist()[0] == pytest.approx(SIZE / 2)  # half extents of 0.5: half the image
    x0, y0 = box[0, :2].round().int().tolist()
    if torch.equal(box, box.round()):
        assert torch.equal(key_image[0, 0], image[0, 0, y0 : y0 + 48, x0 : x0 + 48])


# -- what a phase trains


def test_frozen_statistics_stay_while_parameters_move():
    model = awake(msfm())
    schedule = replace(UNFROZEN, frozen_statistics=True)
    set_training(model, "joint", schedule)
    before = state_of(model.encoder)
    step(model, "joint", create_optimizer(model, schedule), radiographs())
    kept = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert set(same(before, model.encoder.state_dict())) == kept


def test_frozen_modules_keep_parameters_and_statistics():
    model = awake(Plain(PlainConfig(BACKBONE, SIZE)))
    frozen = ("conv1", "bn1", "layer1")
    assert {name for name, _ in model.encoder.backbone.named_children()} > set(frozen)
    before = state_of(model.encoder.backbone)
    schedule = replace(UNFROZEN, weight_decay=0.1, frozen=frozen)
    set_training(model, "global", schedule)
    step(model, "global", create_optimizer(model, schedule), radiographs())
    kept = [name for name in before if name.split(".")[0] in frozen]
    assert same(before, model.encoder.backbone.state_dict()) == kept


def test_a_frozen_module_that_is_not_there_is_named():
    model = Plain(PlainConfig(BACKBONE, SIZE))
    with pytest.raises(ValueError, match=r"schedule.frozen: the backbone has no module 'conv_stem'; it has conv1, bn1"):
        set_training(model, "global", replace(UNFROZEN, frozen=("conv_stem",)))
