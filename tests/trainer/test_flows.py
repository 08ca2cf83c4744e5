"""The wiring tables: what each wanted output costs, and that every wire has two fitting ends."""

import dataclasses

import pytest

from scaphoid.trainer import contracts
from scaphoid.trainer.contracts import STAGES, Tensor
from scaphoid.trainer.flows import FLOWS, Flow

TENSORS = {tensor.name: tensor for tensor in vars(contracts).values() if isinstance(tensor, Tensor)}
WHOLE_MSFM = ["preprocess", "main", "object_crop", "object", "part_crops", "result"]


def names(flow: Flow, *wanted: str) -> list[str]:
    return [step.name for step in flow.steps_for(wanted)]


def trace(flow: Flow, tensors: dict[str, str], *wanted: str) -> tuple[dict[str, str], list[str]]:
    """Run the flow over stages that write down how each tensor came about, and which of them ran."""
    ran = []

    def stage(name: str):
        def call(*inputs: str) -> str | tuple[str, ...]:
            ran.append(name)
            outputs = tuple(f"{name}.{tensor.name}({','.join(inputs)})" for tensor in STAGES[name].outputs)
            return outputs if len(outputs) > 1 else outputs[0]

        return call

    return flow.run({name: stage(name) for name in flow.stages}, tensors, wanted), ran


def test_triage_costs_one_encoder_pass():
    assert names(FLOWS["msfm"], "main_probability") == ["preprocess", "main", "main_result"]
    assert names(FLOWS["msfm_fma"], "main_probability") == ["preprocess", "fma", "suppress", "main", "main_result"]


@pytest.mark.parametrize(
    "wanted", ["probability", "object_probability", "box", "main_box", "window_boxes", "window_scores", "margin"]
)
def test_boxes_and_probability_do_not_pay_for_the_parts(wanted):
    assert names(FLOWS["msfm"], wanted) == WHOLE_MSFM


@pytest.mark.parametrize("wanted", ["parts_probability", "probability_with_parts"])
def test_only_these_pay_for_the_parts(wanted):
    assert names(FLOWS["msfm"], wanted) == [*WHOLE_MSFM[:-1], "parts", "parts_result"]


def test_kalm_global_probability_needs_the_whole_flow_as_one_stage_answers():
    assert names(FLOWS["kalm"], "global_probability") == ["preprocess", "global", "key_area_crop", "local", "result"]


@pytest.mark.parametrize("flow", FLOWS.values(), ids=lambda flow: flow.name)
def test_all_outputs_run_every_step_in_order(flow):
    assert flow.steps_for(flow.outputs) == flow.steps
    assert flow.steps_for([]) == ()


@pytest.mark.parametrize("flow", FLOWS.values(), ids=lambda flow: flow.name)
def test_an_unknown_output_is_named(flow):
    with pytest.raises(ValueError, match=rf"flow {flow.name} has no output \['verdict'\]; it has \['probability'"):
        flow.steps_for(["probability", "verdict"])


@pytest.mark.parametrize("flow", FLOWS.values(), ids=lambda flow: flow.name)
def test_every_wire_has_two_fitting_ends(flow):
    """A tensor exists before it is read, is written once, and each end calls its dtype and dims the same."""
    known = {name: TENSORS[name] for name in flow.inputs}
    words: dict[tuple[str, str], str] = {}
    for step in flow.steps:
        assert step.stage is STAGES[step.stage.name]
        for tensor in step.stage.inputs:
            source = known[step.inputs[tensor.name]]
            assert source.dtype == tensor.dtype
            assert len(source.dims) == len(tensor.dims)
            for given, expected in zip(source.dims, tensor.dims, strict=True):
                if isinstance(given, int) or isinstance(expected, int):
                    assert given == expected, (step.name, tensor.name)
                else:  # one word of a stage stands for one size within a step: whose?
                    assert words.setdefault((step.name, expected), given) == given, (step.name, tensor.name)
        assert len(step.inputs) == len(step.stage.inputs)
        assert list(step.outputs) == [tensor.name for tensor in step.stage.outputs]
        for tensor in step.stage.outputs:
            name = step.outputs[tensor.name]
            assert name not in known, f"{step.name} writes {name} again"
            renamed = tuple(words.get((step.name, dim), dim) for dim in tensor.dims)
            known[name] = dataclasses.replace(tensor, dims=renamed)
            if name in TENSORS:  # under one name there is one kind of tensor
                assert (TENSORS[name].dtype, len(TENSORS[name].dims)) == (tensor.dtype, len(tensor.dims))
    for name in flow.outputs:
        assert known[name] == TENSORS[name]


def test_contract_names_are_keys_and_constants():
    assert all(name == stage.name for name, stage in STAGES.items())
    assert all(vars(contracts)[name.upper()] is tensor for name, tensor in TENSORS.items())
    assert contracts.PART_IMAGES.triton_dims == [7, 1, -1, -1]
    used = {name for flow in FLOWS.values() for name in flow.stages}
    assert used == set(STAGES)


def test_run_wires_the_right_maps_to_the_right_steps():
    known, ran = trace(FLOWS["msfm_fma"], {"encoded": "bytes"}, *FLOWS["msfm_fma"].outputs)
    image = "preprocess.image(bytes)"
    seen = f"suppress.image({image},fma_encoder.activation({image}))"
    main = f"encoder.activation({seen}),encoder.class_activation({seen})"
    crop = f"object_crop.object_image({seen},{main})"
    assert known["suppressed_image"] == seen
    assert known["object_image"] == crop
    assert known["part_images"] == f"part_crops.part_images({crop},encoder.activation({crop}))"
    logits = f"encoder.logits({seen}),encoder.logits({crop})"
    assert known["parts_probability"].startswith(f"parts_result.parts_probability({logits},parts_encoder.parts_logits(")
    assert known["probability"].startswith(f"result.probability({logits},object_crop.object_box(")
    assert ran.count("encoder") == 2


def test_run_starts_in_the_middle():
    _, ran = trace(FLOWS["msfm"], {"image": "I", "original_size": "S"}, "main_probability")
    assert ran == ["encoder", "main_result"]
    tensors = {"suppressed_image": "I", "original_size": "S"}
    known, ran = trace(FLOWS["msfm_fma"], tensors, "box")
    assert ran == ["encoder", "object_crop", "encoder", "part_crops", "result"]
    assert known["box"].endswith(",S)")
    assert known["suppressed_image"] == "I"


def test_run_keeps_what_was_given():
    known, ran = trace(FLOWS["kalm"], {"encoded": "bytes", "image": "I"}, "box")
    assert ran[0] == "preprocess"  # for the original size alone
    assert known["image"] == "I"
    assert "global_encoder.activation(I)" in known["key_box"]


def test_run_refuses_a_stage_with_too_few_outputs():
    with pytest.raises(ValueError, match="zip"):
        FLOWS["msfm"].run({"encoder": lambda image: ("logits", "activation")}, {"image": "I"}, ["main_probability"])
