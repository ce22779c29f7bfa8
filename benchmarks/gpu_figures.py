"""What benchmarks/gpu_model.py assumes, all of it. Nothing here was measured with this package on a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Latencies of ViT-B/16 at 224 pixels, in ms by batch size, that others measured on a GPU.

    The share of the peak that is reached, and the time of a kernel, are fitted to them.
    """

    fp16_peak: float
    int8_peak: float
    fp16: dict[int, float]
    int8: dict[int, float]
    source: str


VIT_B_MACS, VIT_B_BLOCKS = 17.6e9, 12
PUBLISHED = {
    "T4": Published(
        65,
        130,
        {1: 3.43, 8: 14.46, 16: 28.77, 32: 57.22},
        {1: 2.16, 8: 8.37, 16: 16.67, 32: 35.43},
        "FasterTransformer, docs/vit_guide.md, B_16-224 on T4",
    ),
    "A100": Published(
        312,
        624,
        {1: 1.02, 2: 1.15, 4: 1.57, 8: 2.20, 16: 3.64, 32: 6.51},
        {},
        "AITemplate, examples/04_vit, vit_base_patch16_224 on A100-40GB",
    ),
}
INT8_LIKE = "T4"
"""Whose ratio of int8 to fp16 is taken where int8 is not published."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        fp16: peak of the tensor cores without sparsity, TFLOPS.
        int8: the same, TOPS.
        bandwidth: of its memory, GB/s.
        like: whose fit of PUBLISHED it takes.
        slower: how much longer small kernels, launches and the host's Python take than on a server, guessed.
        source: of the peaks and the bandwidth.
    """

    fp16: float
    int8: float
    bandwidth: float
    like: str
    slower: float
    source: str


GPUS = {
    "Orin Nano": Gpu(16.7, 33.5, 102, "T4", 2.5, "Jetson Orin Nano Super data sheet: 67 sparse int8 TOPS"),
    "AGX Orin": Gpu(42.5, 85, 204.8, "T4", 2.0, "Jetson AGX Orin technical brief: 170 sparse int8 TOPS of the GPU"),
    "T4": Gpu(65, 130, 320, "T4", 1.0, "T4 data sheet"),
    "L4": Gpu(121, 242.5, 300, "T4", 1.0, "L4 data sheet: 242 and 485 with sparsity"),
    "A10": Gpu(125, 250, 600, "A100", 1.0, "A10 data sheet"),
    "RTX 4090": Gpu(165.2, 660.6, 1008, "A100", 1.0, "Ada architecture white paper: fp16 that accumulates in fp32"),
    "H100": Gpu(989, 1979, 3350, "A100", 1.0, "H100 SXM data sheet, halved: it counts sparsity"),
}
"""T4, L4 and the Jetsons are limited by 70 W or less, so they take the T4's share of the peak."""

DENSE_KERNELS = 9
"""Of a dense block: four linear layers, two products of attention, softmax, two norms; all else is fused into them."""
OTHER_KERNELS = 10
"""Of stem and head."""
SMALL_KERNELS = {"attention": 15, "mlp": 7, "decisions": 13}
"""Of a batch's block, beside DENSE_KERNELS: prefix sums, gathers, scatters, reductions, and what makes decisions."""
SMALL = 2e-6
"""Seconds of a small kernel. Launches in a CUDA graph are about a microsecond apart, and it has next to no work."""
SPREAD = 2.0
"""The least certain figure is SMALL: the table's range has it divided and multiplied by this."""
MOVES = {"attention": 2, "mlp": 2, "decisions": 2}
"""How often a block's part reads or writes all rows of a batch in fp32, beside what a dense block does."""
COPIES = 2
"""How often a conditional sub-layer does, to copy its result back in place."""

GRAPH_LAUNCH = 15e-6
"""Seconds to launch a CUDA graph: measured by others on an RTX 5070 Ti laptop."""
KERNEL_LAUNCH = 2.7e-6
"""Seconds to launch a kernel on a stream, on the same machine."""
WAIT = 15e-6
"""Seconds from the end of a kernel to the host's next step: a copy of 32 bytes, and a wait of 6.4 us there."""
NODE = 5e-6
"""Seconds of a conditional node and the kernel that sets it, guessed: nobody has published it."""
EXACT_HOST, GRAPH_HOST = 1.5e-3, 0.15e-3
"""Seconds of this package's Python for a batch, see benchmarks/host_cost.py. Where large images leave nothing of it in
the CPU's caches, a graph takes up to 0.5 ms: that comes on top."""
