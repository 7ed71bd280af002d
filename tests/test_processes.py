"""Processes that don't fit together are refused, in time and by name."""

import re
import runpy
import shutil
import time

from ml_collections import ConfigDict
import pytest

from t2t_vit_jax import UserError, processes
from t2t_vit_jax.workdir import folder
from tests.processes import ROOT, finish, free_port, process_flags, start, start_process

TIMEOUT_S = 6


def errors(results):
  """The last line of each process's standard error."""
  return [error.strip().splitlines()[-1] for _, _, error in results]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('host:1234', None, 0), 'give all three'),
    ((None, 2, 0), 'give all three'),
    (('host', 2, 0), 'HOST:PORT'),
    (('host:port', 2, 0), 'HOST:PORT'),
    (('host:1234', 2, 2), 'between 0 and 1'),
    (('host:1234', 0, 0), 'num_processes must be at least 1'),
  ],
)
def test_arguments_that_make_no_sense(arguments, message):
  with pytest.raises(UserError, match=message):
    processes.start(*arguments, timeout_s=1)


def test_a_time_limit_that_makes_no_sense():
  with pytest.raises(UserError, match=r'distributed\.timeout_s must be at least 1, not 0'):
    processes.start('host:1234', 2, 0, timeout_s=0)


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 1])
def test_a_process_that_stays_alone_ends_in_time(number, data_dir, tmp_path):
  """The first one, whose others are missing; and another one, at whose coordinator's port nobody listens."""
  process = start_process(
    f'--coordinator=localhost:{free_port()}',
    '--num_processes=2',
    f'--process_id={number}',
    f'--workdir={tmp_path}/run',
    f'--config.distributed.timeout_s={TIMEOUT_S}',
  )
  announcement = f'process {number} of 2: meeting the others at localhost:'
  assert any(line.startswith(announcement) for line in process.stderr)  # reads up to there
  announced = time.monotonic()
  results = finish([process])
  assert time.monotonic() - announced < TIMEOUT_S + 10
  assert results[0][0] == 2
  assert errors(results)[0].startswith(f'error: process {number}: not all of the 2 processes met')
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_different_configs_and_code_are_refused_by_all(data_dir, tmp_path):
  copy = tmp_path / 'copy'
  for name in ('t2t_vit_jax', 'configs'):
    shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(ROOT / 'train.py', copy)
  with (copy / 't2t_vit_jax' / 'models' / 'layers.py').open('a') as file:
    file.write('# another commit\n')
  results = finish(
    [
      start_process(
        *own,
        f'--workdir={tmp_path}/run',
        f'--config.data.data_dir={data_dir}',
        f'--config.seed={number}',
        f'--config.data.mean=({number},0.5,0.5)',
        root=(ROOT, copy)[number],
      )
      for number, own in enumerate(process_flags(2))
    ]
  )
  assert [code for code, _, _ in results] == [2, 2]
  for line in errors(results):
    assert 'config.seed is 0 in process 0 and 1 in 1' in line
    assert 'config.data.mean is [0, 0.5, 0.5] in process 0 and [1, 0.5, 0.5] in 1' in line
    assert re.search(r'versions\.code of t2t_vit_jax is \w{12} in process 0 and \w{12} in 1', line)
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_what_one_process_finds_wrong_ends_all(data_dir, tmp_path):
  """Process 1 gets another workdir: a host that does not mount the shared one."""
  results = finish(
    [
      start_process(
        *own,
        f'--workdir={tmp_path}/{number}',
        f'--config.data.data_dir={data_dir}',
      )
      for number, own in enumerate(process_flags(2))
    ]
  )
  assert [code for code, _, _ in results] == [2, 2]
  first, second = errors(results)
  assert first.startswith('error: process 1 has failed: workdir')
  assert 'is not the folder that process 0 uses' in second


@pytest.mark.slow
def test_meshes_and_batches_that_do_not_fit_end_all(data_dir, tmp_path):
  for change, message in (
    ('--config.mesh.fsdp=3', 'does not fit 4 devices: that is no multiple of 3'),
    ('--config.data.batch_size=66', 'cannot be divided among 4 devices: set data.batch_size to 64 or 68'),
  ):
    results = finish(start(2, f'--workdir={tmp_path}/run', change, devices=2))
    assert [code for code, _, _ in results] == [2, 2]
    assert all(message in line for line in errors(results))
  assert not (tmp_path / 'run').exists()


def test_the_digest_is_that_of_the_package_alone(tmp_path):
  copy = tmp_path / 't2t_vit_jax'
  shutil.copytree(ROOT / 't2t_vit_jax', copy, ignore=shutil.ignore_patterns('__pycache__'))
  (tmp_path / 'train.py').write_text('changed = True')
  of_copy = runpy.run_path(str(copy / 'processes.py'))['code_digest']
  assert of_copy() == processes.code_digest()
  with (copy / 'models' / 'encoder.py').open('a') as file:
    file.write('# changed')
  assert of_copy() != processes.code_digest()


def test_one_process_needs_no_agreement():
  assert processes.gather_texts('ä') == ['ä']
  processes.check_agreement(ConfigDict({'seed': 1}))
  with pytest.raises(UserError, match='as it is'):
    processes.in_all_processes(lambda: (_ for _ in ()).throw(UserError('as it is')))


def test_a_folder_of_another_owner_is_not_shared(tmp_path, monkeypatch):
  monkeypatch.setattr(folder, 'SHARED_TIMEOUT_S', 0.1)
  (tmp_path / 'lock').write_text('process 1 on elsewhere')
  folder._check_shared(tmp_path, 'process 1 on elsewhere')
  with pytest.raises(UserError, match='on storage that all hosts share'):
    folder._check_shared(tmp_path, 'process 2 on here')
