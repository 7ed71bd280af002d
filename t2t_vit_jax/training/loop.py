"""A run from start to end: train, evaluate, save, report; stop and carry on."""

import collections
from collections.abc import Iterator
import contextlib
import os
from typing import Any

from etils import epath
import jax
import joblib

from t2t_vit_jax.console import say, warn
from t2t_vit_jax.data.loader import Batch
from t2t_vit_jax.errors import DataError
from t2t_vit_jax.processes import in_all_processes, lost_process
from t2t_vit_jax.recipe import sharding
from t2t_vit_jax.recipe.evaluation import Accuracy
from t2t_vit_jax.recipe.run import Run, build_run
from t2t_vit_jax.recipe.state import TrainState
from t2t_vit_jax.training.calendar import Calendar
from t2t_vit_jax.training.compilation_cache import keep_programs
from t2t_vit_jax.training.diagnosis import NonFiniteSteps, SlowInput, out_of_memory
from t2t_vit_jax.training.stopping import StopRequest, stop_request
from t2t_vit_jax.training.utilization import peak_images_per_second
from t2t_vit_jax.workdir import weight_files
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import description, summary, title
from t2t_vit_jax.workdir.folder import Workdir, check_place, open_workdir
from t2t_vit_jax.workdir.metrics import Reporter
from t2t_vit_jax.workdir.profile import Profile
from t2t_vit_jax.workdir.trackers import check_trackers, start_trackers

