"""GPUs by name: what their makers' data sheets say of speed, memory and links."""

from __future__ import annotations

from dataclasses import dataclass

from hamner.errors import UserError, nearest


@dataclass(frozen=True)
class GPU:
    name: str  # as it stands in the driver's name of the card
    flops: float  # dense fp16/bf16 FLOP/s with fp32 accumulation
    memory: float  # GiB; the sheets' GB are that, near enough
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s, one way, to the other GPUs of its machine
    link_name: str


# Data sheets of NVIDIA's. The GeForce cards exchange over PCIe x16: 4.0 has 32 GB/s a direction,
# 5.0 has 64. NVLink's figures there count both directions: half of them stands here.
GPUS = {
    gpu.name.lower().replace(" ", ""): gpu
    for gpu in (
        GPU("RTX 3090", 71e12, 24, 936e9, 32e9, "PCIe 4.0"),
        GPU("RTX 4090", 165e12, 24, 1_008e9, 32e9, "PCIe 4.0"),
        GPU("RTX 5090", 210e12, 32, 1_792e9, 64e9, "PCIe 5.0"),
        GPU("A100", 312e12, 80, 2_039e9, 300e9, "NVLink"),
        GPU("H100 PCIe", 756e12, 80, 2_000e9, 64e9, "PCIe 5.0"),
        GPU("H100", 989e12, 80, 3_350e9, 450e9, "NVLink"),
        GPU("H200", 989e12, 141, 4_800e9, 450e9, "NVLink"),
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU that is called so, whatever its capitals and spaces: `rtx3090`, `RTX 3090`, `3090`.

    Raises:
        UserError: there is none on record.
    """
    plain = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    for key in (plain, f"rtx{plain}"):
        if key in GPUS:
            return GPUS[key]
    raise UserError(
        f"--plan {name}: no such GPU on record{nearest(plain, GPUS)}; known are {', '.join(GPUS)}"
    )


def gpu_of_driver(driver_name: str) -> GPU | None:
    """The GPU of a driver's name such as `NVIDIA GeForce RTX 3090`; None if it isn't on record."""
    return next((gpu for gpu in GPUS.values() if gpu.name in driver_name), None)
