"""A stage, or a whole flow, to torch.export's `.pt2`: loads with torch and the op library, without this package.

    torch.ops.load_library("libscaphoid_ops.so")  # for glue and flows
    stage = torch.export.load("exported/object_crop.pt2").module()

Loading needs no fake kernels: the shapes were worked out here and travel in the file. What starts from the graph and
works out shapes again (AOTInductor, torch-tensorrt) needs this package for glue.
"""

import io
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from scaphoid.trainer.contracts import Stage


def torch_to_exported(module: nn.Module, example: tuple[Tensor, ...], stage: Stage, path: Path) -> None:
    """Export `module` and save it to `path`: the same module gives the same bytes. `example` are inputs of two or more
    images; the batch is dynamic, every other dim is fixed to theirs. Raises ValueError when the batch cannot be."""
    # They travel in the file, and what an encoder computed differs in its last digits between machines.
    example = tuple(map(torch.zeros_like, example))
    shapes = tuple({0: Dim("batch", min=1)} for _ in example)
    try:
        with torch.no_grad():
            program = torch.export.export(module.eval(), example, dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as error:
        raise ValueError(f"stage {stage.name} does not take any batch: {error}") from error
    for graph in [each.graph for each in program.graph_module.modules() if isinstance(each, fx.GraphModule)]:
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)  # paths and lines of the sources on this machine
    file = io.BytesIO()
    torch.export.save(program, file)
    path.write_bytes(file.getvalue())
