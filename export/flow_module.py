"""A whole flow as one module, for the formats that carry one: preprocessed radiographs in, the flow's outputs out."""

from collections.abc import Mapping

from torch import Tensor, nn

from scaphoid.trainer.contracts import IMAGE, ORIGINAL_SIZE, Stage
from scaphoid.trainer.flows import Flow

FLOW = "flow"  # the kind of a stage that is a whole flow


def flow_stage(flow: Flow) -> Stage:
    """The door of a flow behind its preprocessing, as if it were one stage: the outputs in the flow's order."""
    tensors = {step.outputs[tensor.name]: tensor for step in flow.steps for tensor in step.stage.outputs}
    return Stage(flow.name, FLOW, (IMAGE, ORIGINAL_SIZE), tuple(tensors[name] for name in flow.outputs))


class FlowModule(nn.Module):
    """Runs the flow's table over the modules of its `stages` (stage name -> module)."""

    def __init__(self, flow: Flow, stages: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.flow = flow
        self.stages = nn.ModuleDict({name: stages[name] for name in flow.stages if name in stages})

    def forward(self, image: Tensor, original_size: Tensor) -> tuple[Tensor, ...]:
        """uint8 Tensor[B, 1, H, W] and the sizes int32 [B, 2] of the radiographs before they were resized, to every
        output of the flow."""
        given = {IMAGE.name: image, ORIGINAL_SIZE.name: original_size}
        tensors = self.flow.run(self.stages, given, self.flow.outputs)
        return tuple(tensors[name] for name in self.flow.outputs)
