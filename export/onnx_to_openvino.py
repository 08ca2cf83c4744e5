"""An encoder's ONNX to OpenVINO: the int8 that TensorRT is built from is the int8 that a CPU serves."""

from pathlib import Path

import openvino as ov

from scaphoid.export.disk import claim
from scaphoid.trainer.contracts import Stage

TEXT = 2**20  # bytes of an .xml, at most about


def onnx_to_openvino(onnx: Path, stage: Stage, path: Path) -> None:
    """Convert `onnx` and save it to `path` (`.xml`; the weights go beside it), tensors named by the contract. Raises
    OSError when it cannot be written."""
    model = ov.convert_model(onnx)
    for port, tensor in zip([*model.inputs, *model.outputs], [*stage.inputs, *stage.outputs], strict=True):
        port.get_tensor().set_names({tensor.name})
    write(model, path)


def write(model: ov.Model, path: Path) -> None:
    """Write `model` as it is. Raises OSError, with the system's reason on a full disk: OpenVINO's own, whatever
    happened, is "basic_ios::clear: iostream error"."""
    try:
        ov.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        path.with_suffix(".bin").unlink(missing_ok=True)
        claim(path, TEXT + sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant"))
        raise OSError(f"{path} could not be written: {str(error).strip().splitlines()[-1]}") from error
