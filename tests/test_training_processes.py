"""Several processes and devices: the same run in every layout, and failures that all of them notice."""

import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import digits
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import description
from t2t_vit_jax.workdir.weight_files import export_checkpoint
from tests.image_folder import write_image_folder
from tests.processes import ROOT, finish, free_port, losses, run, start

STEPS = 12


def flags(workdir, data_dir, *, steps=STEPS, **changes):
  """A small run on the digits in float32, which every layout up to eight devices divides."""
  fields = {
    'data.data_dir': data_dir,
    'data.image_size': 16,
    'data.batch_size': 16,
    'data.eval_batch_size': 100,
    'model.depth': 1,
    'schedule.max_steps': steps,
    'logging.every_steps': 1,
    'checkpoint.every_steps': 6,
    'augment.mixup_alpha': 0.8,
    'augment.mixing_group_size': 4,  # of eight devices each has half a group
    'augment.random_erasing_probability': 0.25,
    'distributed.timeout_s': 120,
  } | changes
  return [f'--workdir={workdir}', *(f'--config.{name}={value}' for name, value in fields.items())]


def evaluations(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  sums = ('step', 'weights', 'correct', 'correct_top5', 'count')
  return [tuple(row[name] for name in sums) for row in rows if 'weights' in row]


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
    {'data.data_dir': data_dir, 'data.image_size': 16, 'data.batch_size': 16, 'model.depth': 1, 'mesh.fsdp': 2}
  )
  run = build_run(config)
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(run.recipe.abstract_state, description(run))[0])


def check_like_alone(workdir, alone, data_dir):
  """The workdir of a run in any layout has the same metrics, state and weight files as that of one device."""
  found, expected = losses(workdir), losses(alone / 'run')
  assert list(found) == list(range(1, STEPS + 1))
  assert found == pytest.approx(expected, rel=1e-5)
  assert evaluations(workdir) == evaluations(alone / 'run')
  there, here = final_state(workdir, data_dir), final_state(alone / 'run', data_dir)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), there.params, here.params)
  # The weight files that all of them wrote are, byte for byte, what this process makes of their last checkpoint.
  written = {path.name: path.read_bytes() for path in (workdir / 'weights').iterdir()}
  shutil.rmtree(workdir / 'weights')
  export_checkpoint(digits.get_config(), str(workdir))
  assert written == {path.name: path.read_bytes() for path in (workdir / 'weights').iterdir()}
  assert len(written) == 4
  assert (workdir / 'per_class.csv').read_text() == (alone / 'run' / 'per_class.csv').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('fsdp', [1, 8])
def test_eight_devices_train_alike(alone, data_dir, tmp_path, fsdp):
  """From a checkpoint of one device; what it leaves is read by two. The evaluation has 360 images in batches of 100."""
  workdir = shutil.copytree(alone / 'begun', tmp_path / 'run')
  output = run(1, *flags(workdir, data_dir), f'--config.mesh.fsdp={fsdp}', devices=8)
  assert f'mesh: data {8 // fsdp} x fsdp {fsdp}; each device has 2 images of a batch' in output
  assert 'so devices exchange pixels' in output
  check_like_alone(workdir, alone, data_dir)


@pytest.fixture(scope='module')
def folder_flags(data_dir, tmp_path_factory):
  """Flags for images of different sizes, augmented on the host; 21 are evaluated, which no batch divides."""
  changes = {
    'data.source': 'folder',
    'data.path': write_image_folder(tmp_path_factory.mktemp('images'), ('cat', 'dog', 'emu'), train=16, val=7),
    'data.eval_split': 'val',
    'data.batch_size': 16,
    'data.num_workers': 0,
    'augment.crop': 'resized',
    'augment.randaugment_operations': 2,
    'augment.horizontal_flip_probability': 0.5,
    'augment.mixing_group_size': 4,
  }
  return lambda workdir: flags(workdir, data_dir, **changes)


