"""GPUs that need not be there: XLA's compiler for CUDA works from a description of one."""

import dataclasses
import importlib.metadata
import re
from typing import Any, ClassVar

import jax

from t2t_vit_jax.errors import UserError, first_line, require

EXAMPLES = 'h100, h100:8 or a100:8'


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU's published peak, and what the compiler has to know about it.

  Attributes:
    name: how users write it.
    title: NVIDIA's name.
    flops: bfloat16 operations a second of its tensor cores, without sparsity.
    bandwidth: bytes a second of its main memory (HBM).
    memory_bytes: size of its main memory.
    capability: major number of its compute capability.
    cores: number of its multiprocessors.
    float32_units: float32 units of each multiprocessor.
    clock_ghz: its highest clock.
    l2_bytes: size of its L2 cache.
    shared_bytes: shared memory of each multiprocessor.
    shared_block_bytes: shared memory that a block may ask for.
  """

  name: str
  title: str
  flops: float
  bandwidth: float
  memory_bytes: int
  capability: int
  cores: int
  float32_units: int
  clock_ghz: float
  l2_bytes: int
  shared_bytes: int
  shared_block_bytes: int

  @property
  def hbm_gib(self) -> float:
    """GiB of main memory."""
    return self.memory_bytes / 2**30

  def description(self) -> str:
    """XLA's description of it: a text of the protocol buffer GpuTargetConfigProto."""
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
        core_count: {self.cores} fpus_per_core: {self.float32_units} clock_rate_ghz: {self.clock_ghz}
        memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory_bytes} l2_cache_size: {self.l2_bytes}
        shared_memory_per_core: {self.shared_bytes} shared_memory_per_block_optin: {self.shared_block_bytes}
        cuda_compute_capability {{ major: {self.capability} }}
      }}
      platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 10 }}  runtime_version {{ major: 12 minor: 8 }}
      device_description_str: "{self.title}"
    """


# Descriptions: XLA's own (xla/backends/gpu/target_config/specs in its sources). Peaks: NVIDIA's data sheets.
GPUS = {
  gpu.name: gpu
  for gpu in (
    Gpu('a100', 'NVIDIA A100-SXM4-80GB', 312e12, 2039.04e9, 85100068864, 8, 108, 64, 1.41, 40 * 2**20, 167936, 166912),
    Gpu('h100', 'NVIDIA H100 80GB HBM3', 989e12, 3352.32e9, 84942979072, 9, 132, 128, 1.98, 50 * 2**20, 233472, 232448),
    Gpu('h200', 'NVIDIA H200 141GB HBM3e', 989e12, 4800e9, 151397597184, 9, 132, 128, 1.98, 50 * 2**20, 233472, 232448),
    Gpu('b200', 'NVIDIA B200', 2250e12, 7672.32e9, 191514411008, 10, 148, 128, 1.965, 132644864, 233472, 232448),
  )
}


@dataclasses.dataclass(frozen=True)
class Node:
  """GPUs of one kind in one machine, and how they form a mesh, such as 'h100', 'h100:8' or 'h100:8/fsdp=8'.

  Attributes:
    text: as the user writes it.
    chip: kind of the GPUs.
    count: their number.
    fsdp: replaces `config.mesh.fsdp`; None leaves the config's mesh.
  """

  text: str
  chip: Gpu
  count: int
  fsdp: int | None = None

  # Triton's products need a GPU to choose their tiles on. Without, the compiler takes the library's.
  compiler_options: ClassVar[dict[str, Any] | None] = {'xla_gpu_enable_triton_gemm': False}

  @classmethod
  def parse(cls, text: str) -> 'Node':
    """Parses the form above, of a GPU in `GPUS`; UserError if `text` has another form."""
    parts = re.fullmatch(r'(\w+)(?::([1-9]\d*))?(?:/fsdp=(\d+))?', text)
    if parts is None:
      raise UserError(f'{text!r} names no GPUs: write such as {EXAMPLES}, with /fsdp=8 after it for another mesh')
    return cls(text, GPUS[parts[1]], int(parts[2] or 1), int(parts[3]) if parts[3] else None)

  def devices(self) -> list[Any]:
    """Devices of the machine, for which programs can be compiled.

    Raises:
      UserError: the compiler is not installed, or refuses the description.
    """
    require('compiling for GPUs', 'jax_cuda13_plugin', advice=' (no GPU is needed)')
    from jax.experimental import topologies

    try:
      return topologies.get_topology_desc(
        '', platform='cuda', target_config=self.chip.description(), topology=f'1x1x{self.count}'
      ).devices
    except (RuntimeError, ValueError) as error:
      raise UserError(f'the GPU compiler refuses {self.text}: {first_line(error, kind=False)}') from error

  @staticmethod
  def compiler() -> str:
    """Versions of the compiler and of jax, on which the figures depend."""
    return f'jax-cuda13-pjrt {importlib.metadata.version("jax-cuda13-pjrt")}, jax {jax.__version__}'
