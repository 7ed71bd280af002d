"""TPU chips as Google publishes them, and slices of them that are described, not present."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax

from t2t_vit_jax.errors import UserError, did_you_mean

EXAMPLES = 'v4:4x4x4, v5e:2x2, v5e:16x16, v5p:4x4x4 or v6e:16x16'


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip's published peaks, and how libtpu describes it.

  Attributes:
    name: Google's.
    flops: bfloat16 operations a second.
    bandwidth: of its main memory (HBM), bytes a second.
    hbm_gib: main memory. Google writes GB; a compiler that offers 15.75 GiB of "16 GB" shows that GiB are meant.
    flops_per_cycle: of its matrix units together: TensorCores x units x side^2 x 2.
    options: for `jax.experimental.topologies`.
  """

  name: str
  flops: float
  bandwidth: float
  hbm_gib: float
  flops_per_cycle: int
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def clock(self) -> float:
    """Cycles a second: published for v4 only (1.05 GHz), so it is what the peak and the matrix units imply."""
    return self.flops / self.flops_per_cycle

  def roofline_s(self, flops: float, hbm_bytes: float) -> float:
    """Seconds for so much work at the peaks, if transfers and work overlap."""
    return max(flops / self.flops, hbm_bytes / self.bandwidth)


# Peaks and units: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. The last of them gives v6e two or four
# matrix units, by revision: with four of 256 x 256 the clock is 1.75 GHz, with two it would be 3.5 GHz.
CHIPS = {
  chip.name: chip
  for chip in (
    # As on Cloud TPU VMs: one device is a chip with both TensorCores.
    Chip('v4', 275e12, 1200e9, 32, 2 * 4 * 128**2 * 2, {'chip_config_name': 'megacore'}),
    Chip('v5e', 197e12, 819e9, 16, 1 * 4 * 128**2 * 2),
    Chip('v5p', 459e12, 2765e9, 95, 2 * 4 * 128**2 * 2),
    Chip('v6e', 918e12, 1640e9, 32, 1 * 4 * 256**2 * 2),
  )
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice and how its chips form a mesh, such as 'v5e:16x16' or 'v5e:16x16/fsdp=8'.

  Attributes:
    text: as above.
    chip: its chips' kind.
    topology: libtpu's name of it.
    fsdp: in place of `config.mesh.fsdp`; None leaves the config's mesh.
  """

  text: str
  chip: Chip
  topology: str
  fsdp: int | None = None

  @classmethod
  def parse(cls, text: str) -> 'Slice':
    """Raises UserError if `text` is none."""
    parts = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)(?:/fsdp=(\d+))?', text)
    if parts is None:
      raise UserError(f'{text!r} is no TPU slice: write {EXAMPLES}, and /fsdp=8 after it for another mesh')
    if parts[1] not in CHIPS:
      raise UserError(f'unknown chip {parts[1]!r} in {text!r}: {did_you_mean(parts[1], CHIPS)} (such as {EXAMPLES})')
    return cls(text, CHIPS[parts[1]], f'{parts[1]}:{parts[2]}', int(parts[3]) if parts[3] else None)

  def devices(self) -> list[Any]:
    """Its chips as devices that programs can be compiled for.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec('libtpu') is None:
      raise UserError("the TPU compiler is missing: pip install 'jax[tpu]' (no TPU is needed)")
    from jax.experimental import topologies

    try:
      return topologies.get_topology_desc(platform='tpu', topology_name=self.topology, **self.chip.options).devices
    except jax.errors.JaxRuntimeError as error:
      reason = str(error).splitlines()[0]
      raise UserError(f'libtpu has no slice {self.topology}, only such as {EXAMPLES} ({reason})') from error


def compiler() -> str:
  """The versions that figures about programs depend on."""
  return f'libtpu {importlib.metadata.version("libtpu")}, jax {jax.__version__}'


def without_tpu() -> None:
  """Keeps this process from looking for a TPU; to be called before JAX's first computation."""
  os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',  # do not ask Google's metadata server what machine this is
    'TPU_ACCELERATOR_TYPE': 'v5litepod-1',  # of this machine, not of the slice: silences a question
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # libtpu's lock is for chips, and none is touched
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_STDERR_LOG_LEVEL': '3',
  }
  jax.config.update('jax_platforms', 'cpu')  # JAX has read the environment when it was imported
