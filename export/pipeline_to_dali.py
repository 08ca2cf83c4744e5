"""Preprocessing to the `model.dali` that Triton's DALI backend loads: the same size gives the same bytes, on every
machine."""

from pathlib import Path

from scaphoid.trainer.data.pipeline import serialize


def pipeline_to_dali(path: Path, image_size: int, batch_size: int, device: str = "cpu") -> None:
    """Serialise the preprocessing for images of `image_size` pixels to `path`, for up to `batch_size` images a run.
    `device`: where it will run, `cpu` or `mixed` (a GPU); no GPU is needed to write it."""
    from nvidia.dali._utils import dali_trace

    traced = dali_trace.is_tracing_enabled()
    dali_trace.set_tracing(enabled=False)  # it writes the paths and lines of the sources on this machine into the file
    try:
        serialize(path, image_size, batch_size, device)
    finally:
        dali_trace.set_tracing(enabled=traced)
