"""Checkpoints of a run: saved in the background, verified when read, the latest and the best kept.

`fingerprints` tells whether a checkpoint is whole, `compatibility` whether it fits, `orbax_errors` what went wrong.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from etils import epath
from flax import serialization
import jax
from orbax.checkpoint import v1 as ocp

from t2t_vit_jax.conversion.files import write_file
from t2t_vit_jax.errors import UserError, first_line, free_space, full_disk, writing_problem
from t2t_vit_jax.models.blocks import unstack_blocks
from t2t_vit_jax.processes import LostProcessError, gather_texts, in_all_processes, lost_process
from t2t_vit_jax.recipe.sharding import divided, mesh_of
from t2t_vit_jax.recipe.state import TrainState
from t2t_vit_jax.workdir import orbax_errors
from t2t_vit_jax.workdir.compatibility import block_form, check_shapes, run_changes, with_added_fields
from t2t_vit_jax.workdir.fingerprints import abstract_fingerprints, fingerprints, sealed, unsealed, verified
from t2t_vit_jax.workdir.folder import is_bucket, move_folder
from t2t_vit_jax.workdir.provenance import provenance

T = TypeVar('T')

BEST_METRIC = 'top1'
INTACT = 'earlier checkpoints are intact'
METRICS = 'metrics/metrics'  # orbax's name for the file below a checkpoint
STEPS = ocp.path.step.standard_name_format()
policies = ocp.training.preservation_policies


class Restored(NamedTuple):
  """A state, and what the user should know about it.

  Attributes:
    state: the state.
    run: `description.description` of the run that saved it.
    changes: a phrase for each field of the config that has changed since.
    set_aside: a line for each checkpoint that was damaged and moved away.
  """

  state: TrainState
  run: dict[str, Any]
  changes: list[str]
  set_aside: list[str]


class Loaded(NamedTuple):
  """The weights of a checkpoint, and what belongs to them.

  Attributes:
    step: of the checkpoint.
    run: `description.description` of the run that saved it.
    weights: variables by the name of the weights, 'raw' and perhaps 'ema'. Blocks have their plain names, whether the
      run stacked them or not.
    metrics: of its evaluation; None if it was not evaluated.
    notes: a line for each newer checkpoint that is damaged.
  """

  step: int
  run: dict[str, Any]
  weights: dict[str, Any]
  metrics: dict[str, Any] | None
  notes: list[str]


def _steps_in(folder: epath.Path) -> list[int]:
  """Steps of the checkpoints in `folder`, without those that are half-written; no file is read."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  steps = sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
  # On a disk a checkpoint gets its name when it is complete; in a bucket this file.
  return [step for step in steps if not is_bucket(folder) or (folder / str(step) / 'commit_success.txt').exists()]


