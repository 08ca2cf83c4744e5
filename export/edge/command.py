"""`scaphoid-edge`: a flow on this machine without a server, and what an edge device needs around it.

    scaphoid-edge predict artefacts wrist.png hand.jpg       JSON lines on standard output
    scaphoid-edge watch artefacts INBOX OUT                  predicts what arrives, until it is told to stop
    scaphoid-edge memory artefacts --batch 1 8               how much memory the flows take
    scaphoid-edge bundle artefacts OUT                       everything a Jetson needs, for a machine without network
    scaphoid-edge add ROOT artefacts; use ROOT VERSION; rollback ROOT

Exit code: 0; 1 when an image was not predicted; 2 for wrong usage, or artefacts and libraries that do not fit.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Event

from scaphoid.export.artefacts import ManifestError
from scaphoid.export.edge import versions
from scaphoid.export.edge.flow import BACKENDS, Flow
from scaphoid.export.edge.ops import OpError
from scaphoid.trainer.flows import FLOWS


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        return asked.run(asked) or 0
    except (ManifestError, OpError, versions.VersionError, ValueError, OSError, RuntimeError) as error:
        print(f"scaphoid-edge: {' '.join(str(error).split())}", file=sys.stderr)  # an engine's has several lines
        return 2


def _between(kind: type, least: float, most: float) -> Callable[[str], float]:
    """An argument's type: numbers of that `kind` from `least` to `most`."""

    def number(text: str) -> float:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text}: expected {least} to {most}")
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaphoid-edge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, *paths: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name)
        made.set_defaults(run=run)
        for path in paths:
            made.add_argument(path, type=Path)
        return made

    for made in (
        command("predict", _predict, "artefacts"),
        command("watch", _watch, "artefacts", "inbox", "out"),
    ):
        made.add_argument("--flow", default="msfm", choices=list(FLOWS))
        made.add_argument("--engines", default="openvino", choices=list(BACKENDS))
        made.add_argument(
            "--threads", type=_between(int, 0, 1024), default=0, help="of each engine and of decoding; 0: all cores"
        )
        made.add_argument("--no-parts", action="store_true", help="leave MSFM's windows unclassified: half the cost")
        if made.prog.endswith("watch"):
            made.add_argument(
                "--threshold",
                type=_between(float, 0, 1),
                help="abnormal at this probability or above; default: the artefacts' own",
            )
            made.add_argument(
                "--seconds", type=_between(float, 0.01, 86400), default=1.0, help="between two looks at the folder"
            )
        else:
            made.add_argument("images", nargs="+")
    memory = command("memory", _memory, "artefacts")
    memory.add_argument("--batch", type=_between(int, 1, 1024), nargs="+", default=[1, 4, 8])
    memory.add_argument("--precision", default="f16", choices=["f32", "f16", "bf16"])
    memory.add_argument("--threads", type=_between(int, 1, 1024), default=2, help="that decode at once")
    bundle = command("bundle", _bundle, "artefacts", "out")
    bundle.add_argument(
        "--precision", default="f16", choices=["f32", "f16", "int8"], help="which ONNX the engines are built from"
    )
    bundle.add_argument("--python", default="3.10", choices=["3.10", "3.11", "3.12"], help="the device's")
    bundle.add_argument("--no-wheels", action="store_true", help="download nothing: the device has numpy and Pillow")
    command("add", lambda asked: print(versions.add(asked.root, asked.artefacts).name), "root", "artefacts")
    command("use", lambda asked: print(versions.use(asked.root, asked.version).name), "root").add_argument("version")
    command("rollback", lambda asked: print(versions.rollback(asked.root).name), "root")
    return parser


def _wanted(asked: argparse.Namespace) -> list[str]:
    return [name for name in FLOWS[asked.flow].outputs if not (asked.no_parts and "parts" in name)]


def _predict(asked: argparse.Namespace) -> int:
    flow = Flow.load(asked.artefacts, asked.flow, asked.engines, asked.threads)
    results = flow.predict(asked.images, _wanted(asked))
    for result in results:
        print(json.dumps(asdict(result)))
    return int(any(result.reason for result in results))


def _watch(asked: argparse.Namespace) -> None:
    from scaphoid.export.edge.watch import Watch

    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    flow = Flow.load(asked.artefacts, asked.flow, asked.engines, asked.threads)
    print(f"watching {asked.inbox}: {flow.name} {flow.version}", flush=True)
    watching = Watch(
        flow, asked.inbox, asked.out, not asked.no_parts, asked.threshold, lambda status: print(status, flush=True)
    )
    watching.run(stop, asked.seconds)
    print("stopped", flush=True)


def _memory(asked: argparse.Namespace) -> None:
    from scaphoid.export.edge.memory import budgets, table

    print(table(budgets(asked.artefacts, asked.batch, asked.precision, asked.threads)))


def _bundle(asked: argparse.Namespace) -> None:
    from scaphoid.export.edge.bundle import bundle

    for line in bundle(asked.artefacts, asked.out, asked.precision, not asked.no_wheels, asked.python):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
