"""Processors and clusters: the public figures a plan starts from, each of which an option overrides."""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_ds.config.load import nearest_key
from vqmoe_ds.errors import ConfigError

GB = 1e9


@dataclass(frozen=True)
class Processor:
    """One rank's processor. Rates are peaks, a second; bandwidths are in one direction."""

    memory_gb: float
    """Memory in GB (1e9 bytes)."""
    tflops: float
    """Dense bf16 TFLOP/s."""
    fp32_tflops: float
    """Of float32 products as PyTorch runs them by default (no TF32)."""
    memory_gbps: float
    """Memory bandwidth in GB/s."""
    link_gbps: float
    """To the other processors of the node, GB/s a processor."""
    host_gbps: float
    """To the host's memory, GB/s a processor (offload)."""


# Sources: the vendor's public data sheets. link: NVLink's total bidirectional figure halved; host: PCIe x16 likewise.
PROCESSORS = {
    # NVIDIA A100 data sheet (SXM): 312 TFLOPS bf16, 19.5 fp32, 1,555 and 2,039 GB/s, NVLink 600 GB/s, PCIe 4.
    "a100-40": Processor(40, 312, 19.5, 1555, 300, 32),
    "a100-80": Processor(80, 312, 19.5, 2039, 300, 32),
    # NVIDIA H100 data sheet (SXM): 1,979 TFLOPS bf16 with sparsity, 67 fp32, 3.35 TB/s, NVLink 900 GB/s, PCIe 5.
    "h100": Processor(80, 989, 67, 3350, 450, 64),
    # NVIDIA H200 data sheet: compute of the H100, 141 GB at 4.8 TB/s.
    "h200": Processor(141, 989, 67, 4800, 450, 64),
    # NVIDIA DGX B200 data sheet (8 GPUs): 1,440 GB, 64 TB/s, 72 PFLOPS sparse fp8, four times dense bf16; NVLink 1,800.
    "b200": Processor(180, 2250, 75, 8000, 900, 64),
    # NVIDIA L40S data sheet: 48 GB, 864 GB/s, 362 TFLOPS bf16, 91.6 fp32, PCIe 4 and no NVLink.
    "l40s": Processor(48, 362, 91.6, 864, 32, 32),
    # Not a data sheet: one core of the machine behind docs/performance.md, two ranks on one memory.
    "cpu": Processor(8, 0.25, 0.07, 10, 1, 10),
}


@dataclass(frozen=True)
class Cluster:
    """``nodes`` x ``per_node`` processors, ranks numbered node by node."""

    nodes: int
    per_node: int
    processor: Processor
    network_gbps: float
    """Between nodes, GB/s a processor in one direction."""
    latency_us: float = 15.0
    """Of one message to one peer, start-up included."""
    efficiency: float = 0.4
    """Share of the peak that large products reach, all else of a block included."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


def find_processor(name: str) -> Processor:
    """The catalogue's entry.

    Raises:
        ConfigError: none of that name; the nearest is named.
    """
    if name not in PROCESSORS:
        raise ConfigError(f"--gpu {name} is not in the catalogue; {nearest_key(name, list(PROCESSORS))}")
    return PROCESSORS[name]
