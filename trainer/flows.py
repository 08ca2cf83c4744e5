"""How stages are wired, written once. Imports nothing heavy.

A flow's table drives eager inference, the in-process runner and (held against it by a test) the Triton ensembles. A
step runs one stage; its `inputs` and `outputs` map the stage's tensor names to the flow's. A step whose outputs nobody
asked for is skipped, so one `msfm` flow serves the full result, the cheap one without parts, and main-stage triage.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scaphoid.trainer.contracts import STAGES, Stage


@dataclass(frozen=True)
class Step:
    """One use of a stage. Two steps may use one: MSFM's main and object steps share the encoder and its weights."""

    name: str
    stage: Stage
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Flow:
    """`outputs` are what a client may ask for; `inputs` what it must send."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]

    def steps_for(self, wanted: Iterable[str], given: Iterable[str] = ()) -> tuple[Step, ...]:
        """The steps needed for the `wanted` outputs, in order, when the tensors `given` are at hand. Raises ValueError
        on an unknown output."""
        needed, given = set(wanted), set(given)
        if unknown := needed - set(self.outputs):
            raise ValueError(f"flow {self.name} has no output {sorted(unknown)}; it has {list(self.outputs)}")
        chosen = []
        for step in reversed(self.steps):
            if (needed - given) & set(step.outputs.values()):
                chosen.append(step)
                needed |= set(step.inputs.values())
        return tuple(reversed(chosen))

    def run(self, stages: Mapping[str, Callable], tensors: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
        """Run the steps that `wanted` needs over `stages` (stage name -> function of its contract's inputs, in order,
        giving its outputs in order, or the only one bare). `tensors` holds the flow's inputs, or any tensors from
        which the rest follows: steps that only lead up to them are not run. Returns all tensors, computed and given."""
        known = dict(tensors)
        for step in self.steps_for(wanted, tensors):
            outputs = stages[step.stage.name](*(known[step.inputs[tensor.name]] for tensor in step.stage.inputs))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            names = (step.outputs[tensor.name] for tensor in step.stage.outputs)
            known = {**known, **dict(zip(names, outputs, strict=True)), **tensors}
        return known

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in use, each once, in order of first use."""
        return tuple(dict.fromkeys(step.stage.name for step in self.steps))


def _step(name: str, stage: str, **renamed: str) -> Step:
    """A step of `stage`; a tensor keeps its name unless `renamed`. `suppress` alone reads and writes an `image`: its
    output is renamed by `image_out`."""
    definition = STAGES[stage]
    output_image = renamed.pop("image_out", renamed.get("image", "image"))
    inputs = {tensor.name: renamed.get(tensor.name, tensor.name) for tensor in definition.inputs}
    outputs = {tensor.name: renamed.get(tensor.name, tensor.name) for tensor in definition.outputs}
    if "image" in outputs:
        outputs["image"] = output_image
    return Step(name, definition, inputs, outputs)


def _msfm_steps(image: str) -> tuple[Step, ...]:
    """Main, object and parts stages on the flow tensor called `image`."""
    main, of_object = (
        {name: f"{step}_{name}" for name in ("logits", "activation", "class_activation")} for step in ("main", "object")
    )
    return (
        _step("main", "encoder", image=image, **main),
        _step("main_result", "main_result"),
        _step(
            "object_crop",
            "object_crop",
            image=image,
            activation="main_activation",
            class_activation="main_class_activation",
        ),
        _step("object", "encoder", image="object_image", **of_object),
        _step("part_crops", "part_crops", activation="object_activation"),
        _step("result", "result"),
        _step("parts", "parts_encoder"),
        _step("parts_result", "parts_result"),
    )


MSFM_OUTPUTS = (
    "probability",
    "main_probability",
    "object_probability",
    "box",
    "main_box",
    "window_boxes",
    "window_scores",
    "margin",
    "parts_probability",
    "probability_with_parts",
)

FLOWS = {
    flow.name: flow
    for flow in (
        Flow("msfm", ("encoded",), MSFM_OUTPUTS, (_step("preprocess", "preprocess"), *_msfm_steps("image"))),
        Flow(
            "msfm_fma",
            ("encoded",),
            MSFM_OUTPUTS,
            (
                _step("preprocess", "preprocess"),
                _step("fma", "fma_encoder", activation="fma_activation"),
                _step("suppress", "suppress", activation="fma_activation", image_out="suppressed_image"),
                *_msfm_steps("suppressed_image"),
            ),
        ),
        Flow(
            "kalm",
            ("encoded",),
            ("probability", "global_probability", "local_probability", "box", "margin"),
            (
                _step("preprocess", "preprocess"),
                _step(
                    "global",
                    "global_encoder",
                    logits="global_logits",
                    activation="global_activation",
                    class_activation="global_class_activation",
                ),
                _step("key_area_crop", "key_area_crop", activation="global_activation"),
                _step("local", "local_encoder", logits="local_logits"),
                _step("result", "key_area_result"),
            ),
        ),
    )
}
