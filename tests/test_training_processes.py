"""Several processes: a signal to one stops all after the same step, and one process can carry on."""

import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys

from flax.traverse_util import flatten_dict
import pytest

from t2t_vit_jax.training import loop
from tests.test_training_evaluation import free_port
from tests.test_training_loop import small_config

ROOT = Path(__file__).parents[1]


def start(overrides, workdir, count):
  port = free_port()
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, str(ROOT / 'tests' / 'train_process.py'), json.dumps(overrides), str(workdir)]
  return [
    subprocess.Popen([*command, str(i), str(count), str(port)], env=environment, text=True, stdout=subprocess.PIPE)
    for i in range(count)
  ]


def losses(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {row['step']: row['loss'] for row in rows if row['kind'] == 'train'}


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(data_dir, tmp_path):
  changes = {'schedule.max_steps': 40, 'logging.every_steps': 1, 'model.performer_dropout_rate': 0.0}
  flat = flatten_dict(small_config(data_dir, **changes).to_dict(), sep='.')
  processes = start({name: value for name, value in flat.items() if value is not None}, tmp_path / 'run', 2)
  for line in processes[0].stdout:
    if line.startswith('step 4/40'):
      break
  processes[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
  stopped = {re.search(r'stopped at step (\d+) and saved', output)[1] for output in outputs}
  assert len(stopped) == 1
  assert {path.name for path in (tmp_path / 'run' / 'checkpoints').glob('[0-9]*')} == stopped

  # One process with two devices instead of two processes goes on, on the same batches.
  loop.train(small_config(data_dir, **changes), tmp_path / 'run')
  loop.train(small_config(data_dir, **changes), tmp_path / 'alone')
  assert losses(tmp_path / 'run') == pytest.approx(losses(tmp_path / 'alone'), rel=1e-4)
