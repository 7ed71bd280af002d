"""Trains a T2T-ViT: t2t-vit train --config=t2t_vit_14 --workdir=runs/t2t_vit_14.

`python train.py` in the checkout takes the same flags. docs/training.md describes what a run does.
"""

import json
from pathlib import Path
import sys
import traceback
from typing import Any

from t2t_vit_jax.command_line import add_process_flags, print_error, print_message, run_tool
from t2t_vit_jax.config_files import ConfigParser
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.interrupts import importing


def run(arguments: Any) -> int:
  """Does what the command line asks for; returns the exit code."""
  with importing():  # late: it takes seconds, and wrong flags should be refused at once
    from t2t_vit_jax import processes
    from t2t_vit_jax.console import say
    from t2t_vit_jax.training.dry_run import dry_run
    from t2t_vit_jax.training.evaluate_only import evaluate_only
    from t2t_vit_jax.training.loop import Stopped, train
    from t2t_vit_jax.workdir.weight_files import export_checkpoint

  config = arguments.config
  try:
    processes.start(arguments.coordinator, arguments.num_processes, arguments.process_id, config.distributed.timeout_s)
    if arguments.evaluate is not None:
      show(evaluate_only(config, arguments.evaluate), arguments)
    elif arguments.export is not None:
      for line in export_checkpoint(config, arguments.export):
        say(line)
    elif arguments.dry_run:
      dry_run(config)
    else:
      train(config, arguments.workdir or Path('runs') / arguments.config_file.stem)
  except UserError as error:
    print_error(error)
    processes.leave(2, lost=isinstance(error, processes.LostProcessError))
  except Stopped as stopped:
    print_message(stopped)
    return stopped.exit_code
  except KeyboardInterrupt:
    print_message('interrupted; nothing since the last checkpoint is saved')
    processes.leave(130)
  except Exception as error:
    if lost := processes.lost_process(error):
      print_error(lost)
      processes.leave(2, lost=True)
    traceback.print_exc()
    processes.leave(1)
  return 0


def show(accuracies: dict[str, Any], arguments: Any) -> None:
  """Prints the result of an evaluation; the last line is about the weights that count most."""
  from t2t_vit_jax.console import say

  if arguments.json:
    say(json.dumps({weights: accuracy.as_dict() for weights, accuracy in accuracies.items()}))
    return
  for weights, accuracy in accuracies.items():
    say(f'{weights}: {accuracy}')
  accuracy = accuracies.get('ema', accuracy)
  for line in accuracy.class_table():
    say(line)
  say(accuracy.last_line(arguments.config.data.eval_split))


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = ConfigParser(
    'train',
    default='digits',
    example='t2t-vit train --config=t2t_vit_14 --workdir=runs/t2t_vit_14 --config.data.data_dir=DATA',
    description='Trains a model; checkpoints, curves and weights go to a folder. The same command resumes the run.',
    epilog='Exit code: 0; 2 if it failed; 128 and the number of the signal, such as 130 for Ctrl-C, if it was stopped.',
  )
  parser.add_argument(
    '--workdir', metavar='DIR', help='folder for checkpoints, curves and weights (default: runs/NAME_OF_THE_CONFIG)'
  )
  parser.add_argument(
    '--dry_run', action='store_true', help='build and check everything, describe the run, train nothing'
  )
  parser.add_argument(
    '--evaluate', metavar='WEIGHTS', help='weight file or folder of a run: evaluate its weights, train nothing'
  )
  parser.add_argument('--json', action='store_true', help='with --evaluate: print the result as JSON, and only that')
  parser.add_argument(
    '--export',
    metavar='DIR',
    help='folder of a run: write the weights of its newest checkpoint as files, train nothing',
  )
  add_process_flags(parser)
  return run_tool(lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
