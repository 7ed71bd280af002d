"""Order, shares and batches."""

import collections
import dataclasses
import itertools
import os
from pathlib import Path
import pickle
import subprocess
import sys

import numpy as np
import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.data import loader, transforms
from t2t_vit_jax.data.sources import open_tfds
from tests.parameters import slow_but

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
def test_worker_processes_need_few_open_files_and_leave_no_shared_memory(tmp_path, data_dir):
  program = tmp_path / 'program.py'
  program.write_text(
    f"""
import resource
from t2t_vit_jax.data import loader, sources, transforms

if __name__ == '__main__':
  resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
  source = sources.open_tfds('digits', 'train', {data_dir!r})
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
  assert (done.returncode, done.stdout, done.stderr) == (0, '[1024, 1024, 1024]\n', '')


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


def test_examples_pickle_for_worker_processes(source):
  example = loader._TrainExample(source, loader.TrainOrder(len(source), 8, 0), loader.Share(8), TRANSFORM)
  copy = pickle.loads(pickle.dumps(example))
  np.testing.assert_array_equal(copy.map(5)['image'], example.map(5)['image'])


def test_batches_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match='more than the 100 training images'):
    loader.TrainOrder(100, 101, 0)
  with pytest.raises(UserError, match='cannot be divided among 4 processes'):
    loader.Share(10, 0, 4)
  assert dataclasses.replace(loader.Share(12, 0, 4), process_index=3).global_position(4) == 12 + 9 + 1
