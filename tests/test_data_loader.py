"""Order, shares and batches."""

import collections
import dataclasses
import fcntl
import itertools
import multiprocessing
import os
from pathlib import Path
import pickle
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.data import loader, shared_memory, transforms
from t2t_vit_jax.data.tfds_source import open_tfds
from tests.parameters import slow_but
from tests.processes import ROOT, children, data_workers, finish, start_command

TRANSFORM = transforms.RandomPaddedCrop(16, padding=2)


@pytest.fixture(scope='module')
def source(data_dir):
  return open_tfds('digits', 'train', data_dir)


def batches(source, *, batch_size=48, seed=3, processes=1, process=0, workers=0, first_step=0, last_step=4):
  order = loader.TrainOrder(len(source), batch_size, seed)
  share = loader.Share(batch_size, process, processes)
  return list(
    loader.train_batches(
      source, TRANSFORM, order, share, loader.Workers(workers), first_step=first_step, last_step=last_step
    )
  )


def test_each_epoch_is_another_permutation():
  order = loader.TrainOrder(num_records=103, batch_size=10, seed=0)
  epochs = [[order(epoch * 100 + i) for i in range(100)] for epoch in range(3)]
  for number, epoch in enumerate(epochs):
    assert {e for e, _ in epoch} == {number}
    assert len({index for _, index in epoch}) == 100
    assert {index for _, index in epoch} <= set(range(103))
  assert epochs[0] != epochs[1]


def test_every_record_is_used_equally_often_over_many_epochs():
  order = loader.TrainOrder(num_records=500, batch_size=200, seed=0)  # 400 of 500 in each epoch
  counts = collections.Counter(order(i)[1] for i in range(400 * 30))
  # Binomial(30, 0.8): mean 24, deviation 2.2.
  assert len(counts) == 500
  assert np.mean(list(counts.values())) == 24
  assert np.std(list(counts.values())) == pytest.approx(2.2, abs=0.4)


def test_seeds_do_not_share_epochs():
  one, two = (loader.TrainOrder(1000, 100, seed) for seed in (0, 1))
  assert [one(1000 + i)[1] for i in range(10)] != [two(i)[1] for i in range(10)]


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_read_contiguous_blocks_of_the_same_global_batches(source, processes):
  together = batches(source)
  parts = [batches(source, processes=processes, process=i) for i in range(processes)]
  for step, batch in enumerate(together):
    for name, array in batch.items():
      np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), array)


def test_starting_at_a_step_gives_the_batches_from_there(source):
  # 29 steps an epoch: the later start lies in the second one.
  for batch, expected in zip(
    batches(source, first_step=30, last_step=32), batches(source, last_step=32)[30:], strict=True
  ):
    for name, array in batch.items():
      np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(('processes', 'workers'), slow_but([(1, 2)], itertools.product((1, 2), (1, 2, 4))))
def test_worker_processes_change_nothing(source, workers, processes):
  """From the second epoch's middle, and with more workers than some processes have examples in flight."""
  steps = {'first_step': 40, 'last_step': 43}
  together = batches(source, **steps)
  parts = [batches(source, processes=processes, process=i, workers=workers, **steps) for i in range(processes)]
  for step, batch in enumerate(together):
    for name, array in batch.items():
      np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), array)


@pytest.mark.slow
def test_worker_processes_need_few_open_files_and_leave_no_shared_memory(tmp_path, source, data_dir):
  program = tmp_path / 'program.py'
  program.write_text(
    f"""
import resource
from t2t_vit_jax.data import loader, shared_memory, tfds_source, transforms

if __name__ == '__main__':
  resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
  source = tfds_source.open_tfds('digits', 'train', {data_dir!r})
  order, transform = loader.TrainOrder(len(source), 1024, seed=0), transforms.RandomPaddedCrop(64, padding=2)
  batches = loader.train_batches(
    source, transform, order, loader.Share(1024), loader.Workers(2), first_step=0, last_step=3
  )
  print([len(batch['label']) for batch in batches])
"""
  )
  environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])}
  done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
  # At exit, Python would name shared memory that is left.
  assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, '[1024, 1024, 1024]', '')


