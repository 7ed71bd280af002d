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
def test_eight_devices_train_like_one(data_dir, tmp_path):
  """Twenty steps in float32: the same images, and losses within 1e-5."""
  for devices in (8, 1):
    done = subprocess.run(
      [
        sys.executable,
        str(ROOT / 'train.py'),
        f'--workdir={tmp_path}/{devices}',
        f'--config.data.data_dir={data_dir}',
        '--config.schedule.max_steps=20',
        '--config.logging.every_steps=1',
        '--config.model.depth=1',
        '--config.augment.mixup_alpha=0.8',  # groups of 16 images, one on each device
        '--config.augment.mixing_group_size=16',
        '--config.augment.random_erasing_probability=0.25',
      ],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f'on {devices} cpu device(s)' in done.stdout
  one, eight = losses(tmp_path / '1'), losses(tmp_path / '8')
  assert list(one) == list(range(1, 21))
  assert eight == pytest.approx(one, rel=1e-5)


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
