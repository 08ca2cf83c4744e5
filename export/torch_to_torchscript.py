"""A stage, or a whole flow, to TorchScript: glue scripted, as Triton's pytorch backend loads it; the rest traced.

    torch.ops.load_library("libscaphoid_ops.so")
    flow = torch.jit.load("torchscript/msfm.pt")  # from C++: export/cpp/run_flow.cpp

The names of the outputs, in order, are in the file (`_extra_files={"outputs": ""}`).
"""

import io
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from scaphoid.export.flow_module import FlowModule
from scaphoid.trainer.contracts import STAGES, Stage

OUTPUTS = "outputs"  # the file in the archive that names the outputs, one a line


class Flat(nn.Module):
    """A module to trace as one class. TorchScript gives every module of a tree a class of its own, numbered by what the
    process has traced before, so that a tree never has the same bytes twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters():
            self.register_parameter(name.replace(".", "_"), parameter)
        for name, buffer in module.named_buffers():
            self.register_buffer(name.replace(".", "_"), buffer)
        for name, scripted in module.named_modules():
            if isinstance(scripted, torch.jit.ScriptModule):
                self.add_module(name.replace(".", "_"), scripted)
        self.forward = module.forward


def torch_to_torchscript(module: nn.Module, example: tuple[Tensor, ...], stage: Stage, path: Path) -> None:
    """Convert `module` and save it to `path`: the same module gives the same bytes. `example` are inputs of two or more
    images; the batch is dynamic, every other dim of what is traced is fixed to theirs.

    The pytorch backend binds inputs by the names of `forward`'s arguments, so those of glue must be the contract's, in
    its order. Raises ValueError when they are not.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # TorchScript is deprecated, but still what Triton's backend batches.
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="The TorchScript type system", category=UserWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # every size but the batch is fixed: wanted
        scripted = _convert(module.eval(), example, stage)
        arguments = forward_arguments(scripted)
        expected = [tensor.name for tensor in stage.inputs]
        if stage.kind == "glue" and arguments != expected:
            raise ValueError(
                f"stage {stage.name}: forward takes {arguments}, the contract says {expected}; rename the arguments"
            )
        file = io.BytesIO()
        torch.jit.save(scripted, file, _extra_files={OUTPUTS: "\n".join(tensor.name for tensor in stage.outputs)})
    path.write_bytes(canonical(file))  # from memory: a full disk is an OSError that names the file


def _convert(module: nn.Module, example: tuple[Tensor, ...], stage: Stage) -> torch.jit.ScriptModule:
    if stage.kind == "glue":
        return torch.jit.script(module)
    if isinstance(module, FlowModule):
        stages = module.stages.items()
        glue = {name: torch.jit.script(each) for name, each in stages if STAGES[name].kind == "glue"}
        module = FlowModule(module.flow, {**module.stages, **glue})
    return torch.jit.trace(Flat(module), example, check_trace=False)


def forward_arguments(scripted: torch.jit.ScriptModule) -> list[str]:
    """Names of the arguments of a scripted module's `forward`."""
    return [argument.name for argument in scripted.forward.schema.arguments[1:]]


def canonical(file: io.BytesIO) -> bytes:
    """A TorchScript archive without what differs from one export, or machine, to the next: the numbers that tell apart
    classes of one name, the paths and lines of the sources, the hash over both."""
    out = io.BytesIO()
    with zipfile.ZipFile(file) as before, zipfile.ZipFile(out, "w") as after:
        for name in before.namelist():
            if name.endswith((".debug_pkl", "serialization_id")):
                continue
            content = before.read(name)
            if name.endswith((".py", "data.pkl")):
                content = re.sub(rb"\.___torch_mangle_\d+", b"", content)
            name = re.sub(r"/___torch_mangle_\d+\.py$", ".py", name)
            if name in after.namelist():
                raise ValueError(f"{name}: two classes of one name in one TorchScript; give one another name")
            after.writestr(zipfile.ZipInfo(name), content)  # stored, dated 1980
    return out.getvalue()
