"""The little of the CUDA runtime that a plan needs, by ctypes from libcudart: memory, one stream, graphs. CUDA 12 and
later. Not run on hardware."""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaphoid.export.edge.ops import Call, OpError

NAMES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12")
NON_BLOCKING, THREAD_LOCAL, DEFAULT_COPY = 1, 1, 4  # cudaStreamNonBlocking, cudaStreamCaptureMode..., cudaMemcpyDefault


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A dense array in the GPU's memory, at `address`, until nobody refers to it."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype


class CudaRuntime:
    """The GPU that this process sees first, and one stream on it. Raises OpError without CUDA or without a GPU."""

    def __init__(self) -> None:
        self._library = _load()
        stream = ctypes.c_void_p()
        self._check("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(NON_BLOCKING))
        self.stream: int = stream.value or 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        address = self._allocate("cudaMalloc", shape, dtype)
        array = DeviceArray(address, tuple(shape), dtype)
        weakref.finalize(array, self._library.cudaFree, ctypes.c_void_p(address))
        return array

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in host memory that the GPU copies from and to by itself."""
        address = self._allocate("cudaMallocHost", shape, dtype)
        memory = (ctypes.c_char * _bytes(shape, dtype)).from_address(address)
        weakref.finalize(memory, self._library.cudaFreeHost, ctypes.c_void_p(address))
        return np.frombuffer(memory, dtype).reshape(shape)

    def upload(self, array: np.ndarray) -> DeviceArray:
        """A copy of an array that never changes."""
        copied = self.empty(array.shape, array.dtype)
        self.copy(copied, array)
        self.synchronise()
        return copied

    def copy(self, to: DeviceArray | np.ndarray, of: DeviceArray | np.ndarray) -> None:
        """In the stream's order, between arrays of one size, either of them on the GPU."""
        places = (
            ctypes.c_void_p(each.ctypes.data if isinstance(each, np.ndarray) else each.address) for each in (to, of)
        )
        size = ctypes.c_size_t(_bytes(to.shape, to.dtype))
        self._check("cudaMemcpyAsync", *places, size, ctypes.c_int(DEFAULT_COPY), ctypes.c_void_p(self.stream))

    def synchronise(self) -> None:
        self._check("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def capture(self, calls: Sequence[Call]) -> Call:
        """The `calls` as one graph: a launch instead of hundreds. They run once before, for an engine prepares at its
        first run what a capture does not allow."""
        for call in calls:
            call()
        self.synchronise()
        stream, graph, executable = ctypes.c_void_p(self.stream), ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cudaStreamBeginCapture", stream, ctypes.c_int(THREAD_LOCAL))
        try:
            for call in calls:
                call()
        finally:
            self._check("cudaStreamEndCapture", stream, ctypes.byref(graph))
        self._check("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._check("cudaGraphDestroy", graph)
        return lambda: self._check("cudaGraphLaunch", executable, stream)

    def _allocate(self, function: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
        address = ctypes.c_void_p()
        self._check(function, ctypes.byref(address), ctypes.c_size_t(_bytes(shape, dtype)))
        return address.value or 0

    def _check(self, function: str, *arguments: object) -> None:
        if status := getattr(self._library, function)(*arguments):
            said = self._library.cudaGetErrorString
            said.restype = ctypes.c_char_p
            raise OpError(f"{function}: {said(status).decode()} (CUDA error {status})")


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _load() -> ctypes.CDLL:
    for name in NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OpError(f"no CUDA runtime here ({', '.join(NAMES)}): install CUDA 12 or later, or use engines openvino")
