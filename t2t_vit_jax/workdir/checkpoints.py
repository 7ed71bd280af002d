"""Checkpoints of a run: saved in the background, verified when read, the latest and the best kept.

`fingerprints` tells whether a checkpoint is whole, `compatibility` whether it fits, `orbax_errors` what went wrong.
"""

from collections.abc import Iterator, Sequence
import contextlib
import logging
import os
import shutil
from typing import Any, NamedTuple, Self

from etils import epath
from flax import serialization
import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import v1 as ocp

from t2t_vit_jax.errors import UserError, full_disk, writing_problem
from t2t_vit_jax.models.blocks import unstack_blocks
from t2t_vit_jax.processes import LostProcessError, in_all_processes, lost_process
from t2t_vit_jax.recipe.sharding import divided, mesh_of
from t2t_vit_jax.recipe.state import TrainState
from t2t_vit_jax.workdir import orbax_errors
from t2t_vit_jax.workdir.compatibility import block_form, check_shapes, run_changes, with_added_fields
from t2t_vit_jax.workdir.fingerprints import abstract_fingerprints, fingerprints, verified
from t2t_vit_jax.workdir.folder import is_bucket, move_folder
from t2t_vit_jax.workdir.provenance import provenance

BEST_METRIC = 'top1'
INTACT = 'earlier checkpoints are intact'
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


