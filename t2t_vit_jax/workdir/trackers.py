"""Sends a run's metrics to Weights & Biases or MLflow, in the background: the run never waits for them or fails."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import logging
import os
import queue
import threading
import time
from typing import Any, Protocol
import uuid

from flax import traverse_util
import jax

from t2t_vit_jax.console import say, warn
from t2t_vit_jax.errors import choose, first_line, require
from t2t_vit_jax.workdir.folder import Workdir

PROJECT = 't2t-vit-jax'  # unless the user's environment names another
CLOSE_TIMEOUT_S = 30  # to send what is left when the run ends


class Tracker(Protocol):
  """A run as a service has it. Methods may wait for a network, and raise any exception.

  Attributes:
    run_id: with which the service finds the run again.
    place: where people find it.
  """

  run_id: str
  place: str

  def __init__(self, run_id: str | None, workdir: Workdir, config: dict[str, Any]):
    """Continues the run `run_id`, or starts one that has the fields of `config` if it is None."""

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds values of a step, by name."""

  def close(self, *, completed: bool) -> None:
    """Sends all that is left; a run that was not `completed` may go on later."""


class WandbTracker:
  """See `Tracker`. Without a network (`WANDB_MODE=offline`) the run stays in `wandb/` in the workdir."""

  def __init__(self, run_id: str | None, workdir: Workdir, config: dict[str, Any]):
    import wandb

    # With `console` it would put its own streams in place of standard output and error.
    settings = wandb.Settings(silent=True, console='off', init_timeout=CLOSE_TIMEOUT_S, finish_timeout=CLOSE_TIMEOUT_S)
    online = wandb.setup(settings=settings).settings.mode == 'online'
    if online and not wandb.login(prompt=False, verify=False):
      raise RuntimeError('no API key: run `wandb login`, or set WANDB_MODE=offline')
    self.run_id = run_id or uuid.uuid4().hex[:8]
    self._run = wandb.init(
      id=self.run_id,
      resume='allow',
      name=workdir.root.name,
      project=os.environ.get('WANDB_PROJECT', PROJECT),
      dir=workdir.logs,
      config=config,
      settings=settings,
    )
    self.place = self._run.url or f'{workdir.root}/wandb'

  def write(self, step: int, values: dict[str, float]) -> None:
    self._run.log(values, step=step)

  def close(self, *, completed: bool) -> None:
    self._run.finish(exit_code=0 if completed else 1)


class MlflowTracker:
  """See `Tracker`. `MLFLOW_TRACKING_URI` names a server or a database; else it is `mlflow.db` where the run starts."""

  def __init__(self, run_id: str | None, workdir: Workdir, config: dict[str, Any]):
    import mlflow
    from mlflow.entities import Param

    for library in ('mlflow', 'alembic', 'urllib3'):  # or they tell of each table that they make, and of each retry
      logging.getLogger(library).setLevel(logging.ERROR)
    self._client = mlflow.MlflowClient()
    if run_id is None:
      experiment = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
      known = self._client.get_experiment_by_name(experiment)
      experiment_id = known.experiment_id if known else self._client.create_experiment(experiment)
      self.run_id = self._client.create_run(experiment_id, run_name=workdir.root.name).info.run_id
      fields = traverse_util.flatten_dict(config, sep='.').items()
      params = [Param(name, str(value)) for name, value in fields if value not in (None, '')]
      for start in range(0, len(params), 100):  # more than 100 a call are refused
        self._client.log_batch(self.run_id, params=params[start : start + 100])
    else:
      self.run_id = run_id
      self._client.update_run(run_id, status='RUNNING')
    self.place = mlflow.get_tracking_uri()

  def write(self, step: int, values: dict[str, float]) -> None:
    from mlflow.entities import Metric

    now = round(1000 * time.time())
    self._client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

  def close(self, *, completed: bool) -> None:
    self._client.set_terminated(self.run_id, 'FINISHED' if completed else 'KILLED')


# By the name of the library, which is also that of the extra.
TRACKERS: dict[str, Callable[..., Tracker]] = {'wandb': WandbTracker, 'mlflow': MlflowTracker}


def check_trackers(names: str) -> None:
  """Raises UserError unless each of `names`, such as 'wandb' or 'wandb,mlflow', is known and its library installed."""
  for name in _split(names):
    choose(TRACKERS, 'logging.tracker', name)
    require(f'logging.tracker={name!r}', name)


def start_trackers(names: str, workdir: Workdir, config: dict[str, Any], *, first_step: int) -> list['Sender']:
  """Starts to send to each tracker of `names`, in the first process only.

  Args:
    names: as in `check_trackers`.
    workdir: of the run; keeps the trackers' ids of it.
    config: all fields of the run.
    first_step: steps done before. A run that starts anew is new to the trackers too.
  """
  return [Sender(name, workdir, config, first_step) for name in _split(names) if jax.process_index() == 0]


def close_trackers(senders: Sequence['Sender'], *, completed: bool) -> None:
  """Waits until all is sent, up to `CLOSE_TIMEOUT_S`; a run that was not `completed` may go on later."""
  for sender in senders:
    sender.finish(completed=completed)
  until = time.monotonic() + CLOSE_TIMEOUT_S
  for sender in senders:
    sender.wait(until)


def _split(names: str) -> list[str]:
  return [name.strip() for name in names.split(',') if name.strip()]


class Sender:
  """Sends rows to a tracker from a thread of its own. What goes wrong there costs one warning, and no time.

  `metrics.jsonl` has all rows, whatever becomes of them here.
  """

  def __init__(self, name: str, workdir: Workdir, config: dict[str, Any], first_step: int):
    self._name = name
    self._rows: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
    self._completed = False
    self._warned = False
    # A daemon: the program ends although a network does not answer.
    self._thread = threading.Thread(target=self._send, args=(workdir, config, first_step), name=name, daemon=True)
    self._thread.start()

  def write(self, step: int, values: dict[str, float]) -> None:
    """Takes a row to be sent."""
    if self._thread.is_alive():
      self._rows.put((step, values))

  def finish(self, *, completed: bool) -> None:
    """Lets the thread end when all rows are sent."""
    self._completed = completed
    self._rows.put(None)

  def wait(self, until: float) -> None:
    """Waits for the end of the thread, up to a time of `time.monotonic`."""
    self._thread.join(max(0, until - time.monotonic()))
    if self._thread.is_alive():
      self._warn(f'not all was sent within {CLOSE_TIMEOUT_S} s')

  def _send(self, workdir: Workdir, config: dict[str, Any], first_step: int) -> None:
    try:
      tracker = self._start(workdir, config, first_step)
    except Exception as error:  # of any library
      self._warn(first_line(error))
      return
    for step, values in iter(self._rows.get, None):
      with self._warning():
        tracker.write(step, values)
    with self._warning():
      tracker.close(completed=self._completed)

  def _start(self, workdir: Workdir, config: dict[str, Any], first_step: int) -> Tracker:
    file = f'{self._name}_run_id'
    run_id = (workdir.root / file).read_text().strip() if first_step and (workdir.root / file).exists() else None
    tracker = TRACKERS[self._name](run_id, workdir, config)
    with self._warning():
      (workdir.logs / file).write_text(f'{tracker.run_id}\n', 'utf-8')
    say(f'{self._name}: run {tracker.run_id} at {tracker.place}')
    return tracker

  @contextlib.contextmanager
  def _warning(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # of any library
      self._warn(first_line(error))

  def _warn(self, problem: str) -> None:
    if not self._warned:
      self._warned = True
      warn(f'{self._name}: {problem}; the run goes on, and metrics.jsonl has all rows')
