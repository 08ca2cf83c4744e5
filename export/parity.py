"""Holds an engine against eager fp32, image by image: probabilities, boxes, and the margin that explains a difference.

    python -m scaphoid.export.parity msfm.safetensors artefacts radiographs/*.png --flow msfm

A hard decision (a threshold, an argmax) whose margin is below the engine's error may fall on the other side; everything
after it then differs by far. So differences are counted, and every one is shown beside its margin.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scaphoid.export.artefacts import ManifestError, read_manifest
from scaphoid.export.precision import Precision, effective_precision
from scaphoid.export.runner import Runner, eager_stages, load_served, run
from scaphoid.trainer.flows import FLOWS, Flow
from scaphoid.trainer.localization import iou

Answer = Mapping[str, np.ndarray]  # a flow's tensors by name, of one image


@dataclass(frozen=True)
class Bar:
    """How close an engine must come: `probability` absolute, `iou` and `pixels` of boxes, in the `share` of images that
    count. In reduced precision only images whose margin exceeds the engine's map error count; in full precision all do,
    and every one of them must keep its probabilities."""

    probability: float
    pixels: float
    iou: float
    share: float
    margin_counts: bool


BARS: dict[Precision, Bar] = {
    "f32": Bar(probability=1e-3, pixels=1.0, iou=0.0, share=0.995, margin_counts=False),
    "bf16": Bar(probability=0.02, pixels=np.inf, iou=0.9, share=0.95, margin_counts=True),
}


@dataclass(frozen=True)
class Difference:
    """One image: the largest difference of any probability and of any box coordinate (original pixels), the smallest
    IoU of any box with its counterpart, the reference's margin."""

    image: str
    probability: float
    pixels: float
    iou: float
    margin: float

    def within(self, bar: Bar) -> bool:
        return self.probability <= bar.probability and self.pixels <= bar.pixels and self.iou >= bar.iou


@dataclass(frozen=True)
class Parity:
    """All images of one comparison. `map_error`: largest difference of an activation map, relative to the map's
    maximum."""

    differences: tuple[Difference, ...]
    map_error: float
    bar: Bar

    @property
    def counted(self) -> list[Difference]:
        return [each for each in self.differences if not self.bar.margin_counts or each.margin > self.map_error]

    @property
    def exceptions(self) -> list[Difference]:
        """Images beyond the bar, whether they count or not."""
        return [each for each in self.differences if not each.within(self.bar)]

    @property
    def share(self) -> float:
        """Share of the images that count which stay within the bar; NaN when none counts."""
        counted = self.counted
        return sum(each.within(self.bar) for each in counted) / len(counted) if counted else float("nan")

    @property
    def passed(self) -> bool:
        kept = all(each.probability <= self.bar.probability for each in self.differences)
        return self.share >= self.bar.share and (kept or self.bar.margin_counts)


def difference(image: str, flow: Flow, reference: Answer, candidate: Answer) -> Difference:
    """Compare the outputs of one image. Both answers hold every output of `flow`, without or with a batch dim of 1."""
    probabilities = [name for name in flow.outputs if "probability" in name]
    boxes = [name for name in flow.outputs if "box" in name]
    a = np.concatenate([np.reshape(reference[name], (-1, 4)) for name in boxes])
    b = np.concatenate([np.reshape(candidate[name], (-1, 4)) for name in boxes])
    return Difference(
        image,
        max(float(np.abs(reference[name] - candidate[name]).max()) for name in probabilities),
        float(np.abs(a - b).max()),
        float(iou(a, b).min()),
        float(np.squeeze(reference["margin"])),
    )


def map_difference(reference: Answer, candidate: Answer) -> float:
    """Largest difference of an activation map of the flow's first encoder, relative to the map's maximum. Later maps
    belong to crops, which differ wherever a decision did."""
    names = [name for name in ("main", "global") if f"{name}_activation" in reference]
    maps = [f"{name}_{kind}" for name in names for kind in ("activation", "class_activation")]
    return max(float(np.abs(reference[m] - candidate[m]).max() / max(np.abs(reference[m]).max(), 1e-30)) for m in maps)


