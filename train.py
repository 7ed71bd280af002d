"""Trains a T2T-ViT: python train.py --config=configs/t2t_vit_14.py --workdir=runs/t2t_vit_14."""

from pathlib import Path
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from t2t_vit_jax.errors import UserError

HERE = Path(__file__).parent
CONFIG = config_flags.DEFINE_config_file('config', str(HERE / 'configs' / 'digits.py'), 'The run: a file in configs/.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints and metrics. Default: runs/<config name>.')


def main(argv: list[str]) -> None:
  from t2t_vit_jax.training.loop import Stopped, train  # imported late: bad flags are refused at once

  if len(argv) > 1:
    raise app.UsageError(f'arguments without a flag: {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax logs every file at INFO
  config_file = config_flags.get_config_filename(flags.FLAGS['config'])
  try:
    train(CONFIG.value, WORKDIR.value or Path('runs') / Path(config_file).stem)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(stopped.exit_code)


if __name__ == '__main__':
  sys.path.insert(0, str(HERE))  # so that a config finds its neighbours from any folder
  app.run(main)
