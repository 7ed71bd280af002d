"""Several processes as one run: they start together, check that they are alike, and fail together."""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
from multiprocessing import util
import os
from pathlib import Path
import re
import socket
import sys
import threading
import time
from typing import Any, NoReturn, TypeVar

from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np

from t2t_vit_jax.errors import UserError, first_line, plural

T = TypeVar('T')

HEARTBEAT_TIMEOUT_S = 100  # a process that is silent for longer counts as dead; JAX's own default
LEAVE_TIMEOUT_S = 10
REMEDY = (
  'give each process --coordinator, --num_processes and its own --process_id, or --num_processes=1 if it is alone'
)
# Words in the errors that JAX raises when it can't reach another process.
SIGNS_OF_LOSS = ('UNAVAILABLE', 'DEADLINE_EXCEEDED', 'ABORTED', 'CANCELLED', 'gloo', 'Gloo', 'onnection', 'NCCL')
# Packages whose versions change numbers, pixels or the form of a checkpoint.
PACKAGES = ('flax', 'grain', 'jax', 'jaxlib', 'ml_collections', 'numpy', 'optax', 'orbax-checkpoint', 'Pillow')


class LostProcessError(UserError):
  """Another process of the run is gone, so this one can neither go on nor save."""


def start(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout_s: float) -> None:
  """Joins this process to the others of its run, if there are others; to be called before JAX is used.

  Without arguments JAX looks for the others by itself: on TPU pods, under SLURM, Open MPI and Kubernetes.

  Args:
    coordinator: host:port at which process 0 can be reached.
    num_processes: number of processes of the run; 1 also keeps JAX from looking for others.
    process_id: number of this process, from 0 on.
    timeout_s: seconds after which a process that still misses others ends with one line and exit code 2.

  Raises:
    UserError: the arguments don't make sense, or JAX cannot find or join the others.
  """
  if timeout_s < 1:
    raise UserError(f'distributed.timeout_s must be at least 1, not {timeout_s:g}')
  if num_processes == 1 and coordinator is None:
    return
  arguments = (coordinator, num_processes, process_id)
  if arguments == (None, None, None):
    address, count, number, local_devices = _detect_cluster(timeout_s)
    if count is None or count == 1:
      check_devices()
      return
  else:
    _check_arguments(*arguments)
    address, count, number, local_devices = *arguments, None
  _say(f'process {number} of {count}: meeting the others at {address} within {timeout_s:g} s')
  timeout_message = (
    f'error: process {number}: not all of the {count} processes met at {address} within {timeout_s:g} s. '
    'Is every one started, each with its own --process_id and the same --coordinator, and can it reach that address?'
  )
  # JAX itself would abort with a message that no user understands.
  with _deadline(timeout_s, timeout_message), _as_user_error(f'process {number} cannot join the others'):
    jax.distributed.initialize(
      address,
      count,
      number,
      local_devices,
      initialization_timeout=round(timeout_s) + 60,
      heartbeat_timeout_seconds=min(round(timeout_s), HEARTBEAT_TIMEOUT_S),
      shutdown_timeout_seconds=round(timeout_s),
    )
    hosts = len(set(gather_texts(socket.gethostname())))  # the first to use the devices, which meet here too
  if number == 0:
    platform, devices = jax.default_backend(), jax.device_count()
    _say(f'{count} processes on {plural(hosts, "host")} with {devices} {platform} devices in all')


