"""The command `t2t-vit`, also as `python -m t2t_vit_jax`: starts one of the commands below."""

import importlib
import sys
from typing import NamedTuple

from t2t_vit_jax import __version__
from t2t_vit_jax.errors import did_you_mean


class Command(NamedTuple):
  """A row of `COMMANDS`: the module whose `main` takes the arguments, and what the command does."""

  module: str
  purpose: str


COMMANDS = {
  'predict': Command('t2t_vit_jax.predict', 'Classifies images.'),
  'visualize': Command('t2t_vit_jax.visualize', 'Draws features and attention for an image.'),
  'train': Command('t2t_vit_jax.train', 'Trains a model, or evaluates or exports a run.'),
  'evaluate': Command('t2t_vit_jax.evaluate.__main__', 'Measures weights on sets of labelled images.'),
  'export': Command('t2t_vit_jax.export', 'Writes a model as one file that jax runs without Flax.'),
  'convert': Command('t2t_vit_jax.conversion.__main__', 'Converts PyTorch weights to a weight file, or back.'),
  'weights': Command('t2t_vit_jax.weights', 'Lists and fetches published weights.'),
  'plan': Command('t2t_vit_jax.plan', 'Tells what a run needs on TPUs or GPUs, without them.'),
  'prepare': Command('t2t_vit_jax.prepare', 'Prepares a dataset of tfds, such as ImageNet, for training.'),
  'shrink': Command('t2t_vit_jax.shrink', 'Copies a dataset with smaller images, which decode faster.'),
}


def overview() -> str:
  """Text that lists the commands."""
  lines = ['For example:', '  t2t-vit predict t2t_vit_14 cat.jpg', '', 'usage: t2t-vit COMMAND [arguments]', '']
  lines += [f'  {name:11}{command.purpose}' for name, command in COMMANDS.items()]
  return '\n'.join([*lines, '', '`t2t-vit COMMAND --help` lists the arguments of a command, --version the version.'])


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  name, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
  if name in COMMANDS:  # only its module is imported, which takes seconds
    return int(importlib.import_module(COMMANDS[name].module).main(arguments))
  if name in ('--help', '-h', 'help', '--version'):
    print(__version__ if name == '--version' else overview())
    return 0
  print(f'error: there is no command {name!r}: {did_you_mean(name, COMMANDS)}', file=sys.stderr)
  return 2


if __name__ == '__main__':
  sys.exit(main())
