"""Traces some steps of a run for xprof and TensorBoard."""

from collections.abc import Iterator, Sequence
import contextlib
import os
from pathlib import Path
from typing import Any, Self

import jax

from t2t_vit_jax.console import say, warn
from t2t_vit_jax.errors import writing_problem


class Profile:
  """Traces a run's steps from a first to a last one, in the first process only. Use as a context manager.

  A run that ends earlier, in whatever way, writes the trace of the steps that it has done.

  Args:
    steps: the first and the last step to trace, counted from 1; empty for none.
    last_step: of the run.
    folder: gets the trace as `plugins/profile/<time>/<host>.xplane.pb`, where TensorBoard and xprof look for it.
    shown: the folder's name for the user, who may find it in a bucket.
  """

  def __init__(self, steps: Sequence[int], last_step: int, folder: Path, shown: str | os.PathLike[str]):
    wanted = bool(steps) and jax.process_index() == 0
    self._steps = range(steps[0], min(steps[1], last_step) + 1) if wanted else range(0)
    self._folder, self._shown = folder, shown
    self._traced: list[int] = []
    self._text = f'trace of steps {steps[0]} to {steps[1]}' if wanted else ''
    self._running = False

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
    self._finish()
    if self._text and not self._traced and kind is None:
      say(f'{self._text} (logging.profile_steps): none was left to do, so nothing was traced')

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Gives a step its name and number in this trace, and in those that others make of the process."""
    if number in self._steps and not self._running:
      self._start()
    if self._running:
      self._traced.append(number)
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield

  def finished(self, number: int, state: Any) -> bool:
    """Writes the trace if the step `number`, which leads to `state`, was the last to trace; tells whether it did."""
    if not self._running or number != self._steps[-1]:
      return False
    jax.block_until_ready(state)
    self._finish()
    return True

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # of every Python function: slows the reading of images, and hides the steps
    try:
      self._folder.mkdir(parents=True, exist_ok=True)  # JAX would notice at the end, and could trace no more
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._running = True
    except (OSError, RuntimeError) as error:  # the latter if somebody else traces this process
      self._fail(error)

  def _finish(self) -> None:
    if not self._running:
      return
    self._running = False
    try:
      jax.profiler.stop_trace()
    except (OSError, RuntimeError) as error:
      self._fail(error)
      return
    say(
      f'trace of steps {self._traced[0]} to {self._traced[-1]}: {self._shown}; to look at it: pip install xprof && '
      f'xprof server -l {self._shown}'
    )

  def _fail(self, error: Exception) -> None:
    self._steps, self._text = range(0), ''
    warn(f'{self._shown}: the steps could not be traced ({writing_problem(error, self._folder)}); the run goes on')
