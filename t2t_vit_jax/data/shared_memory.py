"""Shared memory, through which data workers hand over images: who made it, and that nobody leaves any behind.

Python frees the shared memory of a process that was killed, but misses some if that happens while it is made, and does
so in a process of its own. If that is killed too, as with a whole job, the next run frees everything here.
"""

import contextlib
import fcntl
import functools
import multiprocessing
from multiprocessing import shared_memory
from pathlib import Path
import shutil
import tempfile
from typing import Any

from t2t_vit_jax.errors import readable_size

FOLDER = Path('/dev/shm')  # where Linux shows it as files
OWNER = '.t2t_vit_jax'  # ending of a file there whose name begins those of all that one process and its workers make


@functools.cache
def owner() -> Any:
  """This process's open file in shared memory, locked as long as it lives; frees what processes left that are gone.

  Returns:
    None where shared memory is not shown as files.
  """
  if not FOLDER.is_dir():
    return None
  for path in FOLDER.glob(f'*{OWNER}'):
    with contextlib.suppress(OSError), path.open() as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
      for leftover in (*FOLDER.glob(f'{path.stem}*'), *FOLDER.glob(f'sem.{path.stem}*')):
        leftover.unlink()
  own = tempfile.NamedTemporaryFile(prefix='', suffix=OWNER, dir=FOLDER)  # noqa: SIM115 (open to the end)
  fcntl.flock(own, fcntl.LOCK_EX)
  multiprocessing.current_process()._config['semprefix'] = f'/{Path(own.name).stem}'  # type: ignore[attr-defined]
  return own


def name_after(owner_name: str | None) -> None:
  """Has this process, a worker, name its shared memory after the file of its main process's `owner`."""
  if owner_name:
    shared_memory._SHM_NAME_PREFIX = f'/{Path(owner_name).stem}'  # type: ignore[attr-defined]  # no public way


def free_what_the_dead_left() -> None:
  """Frees what a worker that died has not handed over; no other worker of this process may be at work."""
  if own := owner():
    for path in FOLDER.glob(f'{Path(own.name).stem}[!.]*'):
      with contextlib.suppress(FileNotFoundError):
        try:
          memory = shared_memory.SharedMemory(path.name)
        except ValueError:  # empty: its worker died while it made it
          path.unlink()
        else:
          memory.close()
          memory.unlink()


def shortage(num_bytes: int) -> str:
  """A line that says that there is too little shared memory for `num_bytes`, and what helps."""
  disk = shutil.disk_usage(FOLDER)
  return (
    f'shared memory is full: data workers need about {readable_size(num_bytes)} in {FOLDER}, which has '
    f'{readable_size(disk.total)}, {readable_size(disk.free)} of them free. Give the container more, such as '
    '--shm-size=2g of docker run, or use threads, which need none: --config.data.num_workers=0'
  )
