"""An encoder's ONNX to OpenVINO: the int8 that TensorRT is built from is the int8 that a CPU serves."""

from pathlib import Path

import openvino as ov

from scaphoid.trainer.contracts import Stage


def onnx_to_openvino(onnx: Path, stage: Stage, path: Path) -> None:
    """Convert `onnx` and save it to `path` (`.xml`; the weights go beside it), tensors named by the contract. Raises
    OSError when it cannot be written."""
    model = ov.convert_model(onnx)
    for port, tensor in zip([*model.inputs, *model.outputs], [*stage.inputs, *stage.outputs], strict=True):
        port.get_tensor().set_names({tensor.name})
    try:
        ov.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(f"{path} could not be written: {str(error).strip().splitlines()[-1]}") from error