@pytest.fixture(scope='module')
def folder_alone(folder_flags, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  run(1, *folder_flags(workdir))
  return workdir


def test_two_processes_train_alike_on_an_image_folder(folder_flags, folder_alone, tmp_path):
  run(2, *folder_flags(tmp_path / 'run'), devices=2)
  assert losses(tmp_path / 'run') == pytest.approx(losses(folder_alone), rel=1e-5)
  found, expected = evaluations(tmp_path / 'run'), evaluations(folder_alone)
  assert found == expected
  assert {count for *_, count in found} == {21}


@pytest.mark.slow
def test_the_death_of_a_process_stops_the_others_and_fewer_go_on(alone, data_dir, tmp_path):
  """Four processes of two devices each, then two; both divide the state, and train like one device."""
  workdir = shutil.copytree(alone / 'begun', tmp_path / 'run')
  everyone = flags(workdir, data_dir, **{'checkpoint.every_steps': 4, 'distributed.timeout_s': 40})
  processes = start(4, *everyone, '--config.mesh.fsdp=4', devices=2)
  output = []
  for line in processes[0].stdout:
    output.append(line)
    if line.startswith(f'step 7/{STEPS}'):
      break
  processes[2].kill()
  killed = time.monotonic()
  results = finish(processes)
  assert time.monotonic() - killed < 40 + 30  # the heartbeat's time, and some to notice and to leave
  for code, _, errors in results[:2] + results[3:]:
    # Either a transfer fails, or it waits for the dead one until JAX itself ends the process.
    expected = {2: 'cannot reach the others any more', -signal.SIGABRT: 'another task died'}
    assert expected[code] in errors
  assert any('mesh: data 2 x fsdp 4; each device has 2 images of a batch' in line for line in output)
  assert any('so devices exchange pixels' in line for line in output)
  rows = losses(workdir)
  assert {step: rows[step] for step in range(1, 5)} == pytest.approx(
    dict(list(losses(alone / 'run').items())[:4]), rel=1e-5
  )

  output = run(2, *everyone, '--config.mesh.fsdp=2', devices=2)
  assert 'mesh: data 2 x fsdp 2; each device has 4 images of a batch' in output
  assert 'so devices exchange pixels' not in output
  begun = int(re.search(r'continuing from the checkpoint of step (\d+)', output)[1])
  assert begun % 4 == 0
  assert 4 <= begun < STEPS
  check_like_alone(workdir, alone, data_dir)


@pytest.mark.slow
def test_the_documented_commands_for_one_machine(data_dir, tmp_path):
  page = (ROOT / 'docs' / 'distributed.md').read_text()
  commands = re.search(r'### Two processes on a laptop.*?```bash\n(.*?)```', page, re.DOTALL)[1]
  commands, changed = re.subn(r'--coordinator=localhost:\d+', f'--coordinator=localhost:{free_port()}', commands)
  assert changed == 2
  for name in ('configs', 't2t_vit_jax', 'train.py'):
    (tmp_path / name).symlink_to(ROOT / name)
  path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
  environment = {**os.environ, 'PATH': path, 'JAX_PLATFORMS': 'cpu', 'TFDS_DATA_DIR': data_dir}
  done = subprocess.run(
    ['bash', '-ec', commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
  )
  assert done.returncode == 0, done.stderr
  assert '2 processes on 1 host with 2 cpu devices in all' in done.stderr.splitlines()
  lines = [line for line in done.stdout.splitlines() if not line.startswith('[Gloo]')]
  assert re.fullmatch(r'test top-1 \d+\.\d\d % \(\d+/360\)', lines[-1])
  assert losses(tmp_path / 'runs' / 'two').keys() == {11, 22}


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(alone, data_dir, tmp_path):
  processes = start(2, *flags(tmp_path / 'run', data_dir, steps=2000))
  for line in processes[0].stdout:
    if line.startswith('step 4/'):
      break
  processes[1].send_signal(signal.SIGTERM)
  results = finish(processes)
  assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * 2, results
  stopped = {re.search(r'stopped at step (\d+) and saved', error)[1] for _, _, error in results}
  assert len(stopped) == 1
  assert {path.name for path in (tmp_path / 'run' / 'checkpoints').glob('[0-9]*')} >= stopped
  end = max(STEPS, *(int(step) + 1 for step in stopped))
  run(1, *flags(tmp_path / 'run', data_dir, steps=end), devices=2)
  found = losses(tmp_path / 'run')
  assert list(found) == list(range(1, end + 1))
  assert {step: found[step] for step in range(1, STEPS + 1)} == pytest.approx(losses(alone / 'run'), rel=1e-5)
