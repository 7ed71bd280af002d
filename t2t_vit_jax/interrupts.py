"""Ends a program of this package at once after Ctrl-C, also while it imports or while JAX computes."""

from collections.abc import Callable, Iterator
import contextlib
import os
from pathlib import Path
import queue
import signal
import sys
import threading
from types import FrameType

IMPORT_SYSTEM = '<frozen importlib._bootstrap>'
_importing = True
_heard: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item for each Ctrl-C that Python code has heard
GRACE_S = 1.0  # seconds in which a program that runs Python code hears it
GC_CALLBACK = '_xla_gc_callback'  # jax's: Python drops what is raised in it


def interrupt(number: int, frame: FrameType | None) -> None:
  """Handles SIGINT: raises KeyboardInterrupt, but ends the program if it still imports, where that may be swallowed."""
  if frame is not None and frame.f_code.co_name == GC_CALLBACK:
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # once more, after it
    heard()
    return
  heard()
  caller = frame if _importing else None
  while caller is not None and caller.f_code.co_filename != IMPORT_SYSTEM:
    caller = caller.f_back
  if caller is None:
    signal.default_int_handler(number, frame)
  os.write(2, b'interrupted\n')
  os._exit(130)  # the shells' code for Ctrl-C


def heard() -> None:
  """Says that Python code deals with this Ctrl-C; each handler of SIGINT calls it first."""
  _heard.put(None)


@contextlib.contextmanager
def importing() -> Iterator[None]:
  """Context of late imports: Ctrl-C ends the program at once, as in those at its start."""
  global _importing
  _importing = True
  try:
    yield
  finally:
    _importing = False


def imports_are_done() -> None:
  """Has Ctrl-C raise KeyboardInterrupt in later imports too: they may be part of work that must be cleaned up."""
  global _importing
  _importing = False


def is_program() -> bool:
  """Whether this process is `t2t-vit`, `python -m t2t_vit_jax`, or a script beside the package such as train.py."""
  script = Path(sys.argv[0]).absolute()
  return (
    sys.argv[0] == '-m'
    or script.stem == 't2t-vit'
    or (script.is_file() and script.parent == Path(__file__).absolute().parents[1])
  )


def end_if_unheard(end: Callable[[], object]) -> None:
  """Has a thread call `end` after a Ctrl-C that the main thread does not hear, since it waits for a computation.

  Python runs a handler only between two steps of Python code, but writes the signal's number to a pipe at once.
  """
  if signal.getsignal(signal.SIGINT) is not interrupt:  # it is ignored, or the package is used as a library
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

  def watch() -> None:
    while number := os.read(reader, 1):
      if number[0] != signal.SIGINT:
        continue
      # A training loop's handler may be late: the loop finishes its step, and must save.
      ours = signal.getsignal(signal.SIGINT) is interrupt
      try:
        _heard.get(timeout=GRACE_S if ours else None)
      except queue.Empty:
        end()
        os._exit(130)  # the shells' code for Ctrl-C

  threading.Thread(target=watch, daemon=True).start()


in_main_thread = threading.current_thread() is threading.main_thread()  # only there Python takes a handler
OWN_PROGRAM = in_main_thread and is_program()
if OWN_PROGRAM and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, interrupt)
