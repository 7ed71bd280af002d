"""Runs of `train.py` in one or several processes on this machine, each with some virtual devices."""

from concurrent.futures import ThreadPoolExecutor
import contextlib
import json
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys

ROOT = Path(__file__).parents[1]
started = []  # by the test that runs


def free_port():
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


def start_command(*command, cwd=None, **environment):
  """A command in a process group of its own, with pipes. The group ends with the test at the latest."""
  process = subprocess.Popen(
    list(map(str, command)),
    cwd=cwd,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
  )
  started.append(process)
  return process


def start_process(*flags, devices=1, root=ROOT, cwd=None, **environment):
  """`python train.py FLAGS` with so many virtual devices."""
  environment = {'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONPATH': str(root), **environment}
  return start_command(sys.executable, root / 'train.py', *flags, cwd=cwd, **environment)


def process_flags(count):
  """The flags that make `count` processes on this machine one run, for each of them."""
  coordinator = f'--coordinator=localhost:{free_port()}'
  return [[coordinator, f'--num_processes={count}', f'--process_id={i}'] for i in range(count)]


def start(count, *flags, **options):
  """`count` processes of one run."""
  if count == 1:
    return [start_process(*flags, **options)]
  return [start_process(*flags, *own, **options) for own in process_flags(count)]


def finish(processes, timeout=600):
  """(exit code, standard output, standard error) of each.

  All are read at once: one whose pipe is full stands still, and the others may wait for it.
  """
  try:
    with ThreadPoolExecutor(len(processes)) as readers:
      found = list(readers.map(lambda process: process.communicate(timeout=timeout), processes))
  finally:
    for process in processes:
      end(process)
  return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def end_all():
  """Ends what a test that failed has left behind."""
  while started:
    end(started.pop())


def end(process):
  """Kills it and what still runs of its group, such as data workers, and closes its pipes."""
  with process:
    process.kill()
    with contextlib.suppress(ProcessLookupError):  # it has no group of its own, or nothing is left of that
      os.killpg(process.pid, signal.SIGKILL)


def children(process):
  """Process ids of what a process has started itself, on Linux."""
  tasks = Path(f'/proc/{process.pid}/task').iterdir()
  return [int(child) for task in tasks for child in (task / 'children').read_text().split()]


def data_workers(process):
  """Process ids of the data workers of a process, on Linux."""
  return [pid for pid in children(process) if 'spawn_main' in Path(f'/proc/{pid}/cmdline').read_text()]


def run(count, *flags, **options):
  """Runs to the end, which must be a good one; returns the standard output of the first process."""
  results = finish(start(count, *flags, **options))
  assert [code for code, _, _ in results] == [0] * count, results
  return results[0][1]


def losses(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {row['step']: row['loss'] for row in rows if row['kind'] == 'train'}
