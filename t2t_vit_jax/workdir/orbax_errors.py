"""Finds the one cause in the errors that orbax and its storage raise and log."""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import logging
import sys
from typing import Any
import warnings

# Parts of messages about trouble that leaves the checkpoint itself good.
NOT_DAMAGE = ('PERMISSION_DENIED', 'Permission denied', 'RESOURCE_EXHAUSTED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED')
LATE = ('Event loop is closed', 'Encountered error while reading array')  # starts of what follows a failed read


def leaves_checkpoint_good(error: BaseException) -> bool:
  """Whether the stored checkpoint may be good although reading it failed."""
  return any(text in str(cause(error)) for text in NOT_DAMAGE)


@contextlib.contextmanager
def silence() -> Iterator[list[logging.LogRecord]]:
  """Hides the log records of orbax and yields them, so that one exception says what is wrong with a checkpoint."""
  logged: list[logging.LogRecord] = []

  def keep(record: logging.LogRecord) -> bool:
    logged.append(record)
    return False

  logger = logging.getLogger('absl')
  logger.addFilter(keep)
  try:
    yield logged
  finally:
    logger.removeFilter(keep)


@functools.cache
def silence_background() -> None:
  """Silences tracebacks of reads and writes in the background, for the rest of the process: one error is raised anyway.

  Orbax reads arrays side by side. For each that fails after the first, asyncio or a thread of the storage, too late for
  its event loop, prints a traceback: more than a pipe holds. A process whose standard error nobody reads at that moment
  would stand still, and the others of its run wait for it. When a write fails, each of orbax's threads logs it.
  """
  default_hook = sys.unraisablehook

  def pass_on(unraisable: Any) -> None:
    if not str(unraisable.exc_value).startswith(LATE):
      default_hook(unraisable)

  sys.unraisablehook = pass_on
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
  asyncio = logging.getLogger('asyncio')
  logging.getLogger('absl').addFilter(lambda record: not (record.exc_info and 'orbax' in record.pathname))
  asyncio.addFilter(lambda record: 'exception was never retrieved' not in record.getMessage())


def cause(error: BaseException) -> BaseException:
  """The exception that was raised first: orbax takes every failure to read for a wrong handler."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def logged_error(logged: Sequence[logging.LogRecord]) -> Exception:
  """The exception that orbax (up to 0.12.8) caught and logged when it could not read a checkpoint's description."""
  arguments = [argument for record in logged for argument in record.args or ()]
  return next((x for x in arguments if isinstance(x, Exception)), ValueError('its description is missing'))
