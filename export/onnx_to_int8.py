"""The encoder stages' ONNX to int8, calibrated on the training split and held to the bar as a flow.

The FMA encoder stays in fp32, as where the others are fp16: its map decides for every pixel whether it is dimmed, so
that some always flip under rounding, and what follows moves. Its int8 file holds fp32, for TensorRT builds an engine of
every encoder from the files of one precision.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import onnx
from onnx import ModelProto

from scaphoid.export.calibration import Figures, compare_flow, decoded, inputs_of, run_flow
from scaphoid.export.disk import SCRATCH, room_in
from scaphoid.export.formats import FORMATS, INT8, SERVED
from scaphoid.export.onnx_to_openvino import onnx_to_openvino
from scaphoid.export.quantize import Quantized, Round, quantize, search
from scaphoid.export.runner import OpenVinoStage
from scaphoid.export.tolerances import precision_of
from scaphoid.export.torch_to_onnx import check_door
from scaphoid.trainer.checkpoint import Model
from scaphoid.trainer.contracts import STAGES
from scaphoid.trainer.data.index import Index
from scaphoid.trainer.flows import FLOWS

FULL = ".onnx"  # suffix of the fp32 that int8 starts from


def onnx_to_int8(model: Model, chosen: tuple[Index, Index], artefacts: Path) -> dict:
    """Quantise the fp32 ONNX of every encoder stage of `model` in `artefacts`: writes the int8 ONNX beside it and, from
    that, what a CPU serves; returns the report, whose `failures` say by what the result misses its bar.

    The flow that `model` was trained for feeds the calibration on the first of the `chosen` images and is held against
    eager fp32 on the second. Raises RejectedImage, OSError.
    """
    trained, stages = FLOWS[getattr(model.config, "flow", model.system)], model.stages()
    encoders = [STAGES[name] for name in stages if STAGES[name].kind == "encoder"]
    in_fp32 = [stage for stage in encoders if precision_of(stage, "int8") == "f32"]
    calibration, validation = (decoded(index, model.config.image_size) for index in chosen)
    tensors, reference = (run_flow(trained, stages, radiographs) for radiographs in (calibration, validation))
    form = FORMATS["onnx"]
    quantized = {
        stage.name: quantize(onnx.load(form.path(artefacts, stage, FULL)), inputs_of(stage, trained, tensors))
        for stage in encoders
        if stage not in in_fp32
    }

    def measure(models: Mapping[str, ModelProto]) -> Figures:
        engines = {}
        with tempfile.TemporaryDirectory() as scratch, room_in(Path(scratch), SCRATCH):
            for name in set(models) & set(trained.stages):
                path = Path(scratch) / f"{name}{INT8}"
                path.write_bytes(models[name].SerializeToString())
                engines[name] = OpenVinoStage(path, STAGES[name], "int8")
        candidate = run_flow(trained, {**stages, **engines}, validation)
        return compare_flow(trained, validation.labels, reference, candidate)

    models, rounds = search(quantized, measure)
    for stage in in_fp32:
        shutil.copyfile(form.path(artefacts, stage, FULL), form.path(artefacts, stage, INT8))
    for stage in [STAGES[name] for name in models]:
        check_door(models[stage.name], stage)
        onnx.checker.check_model(models[stage.name], full_check=True)
        path = form.path(artefacts, stage, INT8)
        path.write_bytes(models[stage.name].SerializeToString(deterministic=True))
        onnx_to_openvino(path, stage, FORMATS[SERVED[stage.kind]].path(artefacts, stage, ".xml"))
    where = f"int8 of flow {trained.name}, {fraction(quantized, rounds[-1])} layers in int8"
    return {
        "flow": trained.name,
        "calibration_images": len(calibration.images),
        "validation_images": len(validation.images),
        "layers": {name: len(stage.layers) for name, stage in quantized.items()},
        "rounds": [{**asdict(each.figures), "fp32_layers": each.kept} for each in rounds],
        "notes": [f"{stage.name} is not in int8 but in fp32: its map decides for every pixel" for stage in in_fp32],
        "failures": [f"{where}: {line}" for line in rounds[-1].figures.missed],
    }


def fraction(quantized: Mapping[str, Quantized], attempt: Round) -> str:
    total = sum(len(stage.layers) for stage in quantized.values())
    return f"{total - sum(map(len, attempt.kept.values()))} of {total}"
