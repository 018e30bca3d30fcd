"""Processors and clusters: the public figures a plan starts from, each of which an option overrides."""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_ds.config.meanings import nearest_key
from vqmoe_ds.runtime.errors import ConfigError, shown

GB = 1e9
MOST_RANKS = 1 << 18
"""Ranks of one job, at most: the largest machines have some 200,000 processors, and plans look at every rank."""


@dataclass(frozen=True)
class Processor:
    """One rank's processor. Rates are peaks per second; bandwidths are in one direction."""

    memory_gb: float
    """Memory in GB (1e9 bytes)."""
    tflops: float
    """Dense bf16 TFLOP/s."""
    fp32_tflops: float
    """TFLOP/s of float32 products as PyTorch runs them by default (no TF32)."""
    memory_gbps: float
    """Memory bandwidth in GB/s."""
    link_gbps: float
    """Bandwidth to the other processors of the node, GB/s per processor."""
    host_gbps: float
    """Bandwidth to the host's memory, GB/s per processor (offload)."""
    source: str
    """Title and address of the vendor's page."""


_NVIDIA = "https://www.nvidia.com/en-us/data-center"

# Rates without sparsity. Vendors give links as the sum of both directions, the H100's bf16 with sparsity: halved here.
# Compared (November 2026) not with the pages themselves but with public tables that cite them:
# github.com/stas00/ml-engineering (compute/accelerator, network) and glennklockwood.com/garden/processors.
PROCESSORS = {
    # 312 TFLOPS bf16, 19.5 fp32; HBM2 1,555 GB/s and HBM2e 2,039; NVLink 3: 600; PCIe 4: 64.
    "a100-40": Processor(40, 312, 19.5, 1555, 300, 32, f"NVIDIA A100 data sheet (SXM), {_NVIDIA}/a100/"),
    "a100-80": Processor(80, 312, 19.5, 2039, 300, 32, f"NVIDIA A100 data sheet (SXM), {_NVIDIA}/a100/"),
    # 1,979 TFLOPS bf16 with sparsity, 67 fp32; HBM3 3.35 TB/s; NVLink 4: 900; PCIe 5: 128.
    "h100": Processor(80, 989, 67, 3350, 450, 64, f"NVIDIA H100, specifications (SXM), {_NVIDIA}/h100/"),
    # 1,513 TFLOPS bf16 with sparsity, 51 fp32; 2 TB/s; the NVLink bridge joins pairs only: a node's link is PCIe 5.
    "h100-pcie": Processor(80, 756, 51, 2000, 64, 64, f"NVIDIA H100, specifications (PCIe), {_NVIDIA}/h100/"),
    # Compute of the H100; 141 GB of HBM3e at 4.8 TB/s.
    "h200": Processor(141, 989, 67, 4800, 450, 64, f"NVIDIA H200, specifications (SXM), {_NVIDIA}/h200/"),
    # 8 GPUs: 1,440 GB, 64 TB/s, 72 PFLOPS fp8 with sparsity (four times dense bf16); fp32 80; NVLink 5: 1,800; PCIe 5.
    "b200": Processor(180, 2250, 80, 8000, 900, 64, f"NVIDIA DGX B200 data sheet, {_NVIDIA}/dgx-b200/"),
    # 362 TFLOPS bf16, 91.6 fp32; GDDR6 864 GB/s; no NVLink; PCIe 4: 64.
    "l40s": Processor(48, 362, 91.6, 864, 32, 32, f"NVIDIA L40S, specifications, {_NVIDIA}/l40s/"),
    # 1,307.4 TFLOPS bf16, 163.4 fp32; HBM3 5.3 TB/s; seven Infinity Fabric links of 128; PCIe 5.
    "mi300x": Processor(
        192,
        1307.4,
        163.4,
        5300,
        448,
        64,
        "AMD Instinct MI300X, specifications, https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    ),
    # One core, two ranks on one memory.
    "cpu": Processor(8, 0.25, 0.07, 10, 1, 10, "no data sheet: the machine behind docs/performance.md"),
}

NETWORK_GBPS = 50.0
"""One 400 Gb/s port (InfiniBand NDR) per GPU, as in NVIDIA's DGX H100 and H200 (user guide,
https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html); HDR is 25, XDR 100 GB/s."""


@dataclass(frozen=True)
class Cluster:
    """``nodes`` x ``per_node`` processors, ranks numbered node by node."""

    nodes: int
    per_node: int
    processor: Processor
    network_gbps: float = NETWORK_GBPS
    """Bandwidth between nodes, GB/s per processor in one direction."""
    latency_us: float = 15.0
    """Latency of one message to one peer, start-up included."""
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
        raise ConfigError(f"--gpu {shown(name)[1:-1]} is not in the catalogue; {nearest_key(name, list(PROCESSORS))}")
    return PROCESSORS[name]
