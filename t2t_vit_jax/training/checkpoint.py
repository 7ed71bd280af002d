"""Checkpoints of a run: saved in the background, the latest and the best kept."""

from collections.abc import Iterator, Sequence
import contextlib
import json
import os
from typing import Any, Self

from flax import serialization, traverse_util
from orbax.checkpoint import v1 as ocp

from t2t_vit_jax.errors import UserError
from t2t_vit_jax.training.state import TrainState

BEST_METRIC = 'top1'
# Fields without which a continued run would be another one: what the model computes, and the order of its data.
UNCHANGEABLE = (
  'model.',
  'seed',
  'data.source',
  'data.name',
  'data.train_split',
  'data.batch_size',
  'train_images',
)
policies = ocp.training.preservation_policies


class Checkpoints:
  """The checkpoints in a folder, by step. Use as a context manager: leaving it waits for the last save.

  Args:
    folder: made with its first checkpoint if it does not exist.
    keep_latest: how many of the newest to keep, beside the one with the best top-1 accuracy.
  """

  def __init__(self, folder: str | os.PathLike[str], keep_latest: int = 1):
    self.folder = os.path.abspath(folder)
    best = policies.BestN(
      get_metric_fn=lambda metrics: metrics[BEST_METRIC], n=1, keep_checkpoints_without_metrics=False
    )
    self._checkpointer = ocp.training.Checkpointer(
      self.folder,
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides
      preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_latest), best]),
      cleanup_tmp_directories=True,  # what a killed process left half-written
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    self._checkpointer.close()

  @property
  def latest_step(self) -> int | None:
    """The newest checkpoint's step; None without one."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  @property
  def latest_metrics(self) -> dict[str, Any] | None:
    """What the evaluation at the newest checkpoint found; None if it was saved without one."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.metrics

  def save(self, state: TrainState, *, metrics: dict[str, Any] | None, run: dict[str, Any]) -> None:
    """Starts saving `state` under its step; `run` (JSON: model, config) travels with it."""
    step = int(state.step)
    if step != self.latest_step:
      self._checkpointer.save_async(step, serialization.to_state_dict(state), metrics=metrics, custom_metadata=run)

  def restore(self, abstract_state: TrainState, run: dict[str, Any]) -> tuple[TrainState, list[str]]:
    """Loads the newest checkpoint.

    Args:
      abstract_state: shapes, dtypes and shardings wanted.
      run: what would be saved with a checkpoint now.

    Returns:
      The state, and in what the config differs from that of the checkpoint, a phrase for each field.

    Raises:
      UserError: the checkpoint is damaged, its parameters have other names or shapes, or its config is another in a
        field that decides what the model computes or in which order the data comes.
    """
    with self._reading():
      stored = self._checkpointer.metadata()
      wanted = serialization.to_state_dict(abstract_state)
      self._check_shapes(stored, wanted, run['model'])
      before = stored.custom_metadata or {}
      changes = config_changes(*({**x.get('config', {}), 'train_images': x.get('train_images')} for x in (before, run)))
      fatal = [text for field, text in changes.items() if field.startswith(UNCHANGEABLE)]
      if fatal:
        raise UserError(
          f'{self.folder} belongs to another run: {"; ".join(fatal)}. Nothing was changed; choose another --workdir'
        )
      restored = self._checkpointer.load(None, wanted)
      return serialization.from_state_dict(abstract_state, restored), list(changes.values())

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    """Makes one line of what a damaged checkpoint sets off in orbax."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      raise UserError(
        f'the checkpoint {self.folder}/{self.latest_step} cannot be read ({type(error).__name__}); '
        'move this folder away to continue from the one before'
      ) from error

  def _check_shapes(self, stored: Any, wanted: dict[str, Any], model_name: str) -> None:
    # The optimizer's state repeats the parameters' names: it speaks only where they are the same.
    differences = tree_differences(_variables(stored.metadata), _variables(wanted)) or tree_differences(
      stored.metadata, wanted
    )
    if differences:
      stored_name = (stored.custom_metadata or {}).get('model', 'a model')
      shown = '; '.join(differences[:3]) + (f'; and {len(differences) - 3} more' if len(differences) > 3 else '')
      raise UserError(
        f'{self.folder} has a checkpoint of {stored_name}, which does not fit the {model_name} of this config: '
        f'{shown}. Nothing was changed; choose another --workdir'
      )


def config_changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
  """Fields in which two configs differ -> a phrase that says how."""
  # As JSON both: a tuple comes back from a checkpoint as a list.
  old, new = (traverse_util.flatten_dict(json.loads(json.dumps(config)), sep='.') for config in (before, now))
  return {
    field: f'{field} was {old[field]} and is {new[field]}'
    for field in sorted(old.keys() & new.keys())
    if old[field] != new[field]
  }


def _variables(state: dict[str, Any]) -> dict[str, Any]:
  return {name: state[name] for name in ('params', 'frozen') if name in state}


def tree_differences(stored: Any, wanted: Any) -> Sequence[str]:
  """Names and shapes in which two nested dicts of arrays (or their descriptions) differ, one line each."""
  stored_shapes, wanted_shapes = (
    {name: tuple(leaf.shape) for name, leaf in traverse_util.flatten_dict(tree, sep='/').items()}
    for tree in (stored, wanted)
  )
  lines = []
  for name in sorted(stored_shapes.keys() | wanted_shapes.keys()):
    there, here = stored_shapes.get(name), wanted_shapes.get(name)
    if there != here:
      lines.append(f'{name} is {_shape(there)} there, {_shape(here)} here')
  return lines


def _shape(shape: tuple[int, ...] | None) -> str:
  return 'missing' if shape is None else str(shape)
