"""A run from start to end: train, evaluate, save, report; stop and carry on."""

import collections
from collections.abc import Iterator
import contextlib
import math
import os
from pathlib import Path
import signal
import sys
import threading
from typing import Any

import jax

from t2t_vit_jax.errors import DataError, UserError
from t2t_vit_jax.training import sharding
from t2t_vit_jax.training.checkpoint import Checkpoints
from t2t_vit_jax.training.evaluation import Accuracy
from t2t_vit_jax.training.reporting import Reporter
from t2t_vit_jax.training.run import Run, build_run
from t2t_vit_jax.training.state import TrainState

# Steps that may wait for the device: enough to keep it busy, few enough not to fill its memory with batches.
MAX_STEPS_IN_FLIGHT = 2


class Stopped(Exception):  # noqa: N818 (the user asked for it: no error)
  """A signal ended the run early; its state is saved."""

  def __init__(self, step: int, signal_number: int):
    super().__init__(f'stopped at step {step} and saved; the same command continues from there')
    self.exit_code = 128 + signal_number


def train(config: Any, workdir: str | os.PathLike[str]) -> Accuracy:
  """Trains by `config` up to its last step, from the newest checkpoint in `workdir` if there is one.

  Prints progress; the last line on standard output is `<split> top-1 <percent> % (<correct>/<total>)`.

  Args:
    config: a `ConfigDict`; `configs/default.py` explains every field.
    workdir: folder for checkpoints and `metrics.jsonl`.

  Returns:
    Accuracy on the evaluation split: of the moving average of the weights if the run keeps one, else of the weights.

  Raises:
    UserError: config, data, devices and workdir don't fit together; nothing was changed.
    Stopped: SIGINT or SIGTERM arrived; the state was saved.
  """
  run = build_run(config)
  workdir = Path(workdir)
  try:
    (workdir / 'checkpoints').mkdir(parents=True, exist_ok=True)
    (workdir / 'metrics.jsonl').open('a').close()
  except OSError as error:
    raise UserError(f'cannot write to workdir {workdir}: {error.strerror}') from error

  with Checkpoints(workdir / 'checkpoints', config.checkpoint.keep_latest) as checkpoints:
    finished = checkpoints.latest_step is not None and checkpoints.latest_step >= run.total_steps
    state, changes = _initial_state(run, checkpoints)
    if finished and checkpoints.latest_metrics:
      accuracy = Accuracy.from_dict(checkpoints.latest_metrics)
      split = checkpoints.latest_metrics['split']
      print(f'This run is complete: {int(state.step)} steps in {workdir}. To train again choose another --workdir.')
    else:
      split = config.data.eval_split
      with _reporter(run, workdir, first_step=int(state.step)) as reporter:
        if changes:
          reporter.say(f'changed since the checkpoint: {"; ".join(changes)}')
        accuracy = _train(run, state, checkpoints, reporter)
  print(f'{split} top-1 {100 * accuracy.top1:.2f} % ({accuracy.correct}/{accuracy.count})', flush=True)
  return accuracy


def _initial_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, list[str]]:
  """The state to start from, and in what the config differs from the checkpoint's."""
  if checkpoints.latest_step is None:
    return run.fresh_state(), []
  return checkpoints.restore(run.abstract_state, run.description)


def _reporter(run: Run, workdir: Path, first_step: int) -> Reporter:
  reporter = Reporter(
    workdir,
    total_steps=run.total_steps,
    first_step=first_step,
    steps_per_epoch=run.order.steps_per_epoch,
    batch_size=run.order.batch_size,
  )
  num_parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(run.abstract_state.params))
  reporter.say(f'model: {run.config.model.name}, {num_parameters:,} trained parameters, {run.config.model.dtype}')
  reporter.say(f'train: {run.train_source.description}, {len(run.train_source):,} images')
  reporter.say(f'evaluation: {run.eval_source.description}, {len(run.eval_source):,} images')
  reporter.say(
    f'steps: {run.total_steps:,} of {run.order.batch_size} images, {run.order.steps_per_epoch:,} an epoch, '
    f'on {run.mesh.size} {jax.default_backend()} device(s); workdir {workdir}'
  )
  start = f'continuing from the checkpoint of step {first_step}' if first_step else 'starting'
  reporter.say(f'{start}; the first step takes longer, it is compiled')
  return reporter


def _train(run: Run, state: TrainState, checkpoints: Checkpoints, reporter: Reporter) -> Accuracy:
  """The steps from `state` to the end of the run, and the accuracy there."""
  config = run.config
  evaluate_every = config.checkpoint.every_epochs * run.order.steps_per_epoch
  rng, first_step = run.rng, int(state.step)
  in_flight: collections.deque[jax.Array] = collections.deque()
  faults = run.train_faults(reporter.warn)

  with contextlib.closing(run.train_batches(first_step)) as batches, _signals() as received:
    try:
      for step, batch in enumerate(reporter.waiting_for(faults.check(batches)), start=first_step + 1):
        state, metrics = run.train_step(state, sharding.to_devices(batch, run.mesh), rng)
        reporter.collect(metrics)
        if step == first_step + 1:
          reporter.start_clock()  # that call compiled
        in_flight.append(metrics['loss'])
        if len(in_flight) > MAX_STEPS_IN_FLIGHT:
          in_flight.popleft().block_until_ready()

        evaluate = step == run.total_steps or step % evaluate_every == 0
        if evaluate or received or step % config.logging.every_steps == 0:
          reporter.report(step, faults.num_bad)
        if evaluate and not received:
          accuracy = _evaluate(run, state, reporter, received)
          found = {**accuracy.as_dict(), 'split': config.data.eval_split}
          checkpoints.save(state, metrics=found, run=run.description)
          reporter.start_clock()
          if step == run.total_steps:
            return accuracy
        if received:
          break
    except Exception as error:
      # Workers may get the same signal and die of it: what is done is still to be saved.
      if not received:
        if isinstance(error, DataError) and int(state.step) > first_step:
          checkpoints.save(state, metrics=None, run=run.description)
        raise
    if received:
      checkpoints.save(state, metrics=None, run=run.description)
      raise Stopped(int(state.step), received[0])
    return _evaluate(run, state, reporter, received)  # an earlier run was stopped before its last evaluation


def _evaluate(run: Run, state: TrainState, reporter: Reporter, received: list[int]) -> Accuracy:
  """Evaluates, reports, and returns the accuracy that counts: the moving average's if the run keeps one.

  Raises:
    InterruptedError: a signal was `received` meanwhile.
  """
  accuracies = run.evaluate(state, reporter.warn, stop=received)
  if received:
    raise InterruptedError
  reporter.evaluation(int(state.step), run.config.data.eval_split, accuracies)
  start = run.config.ema.decay ** int(state.step)
  if 'ema' in accuracies and start > 0.01:
    reporter.say(f'  the moving average is still warming up: {start:.0%} of it is the initial weights')
  return accuracies.get('ema', accuracies['raw'])


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Collects SIGINT and SIGTERM, so that a step is finished first; a second signal acts at once."""
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received  # Python delivers signals to the main thread only
    return
  previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

  def note(number: int, frame: Any) -> None:
    del frame
    received.append(number)
    print('\nfinishing this step, then saving; a second signal ends at once', file=sys.stderr)
    for each, handler in previous.items():
      signal.signal(each, handler)

  for number in previous:
    signal.signal(number, note)
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
