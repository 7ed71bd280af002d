"""TPU chips by Google's published figures, and slices that need not be there: libtpu describes them."""

import dataclasses
import importlib.metadata
import os
import re
from typing import Any, ClassVar

import jax

from t2t_vit_jax.errors import UserError, first_line, require

EXAMPLES = 'v4:4x4x4, v5e:2x2, v5e:16x16, v5p:4x4x4 or v6e:16x16'


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of a chip, and the options that describe it to libtpu.

  Attributes:
    name: Google's name.
    flops: bfloat16 operations a second.
    bandwidth: bytes a second of its main memory (HBM).
    hbm_gib: GiB of main memory. Google writes GB, but the compiler offers 15.75 GiB of "16 GB": GiB are meant.
    flops_per_cycle: operations of all its matrix units: TensorCores x units x side^2 x 2.
    options: options for `jax.experimental.topologies`.
  """

  name: str
  flops: float
  bandwidth: float
  hbm_gib: float
  flops_per_cycle: int
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def clock(self) -> float:
    """Cycles a second, from the peak and the matrix units: Google publishes them for v4 only (1.05 GHz)."""
    return self.flops / self.flops_per_cycle


# Peaks and units: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. The page of v6e says two or four matrix
# units, by revision: with four of 256 x 256 the clock is 1.75 GHz, with two it would be 3.5 GHz.
CHIPS = {
  chip.name: chip
  for chip in (
    # As on Cloud TPU VMs, a device is a whole chip with both TensorCores.
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
    text: the slice as the user writes it.
    chip: kind of its chips.
    topology: libtpu's name of the slice.
    fsdp: replaces `config.mesh.fsdp`; None leaves the config's mesh.
  """

  text: str
  chip: Chip
  topology: str
  fsdp: int | None = None

  compiler_options: ClassVar[dict[str, Any] | None] = None

  @classmethod
  def parse(cls, text: str) -> 'Slice':
    """Parses the form above, of a chip in `CHIPS`; UserError if `text` has another form."""
    parts = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)(?:/fsdp=(\d+))?', text)
    if parts is None:
      raise UserError(f'{text!r} is no TPU slice: write one such as {EXAMPLES}, with /fsdp=8 after it for another mesh')
    return cls(text, CHIPS[parts[1]], f'{parts[1]}:{parts[2]}', int(parts[3]) if parts[3] else None)

  def devices(self) -> list[Any]:
    """Devices of the slice, for which programs can be compiled.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    require('compiling for TPUs', 'libtpu', advice=' (no TPU is needed)')
    from jax.experimental import topologies

    try:
      return topologies.get_topology_desc(platform='tpu', topology_name=self.topology, **self.chip.options).devices
    except jax.errors.JaxRuntimeError as error:
      raise UserError(
        f'libtpu knows no slice {self.topology}: choose one such as {EXAMPLES} ({first_line(error, kind=False)})'
      ) from error

  @staticmethod
  def compiler() -> str:
    """Versions of libtpu and jax, on which the figures depend."""
    return f'libtpu {importlib.metadata.version("libtpu")}, jax {jax.__version__}'


def without_tpu() -> None:
  """Keeps this process from looking for a TPU; to be called before JAX's first computation."""
  os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',  # do not ask Google's metadata server what machine this is
    'TPU_ACCELERATOR_TYPE': 'v5litepod-1',  # this machine, not the slice; libtpu need not ask for it
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # libtpu's lock protects chips, and none is used
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_STDERR_LOG_LEVEL': '3',
  }
  jax.config.update('jax_platforms', 'cpu')  # JAX has read the environment when it was imported
