"""One mesh over the devices: batches are divided along its axis, everything else is replicated."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from t2t_vit_jax.errors import UserError

DATA_AXIS = 'data'


def make_mesh(config: Any) -> Mesh:
  """The mesh of `config.mesh`: `data` devices in a row, -1 for all of them.

  Raises:
    UserError: there are fewer devices.
  """
  available = jax.device_count()
  wanted = available if config.data == -1 else config.data
  if not 0 < wanted <= available:
    raise UserError(f'mesh.data is {config.data}, but there are {available} devices; -1 takes them all')
  return jax.make_mesh((wanted,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:wanted])


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises UserError unless the devices divide the batch evenly."""
  if batch_size % mesh.size:
    below = batch_size - batch_size % mesh.size
    nearest = f'{below} or {below + mesh.size}' if below else str(mesh.size)
    raise UserError(
      f'a batch of {batch_size} images cannot be divided among {mesh.size} devices: set data.batch_size to {nearest}'
    )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts this process's part of a batch on its devices, divided along the first axis."""
  sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
  return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
