"""The number of data workers: by processors, processes, memory and shared memory."""

import collections
import os

import pytest

from t2t_vit_jax.data import shared_memory, worker_count

Usage = collections.namedtuple('Usage', 'total used free')


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """Sets the processors, the bytes of memory and of shared memory that the code sees."""

  def be(processors, memory, shared):
    monkeypatch.setattr(worker_count.joblib, 'cpu_count', lambda: processors)
    monkeypatch.setattr(worker_count, 'total_memory', lambda: memory)
    monkeypatch.setattr(shared_memory, 'FOLDER', tmp_path)
    monkeypatch.setattr(worker_count.shutil, 'disk_usage', lambda folder: Usage(shared, 0, shared))

  return be


def megabytes(number):
  return 1e6 * (100 + 5 * number)


@pytest.mark.parametrize(
  ('processors', 'memory', 'shared', 'processes', 'expected'),
  [
    (16, 64e9, 8e9, 1, (16, '16 processors')),
    (16, 64e9, 8e9, 4, (4, '16 processors for 4 processes')),
    (2, 64e9, 8e9, 4, (1, '2 processors for 4 processes')),
    (16, 4e9, 8e9, 1, (5, '16 processors, 4.0 GB of memory')),
    (16, 0, 8e9, 1, (16, '16 processors')),  # unknown
  ],
)
def test_the_number(processors, memory, shared, processes, expected, machine):
  machine(processors, memory, shared)
  assert worker_count.default_num_workers(processes, megabytes) == expected


def test_too_little_shared_memory_means_threads(machine):
  machine(8, 64e9, 64e6)  # as docker gives
  number, reason = worker_count.default_num_workers(1, megabytes)
  assert number == 0
  assert reason.endswith('has 64.0 MB free, and workers need 140.0 MB')


def test_memory_is_that_of_the_machine_at_most():
  total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  assert 0 < worker_count.total_memory() <= total


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='needs Linux')
def test_processors_are_those_that_this_process_may_use():
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {min(before)})
  try:
    assert worker_count.joblib.cpu_count() == 1
  finally:
    os.sched_setaffinity(0, before)
