"""Prepares a tfds dataset as the array_record files that training reads.

t2t-vit prepare imagenet2012 --manual-dir TARS --data-dir ~/tensorflow_datasets
t2t-vit prepare --convert OLD/imagenet2012/5.1.0 --data-dir NEW

Needs TensorFlow, which training does not: pip install 't2t-vit-jax[prepare]'.
"""

import argparse
import importlib.util
import logging
import os
import sys

from t2t_vit_jax.command_line import Parser, run_tool
from t2t_vit_jax.errors import UserError, require
from t2t_vit_jax.interrupts import importing


def run(arguments: argparse.Namespace) -> int:
  """Does what the command line asks for; returns the exit code."""
  if (arguments.dataset is None) == (arguments.convert is None):
    raise UserError('give either a dataset or --convert FOLDER')
  if arguments.convert and not arguments.data_dir:
    raise UserError('--convert needs --data-dir')
  if importlib.util.find_spec('tensorflow_datasets') is None:
    require('t2t-vit prepare', 'tensorflow')  # whose extra has both
  with importing():
    from t2t_vit_jax.data import preparation  # late: the help needs no tfds

  os.environ |= {'TF_CPP_MIN_LOG_LEVEL': '2', 'TF_ENABLE_ONEDNN_OPTS': '0'}  # no notes about TensorFlow's build
  for logger in ('absl', 'urllib3'):  # they warn of ImageNet's missing test images, and of each retried download
    logging.getLogger(logger).setLevel(logging.ERROR)
  try:
    if arguments.convert:
      info = preparation.convert(arguments.convert, arguments.data_dir)
    else:
      info = preparation.prepare(arguments.dataset, arguments.data_dir, arguments.manual_dir, arguments.allow_partial)
  except KeyboardInterrupt:
    print('interrupted: only downloads are kept; start again with the same command', file=sys.stderr)
    return 130
  counts = ', '.join(f'{split} {details.num_examples:,}' for split, details in info.splits.items())
  print(f'{info.full_name} is ready in {info.data_dir}: {counts} images')
  return 0


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = Parser(
    'prepare',
    example='t2t-vit prepare imagenet2012 --manual-dir=TARS --data-dir=DATA',
    description=__doc__.split('\n\n')[0],
  )
  parser.add_argument('dataset', metavar='DATASET', nargs='?', help='tfds name, such as imagenet2012 or cifar10')
  parser.add_argument('--convert', metavar='FOLDER', help='tfrecord folder of tfds to convert, instead of a name')
  parser.add_argument(
    '--data_dir', metavar='DIR', help='folder to write to (default: TFDS_DATA_DIR or ~/tensorflow_datasets)'
  )
  parser.add_argument('--manual_dir', metavar='DIR', help='folder of files fetched by hand, such as the ImageNet tars')
  parser.add_argument('--allow_partial', action='store_true', help='accept tars that hold a part of ImageNet')
  return run_tool(lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
