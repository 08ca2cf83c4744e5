"""What a glue stage computes with besides its inputs: the manifest carries it, for runners without torch."""

from typing import Any


def settings(module: Any) -> dict[str, Any]:
    """The numbers that a glue stage's `torch.nn.Module` was built with and has learnt, by name, for JSON: float32 comes
    back from it to the bit."""
    built = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return built | {name: parameter.tolist() for name, parameter in module.named_parameters()}
