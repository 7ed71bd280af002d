"""The number of data workers, where the config leaves it open."""

from collections.abc import Callable
import contextlib
import os
from pathlib import Path
import shutil

import joblib

from t2t_vit_jax.data import shared_memory
from t2t_vit_jax.errors import readable_size

WORKER_BYTES = 400e6  # memory of a worker, with what it has read ahead


def default_num_workers(processes_here: int, shared_bytes: Callable[[int], float]) -> tuple[int, str]:
  """Number of data workers for a process, and a phrase that says why.

  There are as many as processors, divided among the processes of the run on this host; fewer if half of the memory does
  not hold them; and none, so that threads read the images, if shared memory does not hold what they hand over.

  Args:
    processes_here: number of processes of the run on this host.
    shared_bytes: number of workers -> bytes of shared memory that they need.
  """
  processors = joblib.cpu_count()  # that this process may use: by affinity, and by the limits of its container
  reason = f'{processors} processors' + (f' for {processes_here} processes' if processes_here > 1 else '')
  number = max(1, processors // processes_here)
  if (memory := total_memory()) and (fitting := int(memory / 2 / WORKER_BYTES / processes_here)) < number:
    number, reason = max(1, fitting), f'{reason}, {readable_size(memory)} of memory'
  if shared_memory.FOLDER.is_dir():
    free, needed = shutil.disk_usage(shared_memory.FOLDER).free, shared_bytes(number) * processes_here
    if free < needed:
      return 0, f'{shared_memory.FOLDER} has {readable_size(free)} free, and workers need {readable_size(needed)}'
  return number, reason


def total_memory() -> float:
  """Bytes of memory of this machine, or of this container if it has less; 0 if unknown."""
  limits = []
  with contextlib.suppress(AttributeError, OSError, ValueError):  # a system without these names
    limits.append(float(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')))
  for file in ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'):
    with contextlib.suppress(OSError, ValueError):  # 'max' for no limit
      limits.append(float(Path(file).read_text()))
  return min(limits, default=0)
