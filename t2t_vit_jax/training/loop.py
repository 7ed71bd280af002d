"""A run from start to end: train, evaluate, save, report; stop and carry on."""

import collections
import contextlib
import os
from typing import Any

import jax

from t2t_vit_jax.console import say, warn
from t2t_vit_jax.errors import DataError
from t2t_vit_jax.processes import check_agreement, lost_process, together
from t2t_vit_jax.recipe import sharding
from t2t_vit_jax.recipe.evaluation import Accuracy
from t2t_vit_jax.recipe.init_from import completed
from t2t_vit_jax.recipe.run import Run, build_run
from t2t_vit_jax.recipe.state import TrainState
from t2t_vit_jax.training.diagnosis import NonFiniteSteps, out_of_memory
from t2t_vit_jax.training.stopping import StopRequest, stop_request
from t2t_vit_jax.workdir import weight_files
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.folder import Workdir, open_workdir
from t2t_vit_jax.workdir.metrics import Reporter

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
    UserError: config, data, devices and workdir don't fit together and nothing was changed; or something failed on the
      way that the message names.
    Stopped: SIGINT or SIGTERM arrived; the state was saved.
  """
  config = together(lambda: completed(config))
  check_agreement(config)
  run = together(lambda: build_run(config))
  with (
    open_workdir(workdir) as folder,
    Checkpoints(
      folder.root / 'checkpoints', config.checkpoint.keep_latest, allow_changes=config.checkpoint.allow_changes
    ) as checkpoints,
  ):
    state, notes = _initial_state(run, checkpoints)
    metrics = checkpoints.latest_metrics
    if int(state.step) >= run.total_steps and metrics:
      say(f'This run is complete: {int(state.step)} steps in {workdir}. To train again choose another --workdir.')
      written = weight_files.are_written(folder.root, checkpoints, with_ema=bool(config.ema.decay))
    else:
      with _reporter(run, folder, first_step=int(state.step)) as reporter:
        for note in notes:
          say(note)
        metrics = _train(run, state, checkpoints, reporter)
      checkpoints.wait()  # whatever becomes of the weight files, this is safe
      written = False
    if not written:  # or an earlier run was killed before they were
      for line in weight_files.write_weight_files(folder.root, checkpoints, run.mesh, metrics):
        say(line)
  accuracy = Accuracy.from_dict(metrics)
  say(accuracy.last_line(metrics['split']))
  return accuracy


def _initial_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, list[str]]:
  """The state to start from, and what the user should know about it."""
  if checkpoints.latest_step is None:
    return run.fresh_state(), []
  state, changes, set_aside = checkpoints.restore(run.abstract_state, run.description)
  return state, set_aside + ([f'changed since the checkpoint: {"; ".join(changes)}'] if changes else [])


def _reporter(run: Run, workdir: Workdir, first_step: int) -> Reporter:
  reporter = Reporter(
    workdir,
    total_steps=run.total_steps,
    first_step=first_step,
    steps_per_epoch=run.order.steps_per_epoch,
    batch_size=run.order.batch_size,
  )
  for line in run.summary():
    say(line)
  say(f'workdir: {workdir.root}')
  start = f'continuing from the checkpoint of step {first_step}' if first_step else 'starting'
  say(f'{start}; the first step takes longer, it is compiled')
  return reporter


def _train(run: Run, state: TrainState, checkpoints: Checkpoints, reporter: Reporter) -> dict[str, Any]:
  """The steps from `state` to the end of the run, and what the evaluation there found; see `_evaluate`."""
  config = run.config
  evaluate_every = config.checkpoint.every_epochs * run.order.steps_per_epoch
  save_every = config.checkpoint.every_steps or run.total_steps
  rng, first_step = run.rng, int(state.step)
  in_flight: collections.deque[jax.Array] = collections.deque()
  faults = run.train_faults(warn)
  nonfinite = NonFiniteSteps(run, warn)

  with contextlib.closing(run.train_batches(first_step)) as batches, stop_request() as stop:
    try:
      for step, batch in enumerate(reporter.waiting_for(faults.check(batches)), start=first_step + 1):
        if step == first_step + 1:
          sample = run.sample(batch)
          if config.log_images:
            reporter.images(run.pictures(sample, step))
        state, metrics = run.train_step(state, sharding.to_devices(batch, run.mesh), rng)
        reporter.collect(metrics)
        if step == first_step + 1:
          reporter.start_clock()  # that call compiled
        in_flight.append(metrics['loss'])
        if len(in_flight) > MAX_STEPS_IN_FLIGHT:
          in_flight.popleft().block_until_ready()

        evaluate = step == run.total_steps or step % evaluate_every == 0
        save = stop.reached(step) or evaluate or step % save_every == 0
        if save or step % config.logging.every_steps == 0:
          nonfinite.note(reporter.report(step, faults.num_bad), state)
        if stop:
          break
        if evaluate:
          found = _evaluate(run, state, reporter, stop)
          checkpoints.save(state, metrics=found, run=run.description)
          reporter.start_clock()
          if step == run.total_steps:
            reporter.page(run.pictures(sample, first_step + 1), run.title(Accuracy.from_dict(found)))
            return found
        elif save:
          checkpoints.save(state, metrics=None, run=run.description)
        if save:
          reporter.publish()
    except Exception as error:
      # Workers may get the same signal and die of it: what is done is still to be saved.
      if not stop:
        # Alone: several processes save together or not at all, and the others know nothing of this.
        if isinstance(error, DataError) and jax.process_count() == 1 and int(state.step) > first_step:
          checkpoints.save(state, metrics=None, run=run.description)
        if known := out_of_memory(error, config) or lost_process(error):
          raise known from error
        raise
    if stop.signal:
      checkpoints.save(state, metrics=None, run=run.description)
      checkpoints.wait()  # before it is said that all is saved
      raise Stopped(int(state.step), stop.signal)
    return _evaluate(run, state, reporter, stop)  # an earlier run was stopped before its last evaluation


def _evaluate(run: Run, state: TrainState, reporter: Reporter, stop: StopRequest) -> dict[str, Any]:
  """Evaluates, reports, and returns what is saved with a checkpoint, as JSON.

  It is the accuracy that counts, which is the moving average's if the run keeps one, the split, and under `every` the
  accuracy of each kind of weights.

  Raises:
    InterruptedError: the run is to `stop`.
  """
  accuracies = run.evaluate(state, warn, stop.__bool__)
  if stop:
    raise InterruptedError
  reporter.evaluation(int(state.step), run.config.data.eval_split, accuracies)
  start = run.config.ema.decay ** int(state.step)
  if 'ema' in accuracies and start > 0.01:
    say(f'  the moving average is still warming up: {start:.0%} of it is the initial weights')
  accuracy, split, last = accuracies.get('ema', accuracies['raw']), run.config.data.eval_split, run.total_steps
  reporter.classes(accuracy, show=int(state.step) == last)
  return {**accuracy.as_dict(), 'split': split, 'every': {kind: each.as_dict() for kind, each in accuracies.items()}}