# Steps that may wait for the device: enough to keep it busy, few enough not to fill its memory with batches.
MAX_STEPS_IN_FLIGHT = 2
NOTED_SHARE = 0.01  # of the moving average that is initial weights


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
    UserError: config, data, devices and workdir don't fit together and nothing was changed; or something failed later,
      which the message names.
    Stopped: SIGINT, SIGTERM or SIGHUP arrived; the state was saved.
  """
  check_place(workdir)
  in_all_processes(lambda: check_trackers(config.logging.tracker))
  cache_notes = in_all_processes(lambda: keep_programs(config.compilation_cache_dir))
  run = build_run(config)
  total_steps = run.recipe.total_steps
  calendar = Calendar(
    last_step=total_steps,
    evaluate_every=config.checkpoint.every_epochs * run.recipe.order.steps_per_epoch,
    save_every=config.checkpoint.every_steps or total_steps,
    report_every=config.logging.every_steps,
  )
  with (
    open_workdir(workdir) as folder,
    Checkpoints(
      folder.root / 'checkpoints', config.checkpoint.keep_latest, allow_changes=config.checkpoint.allow_changes
    ) as checkpoints,
  ):
    run, state, notes = _initial_state(config, run, checkpoints)
    metrics = checkpoints.latest_metrics
    if int(state.step) >= total_steps and metrics:
      say(f'This run is complete: {int(state.step)} steps in {workdir}. To train again choose another --workdir.')
      written = weight_files.are_written(folder.root, checkpoints, with_ema=bool(run.recipe.ema_decay))
    else:
      overdue = not metrics and calendar.evaluates(int(state.step))  # a signal or an error came before its evaluation
      nonfinite = NonFiniteSteps(run, config.optimizer.nan_tolerance, warn)
      slow_input = SlowInput(run.workers, joblib.cpu_count(), warn)
      first_step, profile_steps = int(state.step), config.logging.profile_steps
      with (
        _reporter(run, folder, config.logging.tracker, first_step=first_step, evaluated=not overdue) as reporter,
        Profile(profile_steps, total_steps, folder.logs / 'tensorboard', folder.root / 'tensorboard') as profile,
      ):
        for note in cache_notes + notes:
          say(note)
        trainer = Trainer(run, state, checkpoints, reporter, profile)
        metrics = _run_steps(trainer, calendar, nonfinite, slow_input, overdue=overdue, log_images=config.log_images)
      checkpoints.wait()  # safe now, even if the weight files cannot be written
      written = False
    if not written:  # also if an earlier run was killed before it wrote them
      for line in weight_files.write_weight_files(folder.root, checkpoints, run.recipe.mesh):
        say(line)
  for line in _about_average(run, metrics, folder.root):
    say(line)
  accuracy = Accuracy.from_dict(metrics)
  say(accuracy.last_line(metrics['split']))
  return accuracy


def _about_average(run: Run, metrics: dict[str, Any], workdir: epath.Path) -> list[str]:
  """A line after a run so short that initial weights make the moving average worse than the weights themselves."""
  share = run.recipe.ema_decay**run.recipe.total_steps
  raw, ema = (metrics.get('every', {}).get(kind) for kind in ('raw', 'ema'))
  if not (raw and ema) or share <= NOTED_SHARE or raw['correct'] <= ema['correct']:
    return []
  return [
    f'{share:.0%} of the moving average, which the last line is about, is still the initial weights. Without it top-1 '
    f'is {raw["top1"]:.2%}: {workdir / weight_files.FOLDER / weight_files.RAW} has those weights. For another short '
    'run set --config.ema.decay=0'
  ]


def _initial_state(config: Any, run: Run, checkpoints: Checkpoints) -> tuple[Run, TrainState, list[str]]:
  """The run, which reads images as before an interruption; the state to start from; and lines about it for the user."""
  if checkpoints.latest_step is None:
    return run, run.recipe.fresh_state(), []
  restored = checkpoints.restore(run.recipe.abstract_state, description(run))
  changes, data = restored.changes, restored.run.get('config', {}).get('data', {})
  if config.data.orientation is None and data.get('orientation', run.orientation) != run.orientation:
    run = run.with_orientation(data['orientation'])
    changes = [phrase for phrase in changes if not phrase.startswith('data.orientation ')]
  notes = [f'changed since the checkpoint: {"; ".join(changes)}'] if changes else []
  return run, restored.state, restored.set_aside + notes


def _reporter(run: Run, workdir: Workdir, trackers: str, *, first_step: int, evaluated: bool) -> Reporter:
  reporter = Reporter(
    workdir,
    total_steps=run.recipe.total_steps,
    first_step=first_step,
    evaluated=evaluated,
    steps_per_epoch=run.recipe.order.steps_per_epoch,
    batch_size=run.recipe.order.batch_size,
    peak_images_per_second=peak_images_per_second(run.recipe),
    trackers=start_trackers(trackers, workdir, run.recipe.config, first_step=first_step),
  )
  for line in summary(run):
    say(line)
  say(f'workdir: {workdir.root}')
  start = f'continuing from the checkpoint of step {first_step}' if first_step else 'starting'
  say(f'{start}; the first step takes longer, it is compiled')
  return reporter


class Trainer:
  """A run under way: its state, and the only places that compute a step, evaluate and save."""

  def __init__(self, run: Run, state: TrainState, checkpoints: Checkpoints, reporter: Reporter, profile: Profile):
    self.run = run
    self.state = state
    self.checkpoints = checkpoints
    self.reporter = reporter
    self.profile = profile
    self.first_step = int(state.step)  # steps done before
    self.faults = run.train_faults(warn)
    self.result: dict[str, Any] | None = None  # of the last step's evaluation: with it the run is complete
    self._in_flight: collections.deque[jax.Array] = collections.deque()

  @property
  def step(self) -> int:
    """The number of steps done; waits for the last one."""
    return int(self.state.step)

  def train(self, batch: Batch) -> None:
    """Starts a step, without waiting for its end unless too many are under way."""
    recipe = self.run.recipe
    self.state, metrics = recipe.train_step(self.state, sharding.to_devices(batch, recipe.mesh), recipe.rng)
    self.reporter.collect(metrics)
    self._in_flight.append(metrics['loss'])
    if len(self._in_flight) > MAX_STEPS_IN_FLIGHT:
      self._in_flight.popleft().block_until_ready()

  def evaluate(self, stop: StopRequest) -> dict[str, Any] | None:
    """Evaluates and reports; ends early, without a result, if the run is to `stop`.

    Returns:
      Metrics to save with a checkpoint, as JSON: the accuracy that counts, which is the moving average's if the run
      keeps one; the split; and under `every` the accuracy of each kind of weights.
    """
    accuracies = self.run.evaluate(self.state, warn, stop.__bool__)
    if stop:
      return None
    step, split, recipe = self.step, self.run.evaluator.split, self.run.recipe
    self.reporter.evaluation(step, split, accuracies)
    initial_share = recipe.ema_decay**step
    if 'ema' in accuracies and initial_share > NOTED_SHARE:
      say(f'  the moving average is still warming up: {initial_share:.0%} of it is the initial weights')
    accuracy = accuracies.get('ema', accuracies['raw'])
    self.reporter.classes(accuracy, show=step == recipe.total_steps)
    every = {kind: each.as_dict() for kind, each in accuracies.items()}
    result = {**accuracy.as_dict(), 'split': split, 'every': every}
    if step >= recipe.total_steps:
      self.result = result
    return result

  def evaluate_first(self, stop: StopRequest) -> None:
    """Makes the evaluation that was due when the newest checkpoint was saved, and adds it to that."""
    say(f'step {self.step} was not evaluated; that comes first')
    if metrics := self.evaluate(stop):
      self.checkpoints.add_metrics(metrics)

  def save(self, metrics: dict[str, Any] | None = None) -> None:
    """Starts saving a checkpoint, with the metrics of its evaluation if there was one."""
    self.checkpoints.save(self.state, metrics=metrics, run=description(self.run))
    self.reporter.publish()

  def save_early(self) -> None:
    """Saves although nothing is due, and reports the steps since the last report."""
    self.save()
    self.reporter.report(self.step, self.faults.num_bad)


def _run_steps(
  trainer: Trainer,
  calendar: Calendar,
  nonfinite: NonFiniteSteps,
  slow_input: SlowInput,
  *,
  overdue: bool,
  log_images: bool,
) -> dict[str, Any]:
  """Computes the steps that are left, after an `overdue` evaluation; returns the last step's metrics, see `Trainer`."""
  run, reporter, first_step = trainer.run, trainer.reporter, trainer.first_step
  sample = None
  with (
    contextlib.closing(run.train_batches(first_step)) as batches,
    stop_request() as stop,
    _saving_if_it_ends_early(trainer, stop),
  ):
    if overdue:
      trainer.evaluate_first(stop)
    left = () if stop else trainer.faults.check(batches)
    for step, batch in enumerate(reporter.waiting_for(left), start=first_step + 1):
      if sample is None:
        sample = run.sample(batch)
        if log_images:
          reporter.images(run.pictures(sample, step))
      with trainer.profile.step(step):
        trainer.train(batch)
      if step == first_step + 1:
        reporter.start_clock()  # the first step was compiled

      if stop.reached(step) or calendar.reports(step):
        nonfinite.note(reporter.report(step, trainer.faults.num_bad), trainer.state)
        slow_input.note(*reporter.waited)
      if trainer.profile.finished(step, trainer.state):
        reporter.start_clock()
      if stop:
        break
      metrics = trainer.evaluate(stop) if calendar.evaluates(step) else None
      if calendar.evaluates(step) and not metrics:  # a signal ended the evaluation
        break
      if calendar.saves(step):
        trainer.save(metrics)
      if metrics:
        reporter.start_clock()
    if trainer.result:
      page_step = min(first_step + 1, run.recipe.total_steps)  # the last one if none was left
      sample = sample or run.sample(run.batch_of(page_step))
      reporter.page(run.pictures(sample, page_step), title(run, Accuracy.from_dict(trainer.result)))
  assert trainer.result is not None
  return trainer.result


@contextlib.contextmanager
def _saving_if_it_ends_early(trainer: Trainer, stop: StopRequest) -> Iterator[None]:
  """Saves the state if a signal stops the run or its data fails, and replaces known errors by one line.

  Raises:
    Stopped: the run was to `stop` before it was complete.
    UserError: in place of an error that the user can do something about.
  """
  try:
    yield
  except Exception as error:
    if not stop:  # after a signal the error may be a worker that died of the same signal
      # A single process only: several save together or not at all, and the others don't know of this error.
      if isinstance(error, DataError) and jax.process_count() == 1 and trainer.step > trainer.first_step:
        trainer.save_early()
      if known := out_of_memory(error, trainer.run.recipe) or lost_process(error):
        raise known from error
      raise
  if stop.signal and trainer.result is None:
    trainer.save_early()
    trainer.checkpoints.wait()  # so that the message is true
    raise Stopped(trainer.step, stop.signal)
