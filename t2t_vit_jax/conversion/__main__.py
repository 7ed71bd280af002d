"""Converts PyTorch weights: t2t-vit convert CHECKPOINT --output=weights.safetensors.

The checkpoint may come from the reference, from mmpretrain, or from a training script that saves a state
dict; nothing in it is executed, and PyTorch is not needed. With --reverse, a converted file becomes a
PyTorch state dict.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
import sys
from typing import Any

from absl import logging

from t2t_vit_jax import conversion
from t2t_vit_jax.command_line import Parser, run_tool
from t2t_vit_jax.errors import UserError, did_you_mean

_SETTINGS: dict[str, Callable[[str], Any]] = {
  'num_heads': int,
  'qk_scale': float,
  'image_size': conversion.parse_image_size,
}


def run(arguments: argparse.Namespace) -> int:
  """Does what the command line asks for; returns the exit code."""
  logging.set_verbosity(logging.WARNING)  # jax logs the devices it does not find at INFO
  if arguments.output is None:  # not argparse's business, which would hide a misspelt flag
    raise UserError('give --output=FILE')
  options = conversion.Options(
    model_name=arguments.model,
    settings=dict(map(_setting, arguments.set.split(',') if arguments.set else ())),
    weights=arguments.weights,
    num_classes=arguments.num_classes,
    image_size=None if arguments.image_size is None else conversion.parse_image_size(arguments.image_size),
  )
  for line in conversion.convert(
    conversion.find_weights(arguments.checkpoint),
    arguments.output,
    options,
    reverse=arguments.reverse,
    force=arguments.force,
  ):
    print(line)
  return 0


def _setting(text: str) -> tuple[str, Any]:
  """'num_heads=4' -> ('num_heads', 4)."""
  field, _, value = text.partition('=')
  if field not in _SETTINGS:
    raise UserError(f'--set has no {field!r}: {did_you_mean(field, _SETTINGS)}')
  try:
    return field, _SETTINGS[field](value)
  except ValueError as error:
    raise UserError(f'--set={text}: {value!r} is no value for {field}') from error


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = Parser(
    'convert',
    example='t2t-vit convert 81.5_T2T_ViT_14.pth.tar --output=t2t_vit_14.safetensors',
    description='Converts a PyTorch checkpoint of T2T-ViT to a safetensors file of this package, or back.',
  )
  parser.add_argument(
    'checkpoint',
    metavar='CHECKPOINT',
    help="checkpoint of the reference, mmpretrain or timm's script, index of its shards, or name of published weights",
  )
  parser.add_argument(
    '--output', metavar='FILE', type=Path, help='the file to write: .safetensors; with --reverse also .pth'
  )
  parser.add_argument('--model', metavar='NAME', help='name of the model, if the tensors fit more than one')
  parser.add_argument(
    '--set', metavar='FIELD=VALUE,...', help='arguments that tensors do not show: num_heads, qk_scale, image_size'
  )
  parser.add_argument(
    '--weights', choices=('ema', 'raw'), help='moving average or raw weights (default: the average, if the file has it)'
  )
  parser.add_argument(
    '--num_classes', metavar='N', type=int, help='another number of classes, with an untrained head; 0 for no head'
  )
  parser.add_argument(
    '--image_size', metavar='SIZE', help='another image size, SIDE or HEIGHTxWIDTH: resizes the position table'
  )
  parser.add_argument(
    '--reverse', action='store_true', help="write a state dict under PyTorch's names; a .pth needs torch"
  )
  parser.add_argument('--force', action='store_true', help='overwrite the output')
  return run_tool(lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
