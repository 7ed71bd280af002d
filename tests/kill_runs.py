"""Kills a run with SIGKILL again and again; it must end like one that was left alone.

`python -m tests.kill_runs [KILLS] [SEED]` trains a small model on the digits twice: once undisturbed, and once killed
at KILLS random moments, every other time in the middle of a save, and started again. At the end parameters, moving
average, optimizer state and metrics must be the same bit for bit (timings aside).
"""

import json
import os
from pathlib import Path
import random
import re
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from tests import processes

ROOT = Path(__file__).parents[1]
TIMINGS = ('images_per_second', 'data_wait')
SETTINGS = {
  'model.depth': 1,
  'model.embed_dim': 32,
  'model.token_dim': 16,
  'model.performer_dropout_rate': 0.1,
  'data.batch_size': 64,
  'data.image_size': 16,
  'data.source': 'tfds',
  'data.eval_split': 'test[:60]',
  'schedule.epochs': 90,
  'checkpoint.every_steps': 10,
  'logging.every_steps': 5,
}


def start(workdir: Path, settings: dict) -> subprocess.Popen:
  flags = [f'--config.{name}={value}' for name, value in settings.items()]
  command = [sys.executable, str(ROOT / 'train.py'), f'--workdir={workdir}', *flags]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  processes.started.append(process)  # of a test, which ends it if it fails
  return process


def saving(workdir: Path) -> bool:
  """Whether a checkpoint is half-written at this moment."""
  return any('tmp' in path.name for path in (workdir / 'checkpoints').glob('*'))


def kill_somewhere(
  process: subprocess.Popen, workdir: Path, rng: random.Random, in_save: bool, latest: float
) -> str | None:
  """Kills after a random step of the first `latest` of those to come, and says which; None if the run ended before."""
  assert process.stdout is not None
  target = None
  for line in process.stdout:
    if found := re.match(r'step (\d+)/(\d+)', line):
      step, total = map(int, found.groups())
      target = step + rng.uniform(0, latest) * (total - step) if target is None else target
      if step >= target:
        break
  deadline = time.monotonic() + 5
  while in_save and not saving(workdir) and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.0005)
  half_written = saving(workdir)
  process.kill()
  rest = process.communicate()[0]
  if process.returncode == 0:
    return None
  last = re.findall(r'step (\d+)/', rest) or [step]
  return f'step {last[-1]}' + (', while saving' if half_written else '')


def result(workdir: Path, settings: dict) -> tuple[list[dict], list[np.ndarray]]:
  """Metrics without timings, and the arrays of the final state."""
  from configs import digits
  from t2t_vit_jax.recipe.run import build_run
  from t2t_vit_jax.workdir.checkpoints import Checkpoints
  from t2t_vit_jax.workdir.description import description

  config = digits.get_config()
  config.update_from_flattened_dict(settings)
  run = build_run(config)
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    state = checkpoints.restore(run.recipe.abstract_state, description(run))[0]
  assert int(state.step) == run.recipe.total_steps
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows], jax.tree.leaves(jax.device_get(state))


def kill_and_compare(folder: Path, kills: int, seed: int, **changes) -> list[str]:
  """Runs both; returns a line for each kill.

  Raises:
    AssertionError: the results differ.
  """
  settings, rng = SETTINGS | changes, random.Random(seed)
  undisturbed = start(folder / 'undisturbed', settings)
  last_line = undisturbed.communicate()[0].splitlines()[-1]
  assert undisturbed.returncode == 0
  moments: list[str] = []
  while len(moments) < kills:
    process = start(folder / 'killed', settings)
    number = len(moments)
    moment = kill_somewhere(process, folder / 'killed', rng, number % 2 == 1, latest=1 / (kills - number + 1))
    assert moment, f'the run ended after {len(moments)} kills: make it longer'
    moments.append(moment)
    print(f'kill {len(moments)}: after {moment}', flush=True)
  process = start(folder / 'killed', settings)
  output = process.communicate()[0]
  assert process.returncode == 0, output
  assert output.splitlines()[-1] == last_line
  rows, arrays = result(folder / 'undisturbed', settings)
  killed_rows, killed_arrays = result(folder / 'killed', settings)
  assert killed_rows == rows
  assert len(killed_arrays) == len(arrays)
  for ours, theirs in zip(killed_arrays, arrays, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  return moments


if __name__ == '__main__':
  with tempfile.TemporaryDirectory() as scratch:
    number, seed = (int(argument) for argument in (sys.argv[1:] + ['20', '0'][len(sys.argv) - 1 :]))
    moments = kill_and_compare(Path(scratch), number, seed)
  in_saves = sum('saving' in moment for moment in moments)
  print(f'{number} kills, {in_saves} of them while a checkpoint was being written: the same final state and metrics')
