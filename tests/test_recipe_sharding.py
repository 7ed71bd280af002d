"""The mesh and the rule for the state, against layouts written down by hand."""

import dataclasses

import jax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import digits
from t2t_vit_jax import UserError
from t2t_vit_jax.recipe.build import build_recipe
from t2t_vit_jax.recipe.init_from import resolve
from t2t_vit_jax.recipe.sharding import bytes_per_device, make_mesh, over_batch, state_sharding


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  process_index: int
  platform: str = 'tpu'


def described(processes, devices_each):
  """Devices of a machine that is not there; their ids don't follow the processes, as on a TPU pod."""
  count = processes * devices_each
  return [Device(i, i % processes) for i in reversed(range(count))]


def mesh_of(data, fsdp, devices=None):
  return make_mesh(ConfigDict(dict(data=data, fsdp=fsdp)), devices)


@pytest.mark.parametrize(
  ('data', 'fsdp', 'shape'), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (1, -1, (1, 8)), (4, 2, (4, 2))]
)
def test_shapes(data, fsdp, shape):
  mesh = mesh_of(data, fsdp, described(2, 4))
  assert mesh.devices.shape == shape
  assert mesh.axis_names == ('data', 'fsdp')


def test_devices_of_a_process_are_neighbours_in_its_order():
  mesh = mesh_of(-1, 2, described(processes=3, devices_each=2))
  assert [[device.id for device in row] for row in mesh.devices] == [[0, 3], [1, 4], [2, 5]]
  assert [device.process_index for device in mesh.devices.flat] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
  ('data', 'fsdp', 'processes', 'message'),
  [
    (-1, -1, 1, 'one of them may be -1'),
    (0, 1, 1, 'both must be positive'),
    (-1, 3, 1, 'does not fit 8 devices: that is no multiple of 3'),
    (4, 4, 1, 'needs 16 devices, but there are 8'),
    (2, 2, 2, 'leaves out some of 8 devices of 2 processes; -1 takes all'),
  ],
)
def test_meshes_that_do_not_fit(data, fsdp, processes, message):
  with pytest.raises(UserError, match=message):
    mesh_of(data, fsdp, described(processes, 8 // processes))


def test_one_process_may_leave_devices_out():
  assert mesh_of(2, 2, described(1, 8)).size == 4


@pytest.mark.parametrize(
  ('shape', 'spec'),
  [
    ((384, 1152), (None, 'fsdp')),
    ((1152, 384), ('fsdp',)),
    ((384, 384), ('fsdp',)),
    ((1, 197, 384), (None, None, 'fsdp')),
    ((7, 7, 1001), ()),  # nothing that 4 divides
    ((1152,), ()),  # small
  ],
)
def test_the_longest_axis_that_divides_is_divided(shape, spec):
  mesh = mesh_of(2, 4, described(1, 8))
  assert state_sharding(shape, mesh).spec == PartitionSpec(*spec)
  assert state_sharding(shape, mesh_of(8, 1, described(1, 8))).spec == PartitionSpec()


def recipe(fsdp):
  config = digits.get_config()
  config.mesh.fsdp = fsdp
  config.data.image_size = 16
  config.model.depth = 1
  mesh = make_mesh(config.mesh)
  return build_recipe(resolve(config), mesh, num_classes=10, num_train_images=1000)


def test_the_state_is_divided_and_the_step_computes_the_same():
  images = np.random.default_rng(0).integers(0, 256, (128, 16, 16, 3), np.uint8)
  batch = {'image': images, 'label': np.arange(128, dtype=np.int32) % 10, 'mask': np.ones(128, np.float32)}
  states, sizes = [], []
  for fsdp in (1, 2):
    parts = recipe(fsdp)
    state = parts.make_state(jax.random.key(0))
    on_devices = jax.device_put(batch, over_batch(parts.mesh))
    for _ in range(2):
      state, metrics = parts.train_step(state, on_devices, jax.random.key(1))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(parts.abstract_state), strict=True):
      assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held == bytes_per_device(parts.abstract_state)
    states.append((jax.device_get(state), float(metrics['loss'])))
    sizes.append(held)
  (plain, plain_loss), (divided, divided_loss) = states
  assert divided_loss == pytest.approx(plain_loss, rel=1e-6)
  # AdamW's first steps have the size of the learning rate, whatever the gradient's: rounding shows.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), divided.params, plain.params)
  assert sizes[1] < 0.65 * sizes[0]  # about half: small arrays stay whole