def compare(
    flow: Flow,
    images: Sequence[Path],
    reference: Callable[[bytes], Answer],
    candidate: Callable[[bytes], Answer],
    engine: Callable[[bytes], Answer],
    precision: Precision,
) -> Parity:
    """Run every image through `reference` and `candidate`. `engine` also gives the maps inside the flow, from which the
    map error is measured (a server does not show them; the same artefacts in process do)."""
    differences, errors = [], [0.0]
    for path in track(images, "comparing", console=Console(stderr=True), transient=True):
        encoded = path.read_bytes()
        wanted, inside = reference(encoded), engine(encoded)
        errors.append(map_difference(wanted, inside))
        differences.append(difference(path.name, flow, wanted, inside if candidate is engine else candidate(encoded)))
    return Parity(tuple(differences), max(errors), BARS[precision])


def answers(flow: Flow, stages: Mapping[str, Callable]) -> Callable[[bytes], Answer]:
    """A function from one encoded image to every tensor of `flow` over `stages`."""

    def answer(encoded: bytes) -> Answer:
        tensors = run(flow, stages, [encoded], flow.outputs)
        return {name: tensor.numpy() for name, tensor in tensors.items() if name not in flow.inputs}

    return answer


def eager_answers(weights: Path, flow: Flow) -> Callable[[bytes], Answer]:
    """Eager fp32 stages of a weights file. Raises ValueError when no flow serves its model."""
    model = load_served(weights)
    return answers(flow, eager_stages(model, model.config.image_size))


def table(parity: Parity) -> Iterator[Table | str]:
    """What to print: the verdict, then every exception with its margin."""
    bar, counted = parity.bar, parity.counted
    verdict = "passed" if parity.passed else "FAILED"
    yield (
        f"{len(parity.differences)} images, map error {parity.map_error:.2g}; {len(counted)} count, "
        f"{parity.share:.1%} of them within the bar (at least {bar.share:.1%}): {verdict}"
    )
    yield f"largest probability difference {max(each.probability for each in parity.differences):.2g}"
    if parity.exceptions:
        rows = Table(
            "image", "probability difference", "box difference (pixels)", "IoU", "margin", title="beyond the bar"
        )
        for each in parity.exceptions:
            rows.add_row(
                each.image, f"{each.probability:.4f}", f"{each.pixels:.1f}", f"{each.iou:.2f}", f"{each.margin:.2g}"
            )
        yield rows


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare exported engines, run in process, with the eager fp32 model. Exits 1 when the bar is missed."""

    weights: tyro.conf.Positional[Path]
    """The weights file that the artefacts were exported from."""
    artefacts: tyro.conf.Positional[Path]
    """Folder that scaphoid-export wrote."""
    images: tyro.conf.Positional[list[Path]]
    """Radiographs: PNG, JPEG, BMP, TIFF or PGM files."""
    flow: str = "msfm"
    """msfm, msfm_fma or kalm."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    try:
        flow = FLOWS[arguments.flow]
        wanted = read_manifest(arguments.artefacts)["precision"]
        if (precision := effective_precision(wanted)) != wanted:
            print(f"this CPU has no {wanted}: the engines run, and are judged, in {precision}")
        engine = answers(flow, Runner(arguments.artefacts, arguments.flow).stages)
        parity = compare(flow, arguments.images, eager_answers(arguments.weights, flow), engine, engine, precision)
    except KeyError:
        sys.exit(f"parity: unknown flow {arguments.flow!r}: expected one of {', '.join(FLOWS)}")
    except (ManifestError, OSError, ValueError) as error:
        sys.exit(f"parity: {error}")
    for part in table(parity):
        Console().print(part)
    sys.exit(0 if parity.passed else 1)


if __name__ == "__main__":
    main()
