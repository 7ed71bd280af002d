"""One of several training processes: `train_process.py CONFIG_JSON WORKDIR PROCESS COUNT PORT`.

Exits with 128 + the signal's number when stopped by one, as train.py does.
"""

import json
import sys

import jax

from configs import digits
from t2t_vit_jax.training.loop import Stopped, train


def main(overrides: str, workdir: str, process: str, count: str, port: str) -> int:
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', int(count), int(process))
  config = digits.get_config()
  config.update_from_flattened_dict(json.loads(overrides))
  try:
    train(config, workdir)
  except Stopped as stopped:
    print(stopped, flush=True)
    return stopped.exit_code
  return 0


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
