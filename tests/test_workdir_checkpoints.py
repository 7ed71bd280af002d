"""Checkpoints that are damaged, disks that are full, runs that meet in one folder, and kills at any moment."""

import json
import logging
import os
import shutil
import sys
import threading

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import tensorstore

from t2t_vit_jax import UserError
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import description
from t2t_vit_jax.workdir.fingerprints import fingerprint
from t2t_vit_jax.workdir.folder import open_workdir
from tests import damage_checkpoints
from tests.kill_runs import kill_and_compare
from tests.processes import ROOT, finish, start_command, start_process
from tests.small_disk import small_disk
from tests.test_training_loop import small_config

pytestmark = pytest.mark.usefixtures('shared_programs')


@pytest.fixture(scope='module')
def run(data_dir):
  return build_run(small_config(data_dir))


@pytest.fixture
def two_checkpoints(run, tmp_path):
  """Steps 3 and 7 of one state."""
  state = run.recipe.make_state(run.recipe.rng)
  with Checkpoints(tmp_path / 'checkpoints', keep_latest=2) as checkpoints:
    for step in (3, 7):
      checkpoints.save(state.replace(step=jnp.int32(step)), metrics=None, run=description(run))
  return tmp_path / 'checkpoints'


def largest_file(folder):
  return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_taken(run, two_checkpoints):
  numbers = largest_file(two_checkpoints / '7')
  content = bytearray(numbers.read_bytes())
  content[len(content) // 2] ^= 1
  numbers.write_bytes(content)
  with Checkpoints(two_checkpoints) as checkpoints:
    state, _, changes, (line,) = checkpoints.restore(run.recipe.abstract_state, description(run))
    assert checkpoints.latest_step == 3
  assert int(state.step) == 3
  assert changes == []
  jax.tree.map(np.testing.assert_array_equal, state.params, run.recipe.make_state(run.recipe.rng).params)
  shelf = two_checkpoints.parent / 'damaged' / '7'
  assert f'{two_checkpoints}/7 is damaged' in line
  assert str(shelf) in line
  assert (shelf / numbers.relative_to(two_checkpoints / '7')).read_bytes() == content


@pytest.fixture(scope='module')
def tiny(data_dir, tmp_path_factory):
  """A run of few arrays, a folder with two checkpoints of it, and their states by step."""
  run, folder = build_run(small_config(data_dir, **damage_checkpoints.TINY)), tmp_path_factory.mktemp('tiny')
  return run, folder, damage_checkpoints.save_two(run, folder)


@pytest.mark.parametrize(
  ('step', 'name', 'damage', 'outcome'),
  [
    (7, '_CHECKPOINT_METADATA', lambda data: data.replace(b'"seed": 0', b'"seed": 1'), 'the one before'),
    (7, '_CHECKPOINT_METADATA', lambda data: data.replace(b'custom_metadata', b'custom_metadatA'), 'the one before'),
    (7, '_CHECKPOINT_METADATA', lambda data: b'', 'the one before'),
    (7, '_CHECKPOINT_METADATA', lambda data: b'[' * 100_000, 'the one before'),
    (7, 'state/_METADATA', lambda data: data.replace(b'"proj"', b'"prok"'), 'the one before'),
    (7, 'state/_sharding', lambda data: data[:99], 'the one before'),
    (7, 'metrics/metrics', lambda data: data.replace(b'test', b'tess'), 'the newest, without metrics'),
    (7, 'metrics/metrics', lambda data: b'[' * 100_000, 'the newest, without metrics'),
    (7, 'metrics/metrics', lambda data: data.replace(b'{', b'\xff'), 'the newest, without metrics'),
    (3, 'metrics/metrics', lambda data: b'null', 'the newest'),
    (3, '_CHECKPOINT_METADATA', lambda data: b'{}', 'the newest'),
  ],
)
def test_a_damaged_small_file_costs_a_checkpoint_at_most(tiny, tmp_path, step, name, damage, outcome):
  run, folder, states = tiny
  shutil.copytree(folder, tmp_path / 'checkpoints')
  file = tmp_path / 'checkpoints' / str(step) / name
  content = file.read_bytes()
  assert damage(content) != content
  file.write_bytes(damage(content))
  assert damage_checkpoints.check(run, tmp_path / 'checkpoints', states, save=True) == outcome
  (aside,) = (tmp_path / 'damaged').iterdir()
  assert aside.name == ('7-metrics' if outcome.endswith('without metrics') else str(step))


def test_a_changed_number_in_files_that_are_in_order_costs_the_checkpoint(tiny, tmp_path):
  """As if memory had failed before the number was written: no checksum of a file can notice."""
  run, folder, states = tiny
  shutil.copytree(folder, tmp_path / 'checkpoints')
  where = {'driver': 'ocdbt', 'base': f'file://{tmp_path}/checkpoints/7/state/'}
  array = tensorstore.open({'driver': 'zarr3', 'kvstore': where, 'path': 'params.head.bias/'}).result()
  array[3] = array[3].read().result() + 1e-3
  assert damage_checkpoints.check(run, tmp_path / 'checkpoints', states, save=False) == 'the one before'


@pytest.mark.parametrize(
  ('step', 'name', 'outcome'),
  [
    (7, '_CHECKPOINT_METADATA', 'the one before'),
    (7, 'state/manifest.ocdbt', 'the one before'),
    (7, 'metrics/metrics', 'the newest, without metrics'),
    (3, 'metrics/metrics', 'the newest'),
  ],
)
def test_a_pipe_among_the_files_of_a_checkpoint_costs_a_checkpoint_at_most(tiny, tmp_path, step, name, outcome):
  run, folder, states = tiny
  shutil.copytree(folder, tmp_path / 'checkpoints')
  (tmp_path / 'checkpoints' / str(step) / name).unlink()
  os.mkfifo(tmp_path / 'checkpoints' / str(step) / name)
  assert damage_checkpoints.check(run, tmp_path / 'checkpoints', states, save=True) == outcome
  with Checkpoints(tmp_path / 'checkpoints', read_only=True) as checkpoints:
    assert checkpoints.best


def test_a_damaged_checkpoint_that_cannot_be_moved_is_one_line(tiny, tmp_path):
  run, folder, _ = tiny
  shutil.copytree(folder, tmp_path / 'checkpoints')
  (tmp_path / 'checkpoints' / '7' / '_CHECKPOINT_METADATA').write_text('')
  os.mkfifo(tmp_path / 'damaged')
  with (
    Checkpoints(tmp_path / 'checkpoints') as checkpoints,
    pytest.raises(UserError, match=rf'7/? is damaged \(.*\) and cannot be moved to {tmp_path}/damaged/7: File exists'),
  ):
    checkpoints.restore(run.recipe.abstract_state, description(run))


def test_what_is_half_written_is_no_checkpoint_and_goes_with_the_next_save(tiny, tmp_path):
  run, folder, states = tiny
  shutil.copytree(folder, tmp_path / 'checkpoints')
  for name in ('9.orbax-checkpoint-tmp', '11.orbax-checkpoint-tmp'):
    shutil.copytree(folder / '7', tmp_path / 'checkpoints' / name)
  (tmp_path / 'checkpoints' / '11.orbax-checkpoint-tmp' / '_CHECKPOINT_METADATA').unlink()
  # The export in it, which saves nothing, changes no file.
  assert damage_checkpoints.check(run, tmp_path / 'checkpoints', states, save=False) == 'the newest'
  assert damage_checkpoints.check(run, tmp_path / 'checkpoints', states, save=True) == 'the newest'
  assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == {'7', '9'}
  assert not (tmp_path / 'damaged').exists()


def test_metrics_that_come_later_count_for_the_best_checkpoint(tiny, tmp_path):
  run, folder, _ = tiny
  shutil.copytree(folder, tmp_path / 'checkpoints')
  shutil.rmtree(tmp_path / 'checkpoints' / '7' / 'metrics')
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    assert checkpoints.latest_metrics is None
    checkpoints.add_metrics({'top1': 2.0})
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    assert checkpoints.best == (7, {'top1': 2.0})
    state = checkpoints.restore(run.recipe.abstract_state, description(run)).state
    for later in (8, 9):
      checkpoints.save(state.replace(step=jnp.int32(later)), metrics={'top1': 1.5}, run=description(run))
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['7', '9']


def test_what_an_older_version_saved_without_checksums_is_read(tiny, tmp_path):
  run, folder, states = tiny
  shutil.copytree(folder, tmp_path / 'checkpoints')
  for name in ('_CHECKPOINT_METADATA', 'metrics/metrics'):
    file = tmp_path / 'checkpoints' / '7' / name
    stored = json.loads(file.read_text())
    del stored.get('custom_metadata', stored)['checksum']
    file.write_text(json.dumps(stored))
  assert damage_checkpoints.check(run, tmp_path / 'checkpoints', states, save=False) == 'the newest'


def test_one_line_says_why_a_checkpoint_cannot_be_read(run, two_checkpoints, caplog):
  """Half of the file of numbers is missing: orbax would log a failure for each array in it."""
  numbers = largest_file(two_checkpoints / '7')
  os.truncate(numbers, numbers.stat().st_size // 2)
  with Checkpoints(two_checkpoints) as checkpoints:
    *_, (line,) = checkpoints.restore(run.recipe.abstract_state, description(run))
  assert f'{two_checkpoints}/7 is damaged (ValueError: OUT_OF_RANGE: Error reading ' in line
  assert [record for record in caplog.records if record.levelno > logging.INFO] == []


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_fingerprints_see_every_bit_and_the_order(data):
  shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  x = np.asarray(rng.standard_normal(shape), np.float32)
  bits = x.copy().reshape(-1).view(np.uint32)
  bits[data.draw(st.integers(0, bits.size - 1))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
  flipped = bits.view(np.float32).reshape(shape)
  assert fingerprint([x]) != fingerprint([flipped])
  if shape and shape[-1] > 1:
    assert fingerprint([x]) != fingerprint([np.roll(x, 1, axis=-1)])


def test_fingerprints_do_not_depend_on_the_sharding(run):
  x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
  sharding = jax.sharding.NamedSharding(run.recipe.mesh, PartitionSpec('data'))
  assert len(sharding.device_set) == 2
  assert fingerprint([x]) == fingerprint([jax.device_put(x, sharding)])


SAVES_TWICE = """
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from t2t_vit_jax import UserError, processes
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import description
from tests.small_disk import fill
from tests.test_training_loop import small_config

if __name__ == '__main__':
  data_dir, folder, room = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
  run, rng = build_run(small_config(data_dir)), np.random.default_rng(0)
  state = jax.tree.map(  # zeros would be compressed
    lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    run.recipe.make_state(run.recipe.rng),
  )
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  try:
    with Checkpoints(folder / 'checkpoints') as checkpoints:
      checkpoints.save(state, metrics=None, run=description(run))
      checkpoints.wait()
      if room:
        fill(folder, int(room * size))
      else:
        subprocess.run(['mount', '-o', 'remount,ro', folder], check=True)
      checkpoints.save(state.replace(step=jnp.int32(5)), metrics=None, run=description(run))
      checkpoints.wait()
  except UserError as error:
    print(f'{size / 1e3:.1f} kB')
    print(error, file=sys.stderr)
    processes.leave(2)  # as train.py does: orbax has threads that would wait
"""


@pytest.mark.parametrize(
  ('room', 'says'),
  [
    (0.5, 'the disk is full: at least {size} are needed, '),
    pytest.param(1.02, 'the disk is full: at least {size} are needed, ', marks=pytest.mark.slow),
    pytest.param(0, 'Read-only file system', marks=pytest.mark.slow),
  ],
  ids=['no room', 'too little, which is seen while it is saved', 'read-only'],
)
def test_a_checkpoint_that_the_disk_does_not_take_is_one_line(room, says, run, data_dir, tmp_path):
  """And no traceback, of which orbax would log one for each of its threads; what was saved before is intact."""
  (tmp_path / 'disk').mkdir()
  (tmp_path / 'program.py').write_text(SAVES_TWICE)
  with small_disk(tmp_path / 'disk'):
    arguments = data_dir, tmp_path / 'disk', room
    process = start_command(sys.executable, tmp_path / 'program.py', *arguments, PYTHONPATH=str(ROOT))
    ((code, output, errors),) = finish([process])
    assert code == 2, errors
    (line,) = errors.splitlines()
    expected = f'a checkpoint could not be written to {tmp_path}/disk/checkpoints ('
    assert line.startswith(expected + says.format(size=output.strip()))
    assert line.endswith('earlier checkpoints are intact')
    with Checkpoints(tmp_path / 'disk' / 'checkpoints', read_only=True) as later:
      restored, *_, set_aside = later.restore(run.recipe.abstract_state, description(run))
    assert (int(restored.step), set_aside) == (0, [])


def test_a_thousand_saves_would_need_no_more_threads_than_one(run, tmp_path):
  state = run.recipe.make_state(run.recipe.rng)
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    threads = []
    for step in range(6):
      checkpoints.save(state.replace(step=jnp.int32(step)), metrics=None, run=description(run))
      checkpoints.wait()
      threads.append(threading.active_count())
  assert threads[-1] <= threads[0] + 1, threads


def train(*arguments):
  return start_process(
    '--config.model.depth=1', '--config.model.embed_dim=32', '--config.model.token_dim=16', *arguments
  )


@pytest.mark.slow
def test_checkpoints_that_cannot_be_read_are_skipped_and_then_the_run_refuses(tmp_path, data_dir):
  arguments = [
    f'--workdir={tmp_path}/run',
    f'--config.data.data_dir={data_dir}',
    '--config.checkpoint.every_steps=1',
    '--config.checkpoint.keep_latest=2',
  ]
  process = train(*arguments, '--config.schedule.max_steps=3')
  process.communicate()
  assert process.returncode == 0
  checkpoints = tmp_path / 'run' / 'checkpoints'
  assert {path.name for path in checkpoints.iterdir()} == {'2', '3'}
  manifest = checkpoints / '3' / 'state' / 'manifest.ocdbt'
  manifest.write_bytes(manifest.read_bytes()[:10])
  process = train(*arguments, '--config.schedule.max_steps=4')
  output, errors = process.communicate()
  assert process.returncode == 0, errors
  assert 'Traceback' not in errors
  assert f'The checkpoint {checkpoints}/3 is damaged' in output
  assert f'moved to {tmp_path}/run/damaged/3' in output
  assert 'continuing from the checkpoint of step 2;' in output
  assert output.splitlines()[-1].startswith('test top-1 ')

  for path in checkpoints.glob('[0-9]*/state/manifest.ocdbt'):
    path.write_bytes(b'')
  process = train(*arguments, '--config.schedule.max_steps=5')
  output, errors = process.communicate()
  assert (process.returncode, output) == (2, '')
  assert 'error: no checkpoint can be read.' in errors
  assert len(list((tmp_path / 'run' / 'damaged').iterdir())) == 3
  assert list(checkpoints.iterdir()) == []


@pytest.mark.slow
def test_a_save_that_fails_in_the_background_ends_the_run(tmp_path, data_dir):
  process = train(
    f'--workdir={tmp_path}/run',
    f'--config.data.data_dir={data_dir}',
    '--config.checkpoint.every_steps=5',
    '--config.logging.every_steps=1',
  )
  for line in process.stdout:
    if line.startswith('step 7/'):
      break
  (tmp_path / 'run' / 'checkpoints').rename(tmp_path / 'elsewhere')  # at once: it is being written to
  (tmp_path / 'run' / 'checkpoints').write_text('no folder')
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 2
  assert f'error: a checkpoint could not be written to {tmp_path}/run/checkpoints (' in errors


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, data_dir):
  arguments = [f'--workdir={tmp_path}/run', f'--config.data.data_dir={data_dir}', '--config.logging.every_steps=1']
  first = train(*arguments)
  for line in first.stdout:
    if line.startswith('step 1/'):
      break
  second = train(*arguments)
  output, errors = second.communicate(timeout=120)
  first.kill()
  first.communicate()
  assert (second.returncode, output) == (2, '')
  owner = f'process {first.pid} on {os.uname().nodename}'
  assert errors.startswith(f'error: {tmp_path}/run is used by another run ({owner}, since 20')
  assert errors.endswith('): choose another --workdir\n')
  with open_workdir(tmp_path / 'run'):
    pass  # the lock went with the process


def test_killed_runs_end_like_undisturbed_ones(tmp_path):
  moments = kill_and_compare(
    tmp_path, kills=2, seed=0, **{'schedule.epochs': 4, 'model.tokens_type': 'convolution', 'model.dropout_rate': 0.1}
  )
  assert any('while saving' in moment for moment in moments)
