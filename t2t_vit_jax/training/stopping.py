"""Requests to stop early: Ctrl-C, a scheduler's SIGTERM, a terminal that closes, a machine that is taken away."""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from t2t_vit_jax.interrupts import heard


class StopRequest:
  """A request to stop the run: true once a signal has come."""

  def __init__(self) -> None:
    self.signal: int | None = None

  def __bool__(self) -> bool:
    return self.signal is not None

  def reached(self, step: int) -> bool:
    """Whether to stop after `step`: of several processes, all stop after the same one. Call it once for each step."""
    # With several processes, JAX catches the SIGTERM of any of them and agrees on a step that all have yet to reach.
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return bool(self)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
  """Records a first SIGINT, SIGTERM or SIGHUP, so that a step is finished before the run stops; a second one ends it.

  A SIGHUP that is ignored, as under nohup, stays ignored.
  """
  request = StopRequest()
  if threading.current_thread() is not threading.main_thread():
    yield request  # Python delivers signals to the main thread only
    return
  # With several processes JAX handles SIGTERM, since it has to tell the others.
  numbers = [signal.SIGINT, signal.SIGHUP] + ([signal.SIGTERM] if jax.process_count() == 1 else [])
  previous = {number: handler for number in numbers if (handler := signal.getsignal(number)) != signal.SIG_IGN}

  def handle(number: int, frame: Any) -> None:
    del frame
    if number == signal.SIGINT:
      heard()
    for each, handler in previous.items():
      # A terminal that closes may send SIGHUP twice.
      signal.signal(each, signal.SIG_IGN if each == number == signal.SIGHUP else handler)
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      request.signal = number
    with contextlib.suppress(OSError):  # the terminal may be gone
      print('\nfinishing this step, then saving; a second signal ends the run at once', file=sys.stderr)

  for number in previous:
    signal.signal(number, handle)
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
