"""Refuses numbers in a config that make no sense, before anything is built from them."""

import functools
from typing import Any

from t2t_vit_jax.conversion.weight_format import HEADER_FIELDS, check_field
from t2t_vit_jax.data.transforms import MODES
from t2t_vit_jax.errors import UserError, check_not_negative, check_positive, check_share, choose, plural

# Ranges of fields; augmentations check their own.
POSITIVE = (
  'checkpoint.every_epochs',
  'checkpoint.keep_latest',
  'data.batch_size',
  'data.crop_fraction',
  'data.eval_batch_size',
  'data.image_size',
  'distributed.timeout_s',
  'logging.every_steps',
  'model.depth',
  'model.embed_dim',
  'model.mlp_ratio',
  'model.num_heads',
  'model.token_dim',
  'optimizer.accumulate_steps',
  'optimizer.epsilon',
  'optimizer.nan_tolerance',
  'schedule.base_batch_size',
  'schedule.base_learning_rate',
  'schedule.epochs',
)
NOT_NEGATIVE = (
  'checkpoint.every_steps',
  'data.min_steps_per_epoch',
  'data.num_threads',
  'data.num_workers',
  'optimizer.gradient_clip_norm',
  'optimizer.weight_decay',
  'schedule.backbone_factor',
  'schedule.cooldown_epochs',
  'schedule.final_learning_rate',
  'schedule.max_steps',
  'schedule.warmup_epochs',
  'schedule.warmup_learning_rate',
)
SHARES = (
  'data.crop_fraction',
  'data.eval_fraction',
  'data.max_bad_fraction',
  'ema.decay',
  'model.attention_dropout_rate',
  'model.dropout_rate',
  'model.performer_dropout_rate',
  'model.stochastic_depth_rate',
  'optimizer.beta1',
  'optimizer.beta2',
  'optimizer.momentum',
)


def check_ranges(config: Any) -> None:
  """Raises UserError, which names the field and what it must be, for the first number out of its range."""
  for paths, check in ((POSITIVE, check_positive), (NOT_NEGATIVE, check_not_negative), (SHARES, check_share)):
    for path in paths:
      value = _field(config, path)
      if value is not None:  # a placeholder leaves the choice to the named model
        check(path, value)
  if not 0 <= config.seed < 2**32:
    raise UserError(f'seed must lie between 0 and 2**32 - 1, not {config.seed}')
  steps = tuple(config.logging.profile_steps)
  if steps and not (len(steps) == 2 and all(isinstance(x, int) for x in steps) and 1 <= steps[0] <= steps[1]):
    raise UserError(
      f'logging.profile_steps must be a first and a last step, such as 10,20, or () for none, not {steps}'
    )
  for path in HEADER_FIELDS:  # a run must be able to open the weight file that it writes
    part, _, field = path.rpartition('.')
    group = {'arguments': 'model', 'data': 'data'}.get(part)
    if group and (value := getattr(config[group], field, None)) is not None:
      check_field(path, tuple(value) if isinstance(value, list) else value, f'{group}.{field}')
  choose(MODES, 'data.channels', config.data.channels)
  lengths = {len(config.data.mean), len(config.data.std)}
  if lengths != {config.data.channels} or min(config.data.std) <= 0:
    raise UserError('data.mean and data.std must have a number for each channel, all positive in data.std')


def check_accumulation(accumulate_steps: int, images_per_device: int, num_devices: int, group_size: int) -> None:
  """Raises UserError unless every micro-batch takes the same number of whole groups of images from each device.

  Args:
    accumulate_steps: the number of micro-batches, `optimizer.accumulate_steps`.
    images_per_device: images of a batch on each device.
    num_devices: for the message.
    group_size: images of a mixing group; 1 if nothing is mixed.
  """
  counts = range(1, images_per_device + 1)
  fitting = [n for n in counts if n == 1 or images_per_device % (n * group_size) == 0]
  if accumulate_steps not in fitting:
    groups = f' into whole groups of augment.mixing_group_size {group_size}' if group_size > 1 else ''
    raise UserError(
      f'optimizer.accumulate_steps {accumulate_steps} does not divide the {images_per_device} images of each of '
      f'{plural(num_devices, "device")}{groups}: set it to {" or ".join(map(str, fitting))}'
    )


def _field(config: Any, path: str) -> Any:
  return functools.reduce(getattr, path.split('.'), config)
