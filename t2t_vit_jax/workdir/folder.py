"""The folder of a run: writable, seen by all of its processes, and used by one run at a time."""

from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import os
from pathlib import Path
import tempfile
import time

from etils import epath
import fsspec.config
import jax

from t2t_vit_jax.console import warn
from t2t_vit_jax.errors import UserError, first_line, require, writing_problem
from t2t_vit_jax.processes import gather_texts, in_all_processes

# Other processes write to a bucket too: its listings must not be cached.
fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False

SHARED_TIMEOUT_S = 15  # for a network file system to show what another host wrote


@dataclasses.dataclass(frozen=True)
class Workdir:
  """A run's folder, on a disk or in a bucket (gs://...).

  Attributes:
    root: the folder.
    logs: where the first process writes everything but checkpoints: `root`; or a folder on its own disk if `root` is a
      bucket, where no file can be appended to.
  """

  root: epath.Path
  logs: Path

  def publish(self) -> None:
    """Copies `logs` to `root` in a bucket, in the first process. Warns if it fails: the next call copies again."""
    if jax.process_index() != 0 or not is_bucket(self.root):
      return
    try:
      copy_to_bucket(epath.Path(self.logs), self.root)
    except Exception as error:  # of the bucket's client, whichever that is
      warn(f'metrics could not be copied to {self.root}: {first_line(error)}')


def check_place(path: str | os.PathLike[str]) -> None:
  """Raises UserError unless `path` can be that of a folder or a bucket."""
  scheme, separator, _ = os.fspath(path).partition('://')
  if separator and scheme != 'gs':
    raise UserError(f'workdir {path}: give a folder, or a bucket as gs://BUCKET/RUN')


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike[str]) -> Iterator[Workdir]:
  """Makes the folder if need be and keeps other runs out of it until the context ends.

  The lock is the operating system's: it goes with the process, however that ends. A bucket has no lock. All processes
  of a run call this.

  Raises:
    UserError: the folder can't be written to, another run uses it, or processes see different folders.
  """
  root = epath.Path(os.path.expanduser(path))
  owner = gather_texts(
    f'process {os.getpid()} on {os.uname().nodename}, since {datetime.datetime.now().isoformat(" ")}'
  )[0]
  with contextlib.ExitStack() as stack:
    prepare = _prepare_bucket if is_bucket(root) else _prepare_folder
    logs = in_all_processes(lambda: prepare(root, owner, stack) if jax.process_index() == 0 else Path())
    in_all_processes(lambda: _check_shared(root, owner))
    workdir = Workdir(root, logs)
    try:
      yield workdir
    finally:
      workdir.publish()


def is_bucket(root: epath.Path) -> bool:
  """Whether `root` is in a bucket, such as gs://..., which cannot lock, rename or append to files."""
  return '://' in os.fspath(root)


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Renames a folder; in a bucket copies its files and deletes it."""
  if not is_bucket(source):
    source.rename(target)
    return
  copy_to_bucket(source, target)
  source.rmtree()


def copy_to_bucket(source: epath.Path, target: epath.Path) -> None:
  """Copies the files of a folder and of all below it; `target` is in a bucket, where folders need not be made."""
  for path in sorted(source.iterdir()):
    if path.is_dir():
      copy_to_bucket(path, target / path.name)
    else:
      (target / path.name).write_bytes(path.read_bytes())


def _prepare_folder(root: epath.Path, owner: str, stack: contextlib.ExitStack) -> Path:
  """Makes and locks a folder on a disk, and returns it."""
  folder = Path(root)
  for path in (folder / 'metrics.jsonl', folder / 'lock'):
    if path.exists() and not path.is_file():  # opening a pipe would never end
      raise UserError(f'{path} is no regular file: delete it, or choose another --workdir')
  try:
    (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.jsonl').open('a').close()
    lock = stack.enter_context((folder / 'lock').open('ab+', buffering=0))
  except OSError as error:
    raise UserError(f'cannot write to workdir {root}: {writing_problem(error, root)}') from error
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # else it is a file system without locks
      lock.seek(0)
      raise UserError(
        f'{root} is used by another run ({lock.read(200).decode(errors="replace").strip()}): choose another --workdir'
      ) from error
  try:
    lock.truncate(0)
    lock.write(owner.encode())
    os.fsync(lock.fileno())  # network file systems show it to other hosts now
  except OSError as error:
    raise UserError(f'cannot write to workdir {root}: {writing_problem(error, root, len(owner))}') from error
  return folder


def _prepare_bucket(root: epath.Path, owner: str, stack: contextlib.ExitStack) -> Path:
  """Makes a folder in a bucket; returns a temporary one on disk, with the metrics of an earlier, interrupted run."""
  require(f'workdir {root}', 'gcsfs')
  logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='t2t_vit_jax-')))
  try:
    root.mkdir(parents=True, exist_ok=True)
    (root / 'lock').write_text(owner)
    if (root / 'metrics.jsonl').exists():
      (logs / 'metrics.jsonl').write_bytes((root / 'metrics.jsonl').read_bytes())
  except Exception as error:  # of the bucket's client, whichever that is
    raise UserError(f'cannot write to workdir {root} ({first_line(error)}); gs:// needs credentials') from error
  return logs


def _check_shared(root: epath.Path, owner: str) -> None:
  deadline = time.monotonic() + SHARED_TIMEOUT_S
  while True:
    with contextlib.suppress(OSError, UnicodeDecodeError):  # another run's lock may be there still
      if (root / 'lock').read_text() == owner:
        return
    if time.monotonic() > deadline:
      break
    time.sleep(0.5)
  raise UserError(
    f'workdir {root} on {os.uname().nodename} is not the folder that process 0 uses ({owner}): '
    'give a --workdir on storage that all hosts share'
  )
