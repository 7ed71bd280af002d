"""Trains a T2T-ViT: python train.py --config=configs/t2t_vit_14.py --workdir=runs/t2t_vit_14."""

import json
from pathlib import Path
import re
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from t2t_vit_jax.errors import UserError, did_you_mean

HERE = Path(__file__).parent


def parse_flags(argv: list[str]) -> list[str]:
  """Defines and parses the flags; an unknown config field is refused in one line, like an unknown flag."""
  try:
    # ml_collections reads the overrides of the default config as soon as the flag is defined.
    config_flags.DEFINE_config_file('config', str(HERE / 'configs' / 'digits.py'), 'The run: a file in configs/.')
    flags.DEFINE_bool('dry_run', False, 'Build and check everything, say what the run would be, and train nothing.')
    flags.DEFINE_string('evaluate', None, 'A weight file or a workdir: evaluate its weights, train nothing.')
    flags.DEFINE_bool('json', False, 'With --evaluate: print the result as JSON, and only that.')
    flags.DEFINE_string('workdir', None, 'Folder for checkpoints and metrics. Default: runs/<config name>.')
    flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where JAX does not find the processes by itself.')
    flags.DEFINE_integer('num_processes', None, 'With --coordinator: of the run. 1: do not look for others.')
    flags.DEFINE_integer('process_id', None, 'With --coordinator: the number of this process, from 0 on.')
    arguments = flags.FLAGS(argv)
  except (AttributeError, KeyError):
    refuse_unknown_field(argv)
    raise
  except flags.Error as error:
    _fail(str(error).splitlines()[0])
  config_file = config_flags.get_config_filename(flags.FLAGS['config']).split(':')[0]
  if not Path(config_file).is_file():
    _fail(f'there is no config file {config_file}')
  return arguments


def refuse_unknown_field(argv: list[str]) -> None:
  """Ends the program if an override names a field that `configs/default.py` does not have."""
  from configs import default

  tree = default.get_config()
  groups = [name for name in tree if isinstance(tree[name], type(tree))]
  known = [f'{group}.{field}' for group in groups for field in tree[group]] + [x for x in tree if x not in groups]
  for match in filter(None, (re.match(r'--?(?:no)?config\.([^=]+)', argument) for argument in argv)):
    if (path := match[1]) not in known:
      _fail(f'unknown config field {path!r}: {did_you_mean(path, known)}')


def main(argv: list[str]) -> None:
  # Imported late: this takes seconds, and wrong flags should be refused at once.
  from t2t_vit_jax.training import distributed
  from t2t_vit_jax.training.dry_run import dry_run
  from t2t_vit_jax.training.evaluate_only import evaluate_only
  from t2t_vit_jax.training.loop import Stopped, train

  if len(argv) > 1:
    _fail(f'arguments without a flag: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax logs each of its files at INFO
  config_file = config_flags.get_config_filename(flags.FLAGS['config'])
  config = flags.FLAGS.config
  try:
    distributed.start(
      flags.FLAGS.coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id, config.distributed.timeout_s
    )
    if flags.FLAGS.evaluate is not None:
      show(evaluate_only(config, flags.FLAGS.evaluate))
    elif flags.FLAGS.dry_run:
      dry_run(config)
    else:
      train(config, flags.FLAGS.workdir or Path('runs') / Path(config_file).stem)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    distributed.leave(2)
  except Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(stopped.exit_code)
  except KeyboardInterrupt:
    print('interrupted; nothing since the last checkpoint is saved', file=sys.stderr)
    distributed.leave(130)
  except Exception:
    traceback.print_exc()
    distributed.leave(1)


def show(accuracies: dict[str, Any]) -> None:
  """Prints the result of an evaluation; the last line is about the weights that count most."""
  from t2t_vit_jax.training.reporting import say

  if flags.FLAGS.json:
    say(json.dumps({weights: accuracy.as_dict() for weights, accuracy in accuracies.items()}))
    return
  for weights, accuracy in accuracies.items():
    say(f'{weights}: {accuracy}')
  say(accuracies.get('ema', accuracy).last_line(flags.FLAGS.config.data.eval_split))


def _fail(message: str) -> NoReturn:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)


if __name__ == '__main__':
  sys.path.insert(0, str(HERE))  # so that a config finds its neighbours from any folder
  app.run(main, flags_parser=parse_flags)
