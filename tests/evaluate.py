"""Evaluates a config's fresh model in one of several processes: `evaluate.py CONFIG_JSON PROCESS COUNT PORT`.

Prints, for each batch size, the sums as JSON.
"""

import json
import sys

import jax

from configs import digits
from t2t_vit_jax.recipe.run import build_run


def main(overrides: str, process: str, count: str, port: str) -> None:
  if int(count) > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'localhost:{port}', int(count), int(process))
  results, state = {}, None
  for batch_size in (1, 7, 64):
    config = digits.get_config()
    config.update_from_flattened_dict(json.loads(overrides) | {'data.eval_batch_size': batch_size})
    run = build_run(config)
    state = state or run.recipe.fresh_state()
    results[batch_size] = run.evaluate(state, print)['raw'].as_dict()
  print(json.dumps(results))


if __name__ == '__main__':
  main(*sys.argv[1:])
