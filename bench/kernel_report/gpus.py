"""What GPUs allow and reach on paper: the limits behind occupancy, and the peaks behind a roofline."""

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of 32 bits, an SM; the same from 7.5 to 12.1
REGISTER_UNIT = 256  # registers are given to a warp in units of so many
WARP_UNIT = 4  # and to whole groups of warps: one for each of an SM's four parts
SHARED_KIB = 1024


@dataclass(frozen=True)
class Limits:
    """Of one SM. `reserved_shared`: bytes that the system takes of each block's shared memory. Source: CUDA Programming
    Guide 13, appendix Compute Capabilities, "Technical Specifications"; allocation units: the guide's occupancy
    calculator (cuda_occupancy.h)."""

    warps: int
    blocks: int
    shared_kib: int
    reserved_shared: int = 1024
    shared_unit: int = 128


LIMITS = {
    75: Limits(32, 16, 64, reserved_shared=0, shared_unit=256),
    80: Limits(64, 32, 164),
    86: Limits(48, 16, 100),
    87: Limits(48, 16, 164),
    89: Limits(48, 24, 100),
    90: Limits(64, 32, 228),
    100: Limits(64, 32, 228),
    110: Limits(48, 24, 228),
    120: Limits(48, 24, 100),
}


@dataclass(frozen=True)
class Occupancy:
    """`blocks` and `warps` that one SM holds at once, `share` of its warps, and what stops it from holding more."""

    blocks: int
    warps: int
    share: float
    limit: str


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(architecture: int, threads: int, registers: int, shared: int) -> Occupancy:
    """Theoretical occupancy of blocks of `threads` threads with so many registers each and `shared` bytes a block,
    static and dynamic. Raises KeyError for an unknown architecture."""
    limits = LIMITS[architecture]
    warps = -(-threads // WARP)
    a_warp = _up(registers * WARP, REGISTER_UNIT)
    by_registers = REGISTERS // a_warp // WARP_UNIT * WARP_UNIT // warps if registers else limits.blocks
    shared = _up(shared + limits.reserved_shared, limits.shared_unit)
    bounds = {
        "blocks": limits.blocks,
        "warps": limits.warps // warps,
        "registers": by_registers,
        "shared memory": limits.shared_kib * SHARED_KIB // shared if shared else limits.blocks,
    }
    limit = min(bounds, key=bounds.__getitem__)
    blocks = bounds[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, limit)


@dataclass(frozen=True)
class Gpu:
    """Published peaks: memory in GB/s, arithmetic in TFLOPS, a multiply-add being two operations; `fp16` is dense, by
    the tensor cores."""

    name: str
    architecture: int
    memory_gb_per_s: float
    fp32: float
    fp64: float
    fp16: float
    source: str

    def roofline_us(
        self, moved_bytes: float, fp32_flop: float = 0, fp64_flop: float = 0, fp16_flop: float = 0
    ) -> float:
        """The time that nothing which moves and computes as much can stay below: memory and each kind of arithmetic at
        its peak, all at once."""
        seconds = (
            moved_bytes / (1e9 * self.memory_gb_per_s),
            fp32_flop / (1e12 * self.fp32),
            fp64_flop / (1e12 * self.fp64),
            fp16_flop / (1e12 * self.fp16),
        )
        return 1e6 * max(seconds)


GPUS = (
    Gpu("H100 SXM", 90, 3350, 67, 34, 989, "NVIDIA H100 data sheet (fp16: half of the sparse 1,979)"),
    Gpu("L4", 89, 300, 30.3, 0.473, 121, "NVIDIA L4 data sheet (fp16: half of the sparse 242; fp64: 1/64 of fp32)"),
    Gpu(
        "Jetson AGX Orin 64GB",
        87,
        204.8,
        5.3,
        0.083,
        42.5,
        "Jetson AGX Orin technical brief v1.2 (fp16: a quarter of the GPU's sparse int8 170; fp64: 1/64 of fp32)",
    ),
    Gpu(
        "Jetson Thor T5000",
        110,
        273,
        8.06,
        0.126,
        259,
        "Jetson Thor data sheet: 2,560 cores at 1.575 GHz (fp32: two operations each; fp16: an eighth of the sparse "
        "fp4 2,070; fp64: not published, taken as 1/64 of fp32)",
    ),
)