def test_batches_are_uint8_images_with_labels(source):
  (batch,) = batches(source, last_step=1)
  assert batch['image'].shape == (48, 16, 16, 3)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].dtype == np.int32
  assert batch['mask'].sum() == 48


def test_augmentation_differs_between_epochs(source):
  order = loader.TrainOrder(len(source), 48, 3)
  twice = {}
  for step in range(2 * order.steps_per_epoch):
    for position in range(step * 48, (step + 1) * 48):
      twice.setdefault(order(position)[1], []).append(position)
  first, second = next(positions for positions in twice.values() if len(positions) == 2)
  images = [batches(source, first_step=p // 48, last_step=p // 48 + 1)[0]['image'][p % 48] for p in (first, second)]
  assert (images[0] != images[1]).any()


@pytest.mark.parametrize(
  ('batch_size', 'processes'), [(1, 1), (7, 1), (64, 1), (360, 1), (500, 1), (64, 2), (360, 2), (500, 2)]
)
def test_evaluation_counts_every_image_once(data_dir, batch_size, processes):
  source = open_tfds('digits', 'test', data_dir)
  labels = collections.Counter()
  for process in range(processes):
    share = loader.Share(batch_size, process, processes)
    for batch in loader.eval_batches(
      source, transforms.ResizeCenterCrop(8, 1.0, 'bilinear'), share, loader.Workers(0, num_threads=0)
    ):
      assert len(batch['label']) == batch_size // processes
      labels.update(batch['label'][batch['mask'] == 1].tolist())
  assert labels == collections.Counter(source[i].label for i in range(360))


def test_few_images_are_read_without_worker_processes():
  workers = loader.Workers(num_workers=3, num_threads=2)
  assert workers.for_images(1000) == loader.Workers(num_workers=0, num_threads=6)
  assert workers.for_images(1001) == workers
  assert loader.Workers(3, num_threads=0).for_images(1) == loader.Workers(0, num_threads=3)
  assert loader.Workers(0, num_threads=2).for_images(1) == loader.Workers(0, num_threads=2)


def test_examples_pickle_for_worker_processes(source):
  example = loader._TrainExample(source, loader.TrainOrder(len(source), 8, 0), loader.Share(8), TRANSFORM)
  copy = pickle.loads(pickle.dumps(example))
  np.testing.assert_array_equal(copy(5)['image'], example(5)['image'])


def test_batches_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match='more than the 100 training images'):
    loader.TrainOrder(100, 101, 0)
  with pytest.raises(UserError, match='cannot be divided among 4 processes'):
    loader.Share(10, 0, 4)
  assert dataclasses.replace(loader.Share(12, 0, 4), process_index=3).global_position(4) == 12 + 9 + 1


def shared_memory_of(name):
  return sorted(path.name for path in shared_memory.FOLDER.glob(f'*{name}*'))


@pytest.mark.skipif(not shared_memory.FOLDER.is_dir(), reason='needs shared memory that is shown as files')
def test_shared_memory_of_a_process_that_is_gone_is_freed_and_that_of_others_stays():
  with (
    tempfile.NamedTemporaryFile(prefix='', suffix=shared_memory.OWNER, dir=shared_memory.FOLDER) as alive,
    tempfile.NamedTemporaryFile(prefix='', suffix=shared_memory.OWNER, dir=shared_memory.FOLDER, delete=False) as gone,
  ):
    fcntl.flock(alive, fcntl.LOCK_EX)
    living, dead = (Path(file.name).stem for file in (alive, gone))
    leftovers = [shared_memory.FOLDER / f'{start}{name}1' for name in (living, dead) for start in ('', 'sem.')]
    for path in leftovers:
      path.touch()
    shared_memory.owner.cache_clear()
    mine = Path(shared_memory.owner().name)
    assert shared_memory_of(dead) == []
    assert len(shared_memory_of(living)) == 3
    assert mine.exists()
    for path in leftovers[:2]:
      path.unlink()


@pytest.mark.skipif(not shared_memory.FOLDER.is_dir(), reason='needs shared memory that is shown as files')
def test_shared_memory_that_a_worker_was_making_is_freed():
  own = Path(shared_memory.owner().name)
  unfinished = own.with_name(f'{own.stem}abcd')
  unfinished.touch()
  shared_memory.free_what_the_dead_left()
  assert not unfinished.exists()
  assert own.exists()


WITH_WORKERS = """
import sys
from t2t_vit_jax import UserError
from t2t_vit_jax.data import loader, shared_memory, tfds_source, transforms

if __name__ == '__main__':
  source = tfds_source.open_tfds('digits', 'train', sys.argv[1])
  order, transform = loader.TrainOrder(len(source), 256, seed=0), transforms.RandomPaddedCrop(64, padding=2)
  batches = loader.train_batches(
    source, transform, order, loader.Share(256), loader.Workers(2), first_step=0, last_step=100_000
  )
  try:
    for batch in batches:
      print(shared_memory.owner().name, flush=True)
  except UserError as error:
    sys.exit(f'error: {error}')
"""


@pytest.fixture
def with_workers(tmp_path, source, data_dir):
  """Starts a program that reads batches with two workers, behind a command; gives it and the name of its memory."""
  (tmp_path / 'program.py').write_text(WITH_WORKERS)

  def start(*before):
    process = start_command(*before, sys.executable, tmp_path / 'program.py', data_dir, PYTHONPATH=str(ROOT))
    return process, Path(process.stdout.readline().strip()).stem

  return start


def alive(pid):
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_workers_and_shared_memory_end_with_the_main_process(with_workers):
  process, name = with_workers()
  started = children(process)
  assert len(started) == 3
  assert len(shared_memory_of(name)) > 3
  process.kill()
  deadline = time.monotonic() + 10
  while any(map(alive, started)):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  assert len(shared_memory_of(name)) <= 2  # the file that owned it, and at most one that was being made
  shared_memory.owner.cache_clear()
  shared_memory.owner()  # the next run
  assert shared_memory_of(name) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_a_killed_worker_is_one_line(with_workers):
  process, name = with_workers()
  os.kill(data_workers(process)[0], signal.SIGKILL)
  ((code, _, errors),) = finish([process])
  assert code == 1
  (line,) = errors.splitlines()
  assert 'a data worker died (Worker process was terminated unexpectedly with exit code -9)' in line
  assert shared_memory_of(name) == []


@pytest.mark.slow
@pytest.mark.parametrize(('option', 'code'), [('-S', -signal.SIGTERM), ('-SH', 1)])
def test_a_low_limit_of_open_files_is_raised_or_named(option, code, with_workers):
  process, name = with_workers('bash', '-c', f'ulimit {option} -n 25; exec "$@"', 'sh')
  if name:  # it has a batch
    process.terminate()
  ((ended, _, errors),) = finish([process])
  assert ended == code, errors
  if code == 1:
    (line,) = errors.splitlines()
    assert 'data workers need more open files than this process may have' in line


@pytest.mark.slow
@pytest.mark.parametrize('full', [False, True])
def test_too_little_shared_memory_is_named_with_what_helps(full, with_workers):
  mount = 'mount -t tmpfs -o size=2m tmpfs /dev/shm'
  if os.geteuid() or subprocess.run(['unshare', '-m', 'sh', '-c', mount], check=False).returncode:
    pytest.skip('needs the right to mount')
  if full:
    mount += '; head -c 2m /dev/zero > /dev/shm/filler'
  process, _ = with_workers('unshare', '-m', 'sh', '-c', f'{mount}; exec "$@"', 'sh')
  ((code, _, errors),) = finish([process])
  assert code == 1
  (line,) = errors.splitlines()
  assert 'shared memory is full: data workers need about 4.3 MB in /dev/shm, which has 2.1 MB, ' in line
  assert '--shm-size=' in line
  assert '--config.data.num_workers=0' in line


def test_ctrl_c_does_not_reach_workers_that_still_import():
  context = multiprocessing.get_context('spawn')
  workers = [context.Process(target=time.sleep, args=(0,)) for _ in range(2)]
  with loader._hiding_interrupts():
    for worker in workers:
      worker.start()
  for worker in workers:
    os.kill(worker.pid, signal.SIGINT)
  for worker in workers:
    worker.join(60)
  assert [worker.exitcode for worker in workers] == [0, 0]
  assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
