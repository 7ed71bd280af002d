"""The mesh of all devices: batches are divided over all of it, the state over its axis `fsdp` or not at all."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from t2t_vit_jax.errors import UserError

AXES = ('data', 'fsdp')
# Dividing an array saves memory and costs a transfer; below this many elements (64 KiB) it is not worth one.
MIN_DIVIDED_SIZE = 2**14


def make_mesh(config: Any, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of `config.mesh`: `data` x `fsdp` devices; one of the two may be -1, for the rest of the devices.

  Each process's devices are neighbours in it, and processes follow each other by number: so every process reads one
  block of each batch, and the batch is the same for any number of processes. The axis `fsdp` runs through neighbours
  first, which have the fastest connection.

  Args:
    config: `config.mesh` of a run.
    devices: None for all that are present; or descriptions of devices elsewhere.

  Raises:
    UserError: the numbers don't fit the devices.
  """
  available = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
  num_processes = len({device.process_index for device in available})
  sizes = [config.data, config.fsdp]
  asked = f'mesh.data {config.data} x mesh.fsdp {config.fsdp}'
  if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
    raise UserError(f'{asked} is no mesh: both must be positive, and one of them may be -1 for the rest of the devices')
  if -1 in sizes:
    rest, left_over = divmod(len(available), -math.prod(sizes))
    if left_over:
      raise UserError(f'{asked} does not fit {len(available)} devices: that is no multiple of {-math.prod(sizes)}')
    sizes[sizes.index(-1)] = rest
  wanted = math.prod(sizes)
  if wanted > len(available):
    raise UserError(f'{asked} needs {wanted} devices, but there are {len(available)}; -1 takes as many as there are')
  if wanted < len(available) and num_processes > 1:
    raise UserError(f'{asked} leaves out some of {len(available)} devices of {num_processes} processes; -1 takes all')
  return Mesh(np.array(available[:wanted]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """The first axis divided over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """Sharding of an array of the training state: one rule for parameters, moving average and optimizer.

  The longest axis that `fsdp` divides evenly is divided, the first if several are equally long. Small arrays, and
  arrays without such an axis, are on every device.
  """
  num_parts = mesh.shape['fsdp']
  divisible = [size if size % num_parts == 0 else 0 for size in shape]
  if num_parts == 1 or math.prod(shape) < MIN_DIVIDED_SIZE or not any(divisible):
    return replicated(mesh)
  axis = divisible.index(max(divisible))
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'fsdp'))


def divided(state: Any, mesh: Mesh) -> Any:
  """Describes a training state: shapes and dtypes of the arrays of `state`, and the sharding of each."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state_sharding(x.shape, mesh)), state)


def mesh_of(tree: Any) -> Mesh:
  """The mesh that the arrays of `tree` are divided over."""
  return next(leaf.sharding.mesh for leaf in jax.tree.leaves(tree))


def gathered(tree: Any, mesh: Mesh) -> Any:
  """Puts all of every array on every device. With several processes all must call it."""
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def bytes_per_device(tree: Any) -> int:
  """Bytes on each device of the arrays of `tree`, which may be descriptions with a sharding."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * jax.numpy.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
  )


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
  sharding = over_batch(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
