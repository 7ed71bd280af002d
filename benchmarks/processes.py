"""A process for each framework: thread pools, allocators and memory stay apart, and only the one that is asked works.

JAX and PyTorch in one process would share an allocator's settings and could meet each other's waiting threads. So each
has a process of its own, with the same processors to run on; they sleep until they are told to measure, in turn.
"""

from collections.abc import Callable
import contextlib
import ctypes
import gc
import multiprocessing
import os
from pathlib import Path
import traceback
from typing import Any, Protocol

from t2t_vit_jax.errors import UserError


class Computations(Protocol):
  """The computations of a process."""

  def device(self) -> dict[str, Any]:
    """The device that it computes on."""

  def prepare(self, key: str, computation: str, **details: Any) -> dict[str, Any]:
    """Compiles a computation and runs it twice; what is known of it then, as `first_s` and `warm_s`."""

  def seconds(self, key: str, calls: int) -> float:
    """Seconds of each call, when that many follow each other."""


class Worker:
  """A process that makes a `Computations` and calls its methods."""

  def __init__(self, name: str, make: Callable[[], Computations], processors: set[int] | None):
    """`processors` that its threads may run on; None for all (and where the system cannot say)."""
    context = multiprocessing.get_context('spawn')
    self._name = name
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, make, processors), daemon=False)
    self._process.start()
    theirs.close()

  def __call__(self, method: str, *arguments: Any, **details: Any) -> Any:
    """The result of a method.

    Raises:
      UserError: as the method, or the process is gone.
    """
    try:
      self._connection.send((method, arguments, details))
      kind, value = self._connection.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
      self._process.join(10)
      raise UserError(
        f'the process of {self._name} ended (exit code {self._process.exitcode}); out of memory? '
        'Try a smaller --batch-size'
      ) from error
    if kind == 'refused':
      raise UserError(value)
    if kind == 'failed':
      raise RuntimeError(f'in the process of {self._name}:\n{value}')
    return value

  def close(self) -> None:
    """Ends it."""
    with contextlib.suppress(OSError):
      self._connection.send(None)
    self._connection.close()
    self._process.join(30)
    if self._process.is_alive():
      self._process.kill()


def _serve(connection: Any, make: Callable[[], Computations], processors: set[int] | None) -> None:
  if processors is not None:
    os.sched_setaffinity(0, processors)
  computations = None
  with contextlib.suppress(EOFError, KeyboardInterrupt):
    while (request := connection.recv()) is not None:
      method, arguments, details = request
      try:
        computations = computations or make()
        answer = 'done', getattr(computations, method)(*arguments, **details)
      except UserError as error:
        answer = 'refused', str(error)
      except Exception:
        answer = 'failed', traceback.format_exc()
      connection.send(answer)


def choose_processors(count: int | None) -> set[int] | None:
  """The first `count` of the processors that this process may use; None for all.

  Raises:
    UserError: there are fewer, or the system cannot bind processes to them.
  """
  if count is None:
    return None
  if not hasattr(os, 'sched_getaffinity'):
    raise UserError('--threads: this system cannot bind a process to some of its processors')
  available = sorted(os.sched_getaffinity(0))
  if count > len(available):
    raise UserError(f'--threads={count}: there are {len(available)} processors')
  return set(available[:count])


def resident_growth(function: Callable[[], Any]) -> int | None:
  """Bytes by which a call raises this process's resident memory at its highest; None where Linux does not say."""
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL('libc.so.6').malloc_trim(0)  # or freed memory would hide what the call takes
  try:
    Path('/proc/self/clear_refs').write_text('5')  # the highest starts anew
    before = _status('VmRSS')
    function()
    return max(_status('VmHWM') - before, 0)
  except OSError:
    return None


def _status(field: str) -> int:
  for line in Path('/proc/self/status').read_text().splitlines():
    if line.startswith(f'{field}:'):
      return int(line.split()[1]) * 1024
  raise OSError(field)