class Checkpoints:
  """The checkpoints in a folder, by step. Use as a context manager: leaving it waits for the last save.

  Args:
    folder: made with its first checkpoint if it does not exist.
    keep_latest: how many of the newest to keep, beside the one with the best top-1 accuracy.
    allow_changes: restores even if the config makes it another run.
    read_only: only for `load_weights`, which then takes the checkpoint before one that is damaged.

  Raises:
    UserError: `read_only`, but there is no such folder.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    keep_latest: int = 1,
    *,
    allow_changes: bool = False,
    read_only: bool = False,
  ):
    path = epath.Path(folder)
    self.folder = path if is_bucket(path) else path.absolute()
    self._keep_latest = keep_latest
    self._allow_changes = allow_changes
    self._read_only = read_only
    self._checkpointer: ocp.training.Checkpointer | None = None
    self._needed = 0  # bytes of the last checkpoint
    self._save: Any = None  # the last one, under way or done
    orbax_errors.silence_background()
    if read_only and not self.folder.is_dir():
      raise UserError(f'there is no checkpoint in {self.folder}')
    self._steps: list[int] = json.loads(gather_texts(json.dumps(_steps_in(self.folder)))[0])  # found or saved

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
    if self._checkpointer is None:
      return
    if kind is None:
      self.wait()
      with self._writing():
        self._checkpointer.close()
    elif not issubclass(kind, LostProcessError):  # a save that is under way would wait for the lost process
      with contextlib.suppress(Exception):  # the error on its way says more
        self._checkpointer.close()

  def wait(self) -> None:
    """Returns when the last save is done.

    Raises:
      UserError: it failed.
    """
    if self._checkpointer is not None:
      with self._writing():
        self._finish_save()
        self._checkpointer.wait()

  @property
  def latest_step(self) -> int | None:
    """The newest checkpoint's step; None without one."""
    return self._steps[-1] if self._steps else None

  @property
  def latest_metrics(self) -> dict[str, Any] | None:
    """Metrics of the evaluation at the newest checkpoint; None without one. All processes ask together."""
    metrics = self._metrics(self._steps[-1]) if self._steps and jax.process_index() == 0 else None
    found: dict[str, Any] | None = json.loads(gather_texts(json.dumps(metrics))[0])
    return found

  @property
  def best(self) -> tuple[int, dict[str, Any]] | None:
    """Step and metrics of the kept checkpoint with the best top-1 accuracy; None if none was evaluated."""
    evaluated = ((step, metrics) for step in self._steps if (metrics := self._metrics(step)))
    return max(evaluated, key=lambda step_and_metrics: step_and_metrics[1][BEST_METRIC], default=None)

  def _metrics(self, step: int) -> dict[str, Any] | None:
    try:
      return self._read_metrics(step)
    except Exception:  # any that damage or the storage cause: the evaluation counts as not made
      return None

  def _read_metrics(self, step: int) -> dict[str, Any] | None:
    """Metrics of the evaluation at a checkpoint; None without one.

    Raises:
      Exception: of the storage; or the file is damaged.
    """
    self._check_files(step, METRICS)
    try:
      text = (self.folder / str(step) / METRICS).read_text()
    except FileNotFoundError:
      return None
    metrics = unsealed(json.loads(text))
    if not isinstance(metrics.get(BEST_METRIC), int | float):  # older ones have no checksum
      raise ValueError(f'{BEST_METRIC} is missing')
    return metrics

  def add_metrics(self, metrics: dict[str, Any]) -> None:
    """Writes the metrics of an evaluation that came after the newest checkpoint was saved; all processes call this.

    Raises:
      UserError: they can't be written.
    """

    def write() -> None:
      if jax.process_index() != 0:
        return
      with self._writing():
        path, text = self.folder / str(self.latest_step) / METRICS, json.dumps(sealed(metrics))
        path.parent.mkdir(exist_ok=True)
        if is_bucket(path):
          path.write_text(text)
        else:
          write_file(Path(path), lambda temporary: temporary.write_text(text))

    in_all_processes(write)

  def save(self, state: TrainState, *, metrics: dict[str, Any] | None, run: dict[str, Any]) -> None:
    """Starts saving `state` under its step; `run` (JSON: model, config) and the provenance are saved with it.

    Raises:
      UserError: there is no room for it, or the save before failed in the background.
    """
    step = int(state.step)
    if step == self.latest_step:
      return
    saved = serialization.to_state_dict(state)
    with self._writing():
      self._needed = sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
      in_all_processes(self._check_room)
      saved['fingerprint'] = fingerprints(saved)
      metadata = sealed(run | {'provenance': provenance()}, saved)
      if self._checkpointer is None:
        self._checkpointer = self._opened()
      self._finish_save()
      self._save = self._checkpointer.save_async(
        step, saved, metrics=metrics and sealed(metrics), custom_metadata=metadata
      )
      self._steps.append(step)

  def _finish_save(self) -> None:
    """Waits for the last save. Orbax keeps a thread with three open files for each whose result nobody asks for."""
    last, self._save = self._save, None
    if last is not None:
      last.result()

  def _opened(self) -> ocp.training.Checkpointer:
    """Orbax's writer, opened with the first save: it trusts what is in the folder, and deletes what is half-written."""
    best = policies.BestN(
      get_metric_fn=lambda metrics: metrics[BEST_METRIC], n=1, keep_checkpoints_without_metrics=False
    )
    with orbax_errors.silence():
      return ocp.training.Checkpointer(
        self.folder,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides when
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep_latest), best]),
        cleanup_tmp_directories=True,  # what a killed process left half-written
      )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Raises a UserError of one line if writing fails now, or failed in the background since the last call."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      if lost := lost_process(error):
        raise lost from error
      raise UserError(
        f'a checkpoint could not be written to {self.folder} '
        f'({writing_problem(orbax_errors.cause(error), self.folder, self._needed)}); {INTACT}'
      ) from error

  def _check_room(self) -> None:
    if not os.path.isdir(self.folder):  # before the first checkpoint, or in a bucket
      return
    if free_space(self.folder) < self._needed:
      raise UserError(
        f'a checkpoint could not be written to {self.folder} ({full_disk(self.folder, self._needed)}); {INTACT}'
      )

  def restore(self, abstract_state: TrainState, run: dict[str, Any]) -> Restored:
    """Loads the newest checkpoint that is whole; moves damaged checkpoints to the folder `damaged` beside this folder.

    Args:
      abstract_state: shapes, dtypes and shardings wanted.
      run: `description.description` of the run now.

    Raises:
      UserError: no checkpoint is whole, or it has other names or shapes, or a field that decides what the model
        computes or in which order the data comes has changed.
    """
    set_aside: list[str] = []
    while self._steps:
      step = self._steps[-1]
      found, failure = self._tried(self._load, step, abstract_state, run)
      if found and not failure:
        break
      set_aside.append(self._set_aside(step, failure))
    else:
      raise UserError(f'no checkpoint can be read. {" ".join(set_aside)} The same command starts anew')
    for older in self._steps[:-1]:
      if failure := self._tried(self._check_small_files, older)[1]:
        set_aside.append(self._set_aside(older, failure))
    if failure := self._tried(lambda logged: self._read_metrics(step))[1]:
      set_aside.append(self._set_aside(step, failure, 'metrics'))
    return Restored(*found, set_aside)

  def _tried(self, read: Callable[..., T], *arguments: Any) -> tuple[T | None, str]:
    """Calls `read` with the log records of orbax to come, which are hidden, and `arguments`; all processes do so.

    Returns:
      What `read` returns; and why it failed in any process, or ''.

    Raises:
      UserError: `read` raised one, or the storage failed, in any process: so none waits for one that gave up.
    """
    result, failure, refusal = None, '', None
    try:
      with orbax_errors.silence() as logged:
        result = read(logged, *arguments)
    except UserError as error:
      refusal = error
    except Exception as error:
      failure = first_line(orbax_errors.cause(error))
      if orbax_errors.leaves_checkpoint_good(error):
        refusal = UserError(f'cannot read {self.folder}: {failure}')

    def refuse() -> None:
      if refusal:
        raise refusal

    in_all_processes(refuse)
    return result, next(filter(None, gather_texts(failure)), '')

  def _check_small_files(self, logged: Sequence[logging.LogRecord], step: int) -> None:
    """Reads all of a checkpoint but its numbers, and raises an error if that is damaged."""
    self._described(logged, step)
    self._read_metrics(step)

  def _load(
    self, logged: Sequence[logging.LogRecord], step: int, abstract_state: TrainState, run: dict[str, Any]
  ) -> tuple[TrainState, dict[str, Any], list[str]]:
    stored, stored_run = self._described(logged, step)
    wanted = serialization.to_state_dict(abstract_state)
    shardings = jax.tree.map(lambda x: x.sharding, wanted)
    to_stored_form, to_wanted_form = block_form(stored), block_form(wanted)
    if to_stored_form is not to_wanted_form:  # `scan_blocks` has changed
      wanted = divided(jax.eval_shape(to_stored_form, wanted), mesh_of(wanted))
    wanted['fingerprint'] = abstract_fingerprints(wanted)
    check_shapes(stored, stored_run.get('model', 'a model'), wanted, run['model'], self.folder)
    changes, fatal = run_changes(stored_run, run)
    if fatal and not self._allow_changes:
      raise UserError(
        f'{self.folder} belongs to another run: {"; ".join(fatal)}. Nothing was changed; choose another --workdir, '
        'or go on all the same with --config.checkpoint.allow_changes=True'
      )
    restored = verified(ocp.load(self.folder / str(step), wanted))
    if to_stored_form is not to_wanted_form:
      restored = jax.jit(to_wanted_form, out_shardings=shardings)(restored)
    return serialization.from_state_dict(abstract_state, restored), stored_run, changes

  def load_weights(self, sharding: jax.sharding.Sharding) -> Loaded:
    """Loads the weights of the newest checkpoint; of the newest that is whole, if this is `read_only`.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    if not self._steps:
      raise UserError(f'there is no checkpoint in {self.folder}')
    notes: list[str] = []
    for step in reversed(self._steps if self._read_only else self._steps[-1:]):
      found, failure = self._tried(self._load_weights, step, sharding)
      if found and not failure:
        break
      notes.append(f'The checkpoint {self.folder}/{step} is damaged ({failure}).')
    else:
      raise UserError(f'no checkpoint can be read. {" ".join(notes)}')
    if notes:
      notes.append(f'The checkpoint of step {step} was taken.')
    metrics, failure = self._tried(lambda logged: self._read_metrics(step))
    if failure:
      notes.append(f'The metrics of the checkpoint {self.folder}/{step} are damaged ({failure}).')
    return Loaded(step, *found, metrics, notes)

  def _load_weights(
    self, logged: Sequence[logging.LogRecord], step: int, sharding: jax.sharding.Sharding
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    stored, description = self._described(logged, step)
    checksums = stored['fingerprint']  # without 'ema' if the run keeps no moving average
    wanted = {name: stored[name] for name in ('params', 'frozen', 'ema') if name in checksums}
    wanted['fingerprint'] = {name: checksums[name] for name in wanted}
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      restored = verified(ocp.load(self.folder / str(step), wanted))
    restored = unstack_blocks(restored)
    frozen = restored.pop('frozen')
    kinds = {'params': 'raw', 'ema': 'ema'}
    weights = {kinds[name]: {'params': x, 'frozen': frozen} for name, x in restored.items()}
    return description, weights

  def _described(self, logged: Sequence[logging.LogRecord], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's arrays, only described, and the run that it belongs to.

    Raises:
      Exception: the storage's; one that orbax has not raised but `logged`; or the description is damaged.
    """
    self._check_files(step, '*', 'state/**/*')
    _ = STEPS.find_step(self.folder, step).commit_timestamp  # orbax reads it of all when it is to write another
    stored = ocp.metadata(self.folder / str(step))
    if stored.metadata is None:
      raise orbax_errors.logged_error(logged)
    description = unsealed(stored.custom_metadata, stored.metadata)
    if 'config' not in description:
      raise ValueError('its config is missing')
    return stored.metadata, with_added_fields(description)

  def _check_files(self, step: int, *patterns: str) -> None:
    """Raises ValueError if a file of a checkpoint is a pipe, a socket or a device: reading it might never end."""
    if is_bucket(self.folder):
      return
    for path in (path for pattern in patterns for path in Path(self.folder, str(step)).glob(pattern)):
      if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f'{path} is no regular file')

  def _set_aside(self, step: int, failure: str, part: str = '') -> str:
    """Moves a checkpoint, or a folder in it, out of the way and returns a line that says so.

    Raises:
      UserError: it can't be moved.
    """
    damaged = self.folder / str(step) / part
    target = self.folder.parent / 'damaged' / '-'.join(filter(None, (str(step), part)))
    while jax.process_index() == 0 and target.exists():
      target = target.with_name(target.name + '+')

    def move() -> None:
      if jax.process_index() != 0:
        return
      try:
        target.parent.mkdir(parents=True, exist_ok=True)
        move_folder(damaged, target)
      except Exception as error:  # of the disk, or of a bucket's client, whichever that is
        reason = writing_problem(error, target)
        raise UserError(f'{damaged} is damaged ({failure}) and cannot be moved to {target}: {reason}') from error

    in_all_processes(move)
    if part:
      return f'The {part} of the checkpoint {damaged.parent} are damaged ({failure}) and were moved to {target}.'
    self._steps.remove(step)
    return f'The checkpoint {damaged} is damaged ({failure}) and was moved to {target}.'
