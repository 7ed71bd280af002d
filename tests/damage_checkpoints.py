"""Damages the small files of a run's newest checkpoint, again and again: none may stop the run.

`python -m tests.damage_checkpoints [COUNT] [SEED]` damages each file that is no file of numbers COUNT times. The run
must go on from this checkpoint, or from the one before, with the very state that was saved, and every tenth saves
again. An export must read the same, and changes no file. It prints a tally.
"""

from collections import Counter, defaultdict
import contextlib
import io
import json
import logging
from pathlib import Path
import random
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.recipe.sharding import replicated
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import description

STEPS = (3, 7)
METRICS = {'correct': 9, 'correct_top5': 9, 'count': 9, 'loss_sum': 1.5, 'top1': 1.0, 'split': 'test'}
DEEP = 100_000
# A state of few arrays, each of which takes time to read.
TINY = {'model.embed_dim': 8, 'model.num_heads': 2, 'model.token_dim': 4, 'optimizer.name': 'sgd', 'ema.decay': 0.0}


def damaged(data, rng):
  """`data` with a wrong byte; or empty, cut, garbled in several places, or something else altogether."""
  if not data:
    return rng.randbytes(9)
  kind, start = rng.random(), rng.randrange(len(data))
  if kind > 0.9 and (other := retyped(data, rng)):
    return other
  wrong = bytearray(data)
  if kind < 0.6:
    wrong[start] = rng.choice((data[start] ^ (1 << rng.randrange(8)), rng.choice(b'0123456789"{},:'), 0, 255))
  elif kind < 0.65:
    return rng.choice((b'', b'{}', b'null', b'[]', b'7', b'[' * DEEP, b'{"a":' * DEEP, rng.randbytes(len(data))))
  elif kind < 0.75:
    del wrong[start:]
  elif kind < 0.85:
    del wrong[start : start + rng.randint(1, 16)]
  else:
    for _ in range(rng.randint(2, 8)):
      wrong[rng.randrange(len(wrong))] = rng.randrange(256)
  return bytes(wrong)


def retyped(data, rng):
  """JSON in which a value at any depth is of another kind; None if `data` is no JSON object."""
  try:
    tree = json.loads(data)
  except ValueError:
    return None
  places, waiting = [], [tree]
  while waiting:
    node = waiting.pop()
    for key in node if isinstance(node, dict) else range(len(node)):
      places.append((node, key))
      if isinstance(node[key], dict | list):
        waiting.append(node[key])
  node, key = rng.choice(places)
  node[key] = rng.choice((None, True, -1, 2**70, 1e300, '', 'x', [], [None], {}, {'a': 1}))
  return json.dumps(tree).encode()


def small_files(checkpoint):
  """Paths below the folder of a checkpoint of all files but those of numbers."""
  files = (path.relative_to(checkpoint) for path in checkpoint.rglob('*') if path.is_file())
  return sorted(path for path in files if path.parent.name != 'd')


def save_two(run, folder):
  """Saves two checkpoints that differ in more than the step; returns their states by step."""
  states = {}
  with Checkpoints(folder, keep_latest=2) as checkpoints:
    for number, step in enumerate(STEPS):
      state = run.recipe.make_state(jax.random.key(number)).replace(step=jnp.int32(step))
      checkpoints.save(state, metrics=METRICS, run=description(run))
      states[step] = jax.device_get(state)
  return states


def restored(run, folder, save):
  """Step, state, metrics and notes of a run that goes on from `folder`, and perhaps saves there again."""
  with Checkpoints(folder, keep_latest=2) as checkpoints:
    state, *_, notes = checkpoints.restore(run.recipe.abstract_state, description(run))
    step, metrics = checkpoints.latest_step, known(checkpoints.latest_metrics)
    if save:
      checkpoints.save(state.replace(step=jnp.int32(9)), metrics=METRICS, run=description(run))
  return step, jax.device_get(state), metrics, notes


def exported(run, folder):
  """Step, parameters, metrics and notes of what an export of `folder` reads."""
  with Checkpoints(folder, read_only=True) as checkpoints:
    loaded = checkpoints.load_weights(replicated(run.recipe.mesh))
  return loaded.step, jax.device_get(loaded.weights['raw']['params']), known(loaded.metrics), loaded.notes


def known(metrics):
  """Without the name of a checksum that is damaged: what it belongs to is whole then."""
  return metrics and {name: value for name, value in metrics.items() if name in METRICS}


def contents(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def check(run, folder, states, save):
  """Exports and restores what is in `folder` and says which checkpoint was taken; `states` are the right ones, by step.

  Raises:
    AssertionError: another state than one that was saved, or more than a line about it.
  """
  logged = io.StringIO()
  handler = logging.StreamHandler(logged)
  logging.getLogger().addHandler(handler)
  before = contents(folder)
  try:
    with contextlib.redirect_stderr(logged):
      step, weights, metrics, notes = exported(run, folder)
      assert contents(folder) == before
      jax.tree.map(np.testing.assert_array_equal, weights, states[step].params)
      assert metrics in (METRICS, None)
      all_notes = [*notes]
      step, state, metrics, notes = restored(run, folder, save)
  finally:
    logging.getLogger().removeHandler(handler)
  jax.tree.map(np.testing.assert_array_equal, state, states[step])
  assert metrics in (METRICS, None)
  assert logged.getvalue() == '', logged.getvalue()[:2000]
  assert all(note.isprintable() for note in all_notes + notes)
  assert notes or (step == STEPS[-1] and metrics)
  return 'the one before' if step != STEPS[-1] else 'the newest' if metrics else 'the newest, without metrics'


def damage_and_check(run, scratch, count, seed):
  """Damages each small file `count` times and returns what became of them, by file."""
  whole, hurt = scratch / 'whole', scratch / 'hurt'
  states = save_two(run, whole)
  rng, tallies = random.Random(seed), defaultdict(Counter)
  for number in range(1, count + 1):
    for name in small_files(whole / str(STEPS[-1])):
      shutil.copytree(whole, hurt / 'checkpoints')
      file = hurt / 'checkpoints' / str(STEPS[-1]) / name
      content = damaged(file.read_bytes(), rng)
      file.write_bytes(content)
      try:
        tallies[name][check(run, hurt / 'checkpoints', states, save=number % 10 == 1)] += 1
      except Exception as error:
        error.add_note(f'{name}, round {number} with seed {seed}: {content[:200]!r}')
        raise
      shutil.rmtree(hurt)
    if number % 10 == 0:
      print(f'{number} rounds:', {str(name): dict(tally) for name, tally in tallies.items()}, flush=True)
  return tallies


if __name__ == '__main__':
  from tests.test_training_loop import small_config

  jax.config.update('jax_platforms', 'cpu')
  count, seed = (int(argument) for argument in (sys.argv[1:] + ['200', '0'][len(sys.argv) - 1 :]))
  with tempfile.TemporaryDirectory() as name:
    run = build_run(small_config(f'{name}/data', **TINY))
    tallies = damage_and_check(run, Path(name), count, seed)
  print(f'{sum(tally.total() for tally in tallies.values())} mutations, seed {seed}:')
  for name, tally in tallies.items():
    print(f'  {name}: {dict(tally)}')