class Checkpoints:
  """The checkpoints in a folder, by step. Use as a context manager: leaving it waits for the last save.

  Args:
    folder: made with its first checkpoint if it does not exist.
    keep_latest: how many of the newest to keep, beside the one with the best top-1 accuracy.
    allow_changes: restores even if the config makes it another run.
    read_only: deletes no half-written checkpoint, since another run may be writing it.

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
    self._allow_changes = allow_changes
    self._needed = 0  # bytes of the last checkpoint
    self._save: Any = None  # the last one, under way or done
    orbax_errors.silence_background()
    if read_only and not self.folder.is_dir():
      raise UserError(f'there is no checkpoint in {self.folder}')
    best = policies.BestN(
      get_metric_fn=lambda metrics: metrics[BEST_METRIC], n=1, keep_checkpoints_without_metrics=False
    )
    self._checkpointer = ocp.training.Checkpointer(
      self.folder,
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides when
      preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_latest), best]),
      cleanup_tmp_directories=not read_only,  # what a killed process left half-written
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
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
    with self._writing():
      self._finish_save()
      self._checkpointer.wait()

  @property
  def latest_step(self) -> int | None:
    """The newest checkpoint's step; None without one."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  @property
  def latest_metrics(self) -> dict[str, Any] | None:
    """Metrics of the evaluation at the newest checkpoint; None if it was saved without one."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.metrics

  @property
  def best(self) -> tuple[int, dict[str, Any]] | None:
    """Step and metrics of the kept checkpoint with the best top-1 accuracy; None if none was evaluated."""
    evaluated = ((each.step, each.metrics) for each in self._checkpointer.checkpoints if each.metrics)
    return max(evaluated, key=lambda step_and_metrics: step_and_metrics[1][BEST_METRIC], default=None)

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
      self._finish_save()
      self._save = self._checkpointer.save_async(
        step, saved, metrics=metrics, custom_metadata=run | {'provenance': provenance()}
      )

  def _finish_save(self) -> None:
    """Waits for the last save. Orbax keeps a thread with three open files for each whose result nobody asks for."""
    last, self._save = self._save, None
    if last is not None:
      last.result()

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
    if shutil.disk_usage(self.folder).free < self._needed:
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
    while self.latest_step is not None:
      failure = None
      with orbax_errors.silence() as logged:
        try:
          state, stored_run, changes = self._load_newest(abstract_state, run, logged)
        except UserError:
          raise
        except Exception as error:
          if orbax_errors.leaves_checkpoint_good(error):
            raise UserError(f'cannot read {self.folder}: {orbax_errors.first_line(error)}') from error
          failure = orbax_errors.first_line(error)
        whole = multihost_utils.process_allgather(np.array(failure is None)).all()
      if whole:
        return Restored(state, stored_run, changes, set_aside)
      set_aside.append(self._set_aside(failure or 'another process could not read it'))
    raise UserError(f'no checkpoint can be read. {" ".join(set_aside)} The same command starts anew')

  def _load_newest(
    self, abstract_state: TrainState, run: dict[str, Any], logged: Sequence[logging.LogRecord]
  ) -> tuple[TrainState, dict[str, Any], list[str]]:
    stored = self._newest_metadata(logged)
    wanted = serialization.to_state_dict(abstract_state)
    shardings = jax.tree.map(lambda x: x.sharding, wanted)
    to_stored_form, to_wanted_form = block_form(stored.metadata), block_form(wanted)
    if to_stored_form is not to_wanted_form:  # `scan_blocks` has changed
      wanted = divided(jax.eval_shape(to_stored_form, wanted), mesh_of(wanted))
    wanted['fingerprint'] = abstract_fingerprints(wanted)
    stored_run = with_added_fields(stored.custom_metadata)
    check_shapes(stored.metadata, stored_run.get('model', 'a model'), wanted, run['model'], self.folder)
    changes, fatal = run_changes(stored_run, run)
    if fatal and not self._allow_changes:
      raise UserError(
        f'{self.folder} belongs to another run: {"; ".join(fatal)}. Nothing was changed; choose another --workdir, '
        'or go on all the same with --config.checkpoint.allow_changes=True'
      )
    restored = verified(self._checkpointer.load(None, wanted))
    if to_stored_form is not to_wanted_form:
      restored = jax.jit(to_wanted_form, out_shardings=shardings)(restored)
    return serialization.from_state_dict(abstract_state, restored), stored_run, changes

  def load_weights(self, sharding: jax.sharding.Sharding) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest checkpoint's description, and its variables by the name of the weights: 'raw' and perhaps 'ema'.

    Blocks have their plain names, whether the run stacked them or not.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    if self.latest_step is None:
      raise UserError(f'there is no checkpoint in {self.folder}')
    try:
      with orbax_errors.silence() as logged:
        stored = self._newest_metadata(logged)
        checksums = stored.metadata['fingerprint']  # without 'ema' if the run keeps no moving average
        wanted = {name: stored.metadata[name] for name in ('params', 'frozen', 'ema') if name in checksums}
        wanted['fingerprint'] = {name: checksums[name] for name in wanted}
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
          restored = verified(self._checkpointer.load(None, wanted))
    except Exception as error:
      raise UserError(
        f'the checkpoint {self.folder}/{self.latest_step} cannot be read ({orbax_errors.first_line(error)})'
      ) from error
    restored = unstack_blocks(restored)
    frozen = restored.pop('frozen')
    kinds = {'params': 'raw', 'ema': 'ema'}
    return with_added_fields(stored.custom_metadata), {
      kinds[name]: {'params': x, 'frozen': frozen} for name, x in restored.items()
    }

  def _newest_metadata(self, logged: Sequence[logging.LogRecord]) -> Any:
    """The newest checkpoint's shapes, dtypes and metrics, and the run that it belongs to.

    Raises:
      Exception: an error of orbax or the storage that orbax has not raised but `logged`.
    """
    stored = self._checkpointer.metadata()
    if stored.metadata is None:
      raise orbax_errors.logged_error(logged)
    return stored

  def _set_aside(self, failure: str) -> str:
    """Moves the newest checkpoint out of the way and returns a line that says so."""
    damaged = self.folder / str(self.latest_step)
    target = self.folder.parent / 'damaged' / damaged.name
    if jax.process_index() == 0:
      target.parent.mkdir(parents=True, exist_ok=True)
      while target.exists():
        target = target.with_name(target.name + '+')
      move_folder(damaged, target)
    multihost_utils.sync_global_devices('set aside')
    self._checkpointer.reload()
    return f'The checkpoint {damaged} is damaged ({failure}) and was moved to {target}.'
