"""The folder of a run: writable, and used by one run at a time."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import IO

import jax

from t2t_vit_jax.errors import UserError


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Makes the folder if need be and keeps other runs out of it until the context ends.

  The lock is the operating system's: it goes with the process, however that ends.

  Raises:
    UserError: the folder can't be written to, or another run uses it.
  """
  workdir = Path(path)
  try:
    (workdir / 'checkpoints').mkdir(parents=True, exist_ok=True)
    (workdir / 'metrics.jsonl').open('a').close()
    lock = (workdir / 'lock').open('a+')
  except OSError as error:
    raise UserError(f'cannot write to workdir {workdir}: {error.strerror}') from error
  with lock:
    if jax.process_index() == 0:
      _acquire(lock, workdir)
    yield workdir


def _acquire(lock: IO[str], workdir: Path) -> None:
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
      return  # a file system without locks
    lock.seek(0)
    raise UserError(f'{workdir} is used by another run ({lock.read().strip()}): choose another --workdir') from error
  lock.truncate(0)
  lock.write(f'process {os.getpid()} on {os.uname().nodename}\n')
  lock.flush()
