"""Trains a T2T-ViT: python train.py --config=configs/t2t_vit_14.py --workdir=runs/t2t_vit_14."""

import json
from pathlib import Path
import sys
import traceback
from typing import Any

import t2t_vit_jax  # noqa: F401 (first: Ctrl-C ends what imports from here on in one line)

# isort: split
from absl import app, flags
from ml_collections import config_flags

from t2t_vit_jax.command_line import check_and_quiet, print_error, print_message, refusing_bad_flags, with_home
from t2t_vit_jax.errors import UserError

HERE = Path(__file__).parent
DEFAULT_CONFIG = str(HERE / 'configs' / 'digits.py')


def parse_flags(argv: list[str]) -> list[str]:
  """Defines and parses the flags; an unknown config field is refused in one line, like an unknown flag."""
  argv = with_home(argv)
  with refusing_bad_flags(argv, DEFAULT_CONFIG):
    config_flags.DEFINE_config_file('config', DEFAULT_CONFIG, 'The run: a file in configs/.')
    flags.DEFINE_bool('dry_run', False, 'Build and check everything, describe the run, train nothing.')
    flags.DEFINE_string('evaluate', None, 'A weight file or a workdir: evaluate its weights, train nothing.')
    flags.DEFINE_string(
      'export', None, 'A workdir: write the weights of its newest checkpoint as files, train nothing.'
    )
    flags.DEFINE_bool('json', False, 'With --evaluate: print the result as JSON, and only that.')
    flags.DEFINE_string('workdir', None, 'Folder for checkpoints and metrics. Default: runs/<config name>.')
    flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, if JAX does not find the processes by itself.')
    flags.DEFINE_integer('num_processes', None, 'With --coordinator: how many there are. 1: do not look for others.')
    flags.DEFINE_integer('process_id', None, 'With --coordinator: the number of this process, from 0 on.')
    arguments = flags.FLAGS(argv)
  return arguments


def main(argv: list[str]) -> None:
  # Imported late: imports take seconds, and wrong flags should be refused at once.
  from t2t_vit_jax import processes
  from t2t_vit_jax.console import say
  from t2t_vit_jax.training.dry_run import dry_run
  from t2t_vit_jax.training.evaluate_only import evaluate_only
  from t2t_vit_jax.training.loop import Stopped, train
  from t2t_vit_jax.workdir.weight_files import export_checkpoint

  check_and_quiet(argv)
  config_file = config_flags.get_config_filename(flags.FLAGS['config'])
  config = flags.FLAGS.config
  try:
    processes.start(
      flags.FLAGS.coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id, config.distributed.timeout_s
    )
    if flags.FLAGS.evaluate is not None:
      show(evaluate_only(config, flags.FLAGS.evaluate))
    elif flags.FLAGS.export is not None:
      for line in export_checkpoint(config, flags.FLAGS.export):
        say(line)
    elif flags.FLAGS.dry_run:
      dry_run(config)
    else:
      train(config, flags.FLAGS.workdir or Path('runs') / Path(config_file).stem)
  except UserError as error:
    print_error(error)
    processes.leave(2, lost=isinstance(error, processes.LostProcessError))
  except Stopped as stopped:
    print_message(stopped)
    sys.exit(stopped.exit_code)
  except KeyboardInterrupt:
    print_message('interrupted; nothing since the last checkpoint is saved')
    processes.leave(130)
  except Exception as error:
    if lost := processes.lost_process(error):
      print_error(lost)
      processes.leave(2, lost=True)
    traceback.print_exc()
    processes.leave(1)


def show(accuracies: dict[str, Any]) -> None:
  """Prints the result of an evaluation; the last line is about the weights that count most."""
  from t2t_vit_jax.console import say

  if flags.FLAGS.json:
    say(json.dumps({weights: accuracy.as_dict() for weights, accuracy in accuracies.items()}))
    return
  for weights, accuracy in accuracies.items():
    say(f'{weights}: {accuracy}')
  accuracy = accuracies.get('ema', accuracy)
  for line in accuracy.class_table():
    say(line)
  say(accuracy.last_line(flags.FLAGS.config.data.eval_split))


if __name__ == '__main__':
  sys.path.insert(0, str(HERE))  # so that a config can import another, from any folder
  app.run(main, flags_parser=parse_flags)