def check_devices() -> None:
  """Raises UserError if JAX cannot use the devices that it is told to use."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # the second without text, if no plugin is installed for them
    reason = first_line(error, kind=False) if str(error) else 'no plugin for them is installed'
    wanted = f' with JAX_PLATFORMS={platforms}' if (platforms := os.environ.get('JAX_PLATFORMS')) else ''
    raise UserError(f'JAX finds no devices{wanted} ({reason})') from error


def _say(text: str) -> None:
  """Prints a line to standard error; `console.say` prints in the first process only, which may not be known yet."""
  print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _as_user_error(problem: str) -> Iterator[None]:
  """Turns errors of JAX into a UserError of one line."""
  try:
    yield
  except (RuntimeError, ValueError) as error:
    raise UserError(f'{problem} ({first_line(error, kind=False)}); {REMEDY}') from error


def _detect_cluster(timeout_s: float) -> tuple[Any, ...]:
  """Returns (address of process 0, number of processes, own number, own devices), as JAX finds them by itself."""
  # Not public. `jax.distributed.initialize` calls it too, but does not say which processes it waits for.
  from jax._src.clusters import ClusterEnv

  with (
    _deadline(timeout_s, f'error: JAX did not find the other processes within {timeout_s:g} s; {REMEDY}'),
    _as_user_error('JAX cannot find the other processes'),
  ):
    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, round(timeout_s))


def _check_arguments(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  if coordinator is None or num_processes is None or process_id is None:
    raise UserError('--coordinator, --num_processes and --process_id belong together: give all three, or none')
  if not re.fullmatch(r'\S+:\d+', coordinator):
    raise UserError(f'--coordinator must be HOST:PORT of process 0, not {coordinator!r}')
  if num_processes < 1:
    raise UserError(f'--num_processes must be at least 1, not {num_processes}')
  if not 0 <= process_id < num_processes:
    raise UserError(f'--process_id must lie between 0 and {num_processes - 1}, not be {process_id}')


@contextlib.contextmanager
def _deadline(seconds: float, message: str, exit_code: int = 2) -> Iterator[None]:
  """Ends the process with `message`, if any, and the exit code unless the context is left in time."""

  def end() -> None:
    if message:
      _say(message)
    os._exit(exit_code)  # nothing else gets a process out of a wait inside JAX

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def gather_texts(text: str) -> list[str]:
  """Texts of all processes in the order of their numbers; all must call it."""
  if jax.process_count() == 1:
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(content), np.int32))
  padded = np.zeros(max(1, lengths.max()), np.uint8)
  padded[: len(content)] = content
  rows = multihost_utils.process_allgather(padded)
  return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def processes_on_this_host() -> int:
  """Number of processes of this run on this host; all must call it."""
  hosts = gather_texts(socket.gethostname())
  return hosts.count(hosts[jax.process_index()])


def in_all_processes(action: Callable[[], T]) -> T:
  """Returns the result of `action` here. All processes must call this, and `action` must not wait for other processes.

  Raises:
    UserError: `action` raised one in any process: so none waits for one that gave up.
  """
  if jax.process_count() == 1:
    return action()
  result, failure = None, ''
  try:
    result = action()
  except UserError as error:
    failure = str(error)
  failures = gather_texts(failure)
  if failure:
    raise UserError(failure)
  for number, text in enumerate(failures):
    if text:
      raise UserError(f'process {number} has failed: {text}')
  return result  # type: ignore[return-value]  # there is one, since nothing failed


def lost_process(
  error: Exception, remedy: str = 'The same command, on any number of processes, continues from the last checkpoint'
) -> LostProcessError | None:
  """The error to raise in place of JAX's `error` when another process is gone; None if it is something else.

  Args:
    error: of JAX, or any other.
    remedy: sentence that says what to do.
  """
  if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError | ValueError):
    return None
  if not any(sign in str(error) for sign in SIGNS_OF_LOSS):
    return None
  return LostProcessError(
    f'process {jax.process_index()} cannot reach the others any more ({first_line(error, kind=False)[:160]}). {remedy}'
  )


def leave(exit_code: int, lost: bool = False) -> NoReturn:
  """Ends a process that has failed or was interrupted, and has said so, even while JAX computes.

  Args:
    exit_code: exit code of the process.
    lost: whether another process is gone. If not, the others should end too: waits for them up to `LEAVE_TIMEOUT_S`.
  """
  if jax.distributed.is_initialized():
    if not lost:
      with _deadline(LEAVE_TIMEOUT_S, '', exit_code):
        jax.distributed.shutdown()
    elif jax.process_index() == 0:
      time.sleep(LEAVE_TIMEOUT_S)  # when process 0 ends, JAX aborts the others before they can report an error
  for worker in multiprocessing.active_children():
    worker.kill()
  with _deadline(LEAVE_TIMEOUT_S, '', exit_code):
    # What `os._exit` leaves out: Python would report semaphores as leaked.
    util._run_finalizers(0)  # type: ignore[attr-defined]
  with contextlib.suppress(OSError):  # its reader may be gone
    sys.stdout.flush()
  os._exit(exit_code)  # JAX and orbax have threads that would wait for others, or for a save that failed


def check_agreement(config: Any) -> None:
  """Makes sure that all processes have the same config and the same code.

  Raises:
    UserError: they don't; the message names the differences.
  """
  if jax.process_count() == 1:
    return
  own = {'config': config.to_dict(), 'versions': {name: importlib.metadata.version(name) for name in PACKAGES}}
  own['versions']['code of t2t_vit_jax'] = code_digest()
  first, *others = (traverse_util.flatten_dict(json.loads(text), sep='.') for text in gather_texts(json.dumps(own)))
  for number, other in enumerate(others, start=1):
    names = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
    if names:
      shown = '; '.join(f'{name} is {first.get(name)} in process 0 and {other.get(name)} in {number}' for name in names)
      raise UserError(f'the processes do not agree, so nothing was started: {shown}')


def code_digest() -> str:
  """First 12 characters of a checksum of this package's Python files."""
  root = Path(__file__).parent
  digest = hashlib.sha256()
  for file in sorted(root.rglob('*.py')):
    digest.update(file.relative_to(root).as_posix().encode() + b'\0' + file.read_bytes())
  return digest.hexdigest()[:12]
