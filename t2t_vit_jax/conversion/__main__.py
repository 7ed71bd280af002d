"""Converts PyTorch weights: python -m t2t_vit_jax.conversion CHECKPOINT --output=weights.safetensors.

The checkpoint may come from the reference, from mmpretrain or from timm's training script; nothing
in it is executed. With --reverse, a converted file becomes a PyTorch state dict.
"""

from collections.abc import Callable
from typing import Any, cast

from absl import app, flags, logging

from t2t_vit_jax import conversion
from t2t_vit_jax.command_line import fail
from t2t_vit_jax.errors import UserError, did_you_mean

OUTPUT = flags.DEFINE_string('output', None, 'The file to write: .safetensors, or .pth with --reverse.')
MODEL = flags.DEFINE_string('model', None, 'Name of the model, where the tensors fit more than one.')
SET = flags.DEFINE_list('set', [], 'Arguments that tensors do not show: num_heads=4,qk_scale=0.17,image_size=192x256.')
WEIGHTS = flags.DEFINE_enum(
  'weights', None, ['ema', 'raw'], 'The moving average or the raw weights. Default: the average, if the file has it.'
)
NUM_CLASSES = flags.DEFINE_integer(
  'num_classes', None, 'Another number of classes, with an untrained head; 0 for no head.', lower_bound=0
)
IMAGE_SIZE = flags.DEFINE_string('image_size', None, 'Another image size, SIDE or HEIGHTxWIDTH: resizes the positions.')
FORCE = flags.DEFINE_bool('force', False, 'Overwrite the output.')
REVERSE = flags.DEFINE_bool('reverse', False, 'Write a PyTorch state dict.')


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; ends the program with one line if one is wrong."""
  try:
    arguments = flags.FLAGS(argv)
  except flags.Error as error:
    fail(str(error).splitlines()[0])
  if len(arguments) != 2:
    fail('give one CHECKPOINT')
  return arguments


def main(argv: list[str]) -> None:
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # jax logs the devices it does not find at INFO
  try:
    if OUTPUT.value is None:
      raise UserError('give --output=FILE')
    options = conversion.Options(
      model_name=MODEL.value,
      settings=dict(map(_setting, SET.value)),
      weights=cast(Any, WEIGHTS.value),  # an enum flag: 'ema', 'raw' or None
      num_classes=NUM_CLASSES.value,
      image_size=None if IMAGE_SIZE.value is None else conversion.parse_image_size(IMAGE_SIZE.value),
    )
    for line in conversion.convert(argv[1], OUTPUT.value, options, reverse=REVERSE.value, force=FORCE.value):
      print(line)
  except UserError as error:
    fail(str(error))


def _setting(text: str) -> tuple[str, Any]:
  """'num_heads=4' -> ('num_heads', 4)."""
  field, _, value = text.partition('=')
  if field not in _SETTINGS:
    raise UserError(f'--set has no {field!r}: {did_you_mean(field, _SETTINGS)}')
  try:
    return field, _SETTINGS[field](value)
  except ValueError as error:
    raise UserError(f'--set={text}: {value!r} is no value for {field}') from error


_SETTINGS: dict[str, Callable[[str], Any]] = {
  'num_heads': int,
  'qk_scale': float,
  'image_size': conversion.parse_image_size,
}


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
