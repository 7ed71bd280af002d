"""Several processes and devices: the same run in every layout, and failures that all of them notice."""

import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from configs import digits
from t2t_vit_jax.training.checkpoint import Checkpoints
from t2t_vit_jax.training.run import build_run
from tests.image_folder import write_image_folder
from tests.processes import finish, losses, run, start

# Processes, devices of each, devices that divide the state.
LAYOUTS = [(1, 8, 1), (1, 8, 8), (2, 2, 1), (2, 2, 2), (4, 2, 1), (4, 2, 4)]
STEPS = 20


def flags(workdir, data_dir, *, steps=STEPS, **changes):
  """A small run on the digits in float32, which every layout up to eight devices divides."""
  fields = {
    'data.data_dir': data_dir,
    'data.image_size': 16,
    'data.batch_size': 64,
    'data.eval_batch_size': 100,
    'model.depth': 1,
    'schedule.max_steps': steps,
    'logging.every_steps': 1,
    'checkpoint.every_steps': 10,
    'augment.mixup_alpha': 0.8,
    'augment.mixing_group_size': 16,  # of eight devices each has half a group
    'augment.random_erasing_probability': 0.25,
    'distributed.timeout_s': 120,
  } | changes
  return [f'--workdir={workdir}', *(f'--config.{name}={value}' for name, value in fields.items())]


def evaluations(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  sums = ('step', 'weights', 'correct', 'correct_top5', 'count')
  return [tuple(row[name] for name in sums) for row in rows if row['kind'] == 'test']


@pytest.fixture(scope='module')
def alone(data_dir, tmp_path_factory):
  """A run of one process with one device, and a copy of its workdir after the first step."""
  folder = tmp_path_factory.mktemp('alone')
  run(1, *flags(folder / 'run', data_dir, steps=1))
  shutil.copytree(folder / 'run', folder / 'begun')
  run(1, *flags(folder / 'run', data_dir))
  return folder


def final_state(workdir, data_dir):
  """Its last checkpoint, read by this process's two devices with the state divided."""
  config = digits.get_config()
  config.update_from_flattened_dict(
    {'data.data_dir': data_dir, 'data.image_size': 16, 'data.batch_size': 64, 'model.depth': 1, 'mesh.fsdp': 2}
  )
  parts = build_run(config)
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(parts.abstract_state, parts.description)[0])


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'devices', 'fsdp'), LAYOUTS)
def test_every_layout_trains_alike(alone, data_dir, tmp_path, processes, devices, fsdp):
  """From a checkpoint of one device; what it leaves is read by two. The evaluation has 360 images in batches of 100."""
  workdir = shutil.copytree(alone / 'begun', tmp_path / 'run')
  output = run(processes, *flags(workdir, data_dir), f'--config.mesh.fsdp={fsdp}', devices=devices)
  total = processes * devices
  assert f'mesh: data {total // fsdp} x fsdp {fsdp}; each device has {64 // total} images of a batch' in output
  assert ('so devices exchange pixels' in output) == (total == 8)
  found, expected = losses(workdir), losses(alone / 'run')
  assert list(found) == list(range(1, STEPS + 1))
  assert found == pytest.approx(expected, rel=1e-5)
  assert evaluations(workdir) == evaluations(alone / 'run')
  there, here = final_state(workdir, data_dir), final_state(alone / 'run', data_dir)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), there.params, here.params)


@pytest.mark.slow
def test_an_image_folder_trains_alike_in_several_processes(data_dir, tmp_path):
  """Images of different sizes, augmented on the host, and 21 evaluated ones, which no batch divides."""
  folder = write_image_folder(tmp_path / 'images', ('cat', 'dog', 'emu'), train=16, val=7)
  changes = {
    'data.source': 'folder',
    'data.path': folder,
    'data.eval_split': 'val',
    'data.batch_size': 16,
    'data.num_workers': 0,
    'augment.crop': 'resized',
    'augment.randaugment_operations': 2,
    'augment.horizontal_flip_probability': 0.5,
    'augment.mixing_group_size': 4,
  }
  run(1, *flags(tmp_path / 'one', data_dir, **changes))
  run(2, *flags(tmp_path / 'four', data_dir, **changes), '--config.mesh.fsdp=2', devices=2)
  assert losses(tmp_path / 'four') == pytest.approx(losses(tmp_path / 'one'), rel=1e-5)
  last_lines = [(tmp_path / name / 'metrics.jsonl').read_text().splitlines()[-1] for name in ('one', 'four')]
  one, four = map(json.loads, last_lines)
  assert one['count'] == four['count'] == 21
  assert (one['correct'], one['weights']) == (four['correct'], four['weights'])


@pytest.mark.slow
def test_the_death_of_a_process_stops_the_others_and_fewer_go_on(alone, data_dir, tmp_path):
  everyone = flags(tmp_path / 'run', data_dir, **{'checkpoint.every_steps': 4, 'distributed.timeout_s': 30})
  processes = start(4, *everyone, devices=2)
  for line in processes[0].stdout:
    if line.startswith('step 6/20'):
      break
  processes[2].kill()
  killed = time.monotonic()
  results = finish(processes)
  assert time.monotonic() - killed < 30 + 10
  assert [code for code, _, _ in results] == [2, 2, -signal.SIGKILL, 2]
  assert all('cannot reach the others any more' in results[i][2] for i in (0, 1, 3))
  output = run(2, *everyone, devices=2)
  begun = int(re.search(r'continuing from the checkpoint of step (\d+)', output)[1])
  assert begun in (4, 8)
  assert losses(tmp_path / 'run') == pytest.approx(losses(alone / 'run'), rel=1e-5)
  assert evaluations(tmp_path / 'run') == evaluations(alone / 'run')


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(alone, data_dir, tmp_path):
  everyone = flags(tmp_path / 'run', data_dir)
  processes = start(2, *everyone)
  for line in processes[0].stdout:
    if line.startswith('step 4/20'):
      break
  processes[1].send_signal(signal.SIGTERM)
  results = finish(processes)
  assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * 2
  stopped = {re.search(r'stopped at step (\d+) and saved', error)[1] for _, _, error in results}
  assert len(stopped) == 1
  assert {path.name for path in (tmp_path / 'run' / 'checkpoints').glob('[0-9]*')} >= stopped
  run(1, *everyone, devices=2)
  assert losses(tmp_path / 'run') == pytest.approx(losses(alone / 'run'), rel=1e-5)
