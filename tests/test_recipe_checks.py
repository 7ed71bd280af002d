"""Numbers in a config that do not fit together."""

import pytest

import configs.default
from t2t_vit_jax import UserError
from t2t_vit_jax.recipe.checks import check_accumulation, check_ranges


def config_with(**changes):
  config = configs.default.get_config()
  config.update_from_flattened_dict({field.replace('__', '.'): value for field, value in changes.items()})
  config.data.channels = 3
  return config


@pytest.mark.parametrize('count', [1, 2, 4, 8])
def test_parts_of_whole_groups_are_accepted(count):
  check_accumulation(count, images_per_device=512, num_devices=1, group_size=64)


def test_a_batch_is_not_divided_by_default():
  # 32 devices share a mixing group of 64 images between two of them.
  check_accumulation(1, images_per_device=16, num_devices=32, group_size=64)


@pytest.mark.parametrize(
  ('count', 'num_devices', 'group_size', 'message'),
  [
    (
      3,
      4,
      64,
      'optimizer.accumulate_steps 3 does not divide the 128 images of each of 4 devices into whole groups of '
      'augment.mixing_group_size 64: set it to 1 or 2',
    ),
    (4, 4, 64, 'accumulate_steps 4 does not divide the 128 images of each of 4 devices into whole groups'),
    (3, 64, 1, 'accumulate_steps 3 does not divide the 8 images of each of 64 devices: set it to 1 or 2 or 4 or 8'),
    (2, 16, 64, 'augment.mixing_group_size 64: set it to 1'),
  ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(count, num_devices, group_size, message):
  with pytest.raises(UserError) as caught:
    check_accumulation(count, 512 // num_devices, num_devices, group_size)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('optimizer.accumulate_steps', 0, 'must be positive, not 0'),
    ('optimizer.gradient_clip_norm', -1.0, 'must not be negative'),
    ('optimizer.momentum', 1.5, 'must lie between 0 and 1'),
    ('schedule.backbone_factor', -0.1, 'must not be negative'),
  ],
)
def test_numbers_out_of_range_are_refused(field, value, message):
  with pytest.raises(UserError, match=f'{field} {message}'):
    check_ranges(config_with(**{field: value}))
