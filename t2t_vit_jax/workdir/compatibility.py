"""Checks whether a checkpoint fits a run: fields of both configs, names and shapes of both states."""

from collections.abc import Callable, Sequence
import json
from typing import Any

from flax import traverse_util

from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.blocks import STACK, stack_blocks, unstack_blocks

# A change of one of these fields makes another run: they decide what the model computes and the order of its data.
UNCHANGEABLE = (
  'model.',
  'seed',
  'data.source',
  'data.name',
  'data.train_split',
  'data.batch_size',
  'train_images',
  'optimizer.name',
)
SPEED_ONLY = (
  'model.soft_split_form',
  'model.attention_form',
  'model.token_attention_form',
)  # except of these: the results stay the same
# Fields of `config.data` that older runs lack -> what these runs did.
ADDED_DATA_FIELDS = {'orientation': 'ignored', 'channels': 3}


def with_added_fields(run: dict[str, Any]) -> dict[str, Any]:
  """A stored `description.description`, completed by the fields that an older run lacks."""
  config = run['config']
  return {**run, 'config': {**config, 'data': {**ADDED_DATA_FIELDS, **config['data']}}}


def run_changes(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
  """Differences between the run of a checkpoint and the run now, both as in `description.description`.

  Returns:
    A phrase for each field; and the phrases of the fields that make it another run.
  """
  changes = config_changes(*({**x.get('config', {}), 'train_images': x.get('train_images')} for x in (before, now)))
  fatal = [phrase for field, phrase in changes.items() if field.startswith(UNCHANGEABLE) and field not in SPEED_ONLY]
  return list(changes.values()), fatal


def config_changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
  """A phrase for each field that both configs have and that differs, by field."""
  # Both as JSON: a tuple comes back from a checkpoint as a list.
  old, new = (traverse_util.flatten_dict(json.loads(json.dumps(config)), sep='.') for config in (before, now))
  return {
    field: f'{field} was {old[field]} and is {new[field]}'
    for field in sorted(old.keys() & new.keys())
    if old[field] != new[field]
  }


def check_shapes(stored: dict[str, Any], stored_model: str, wanted: dict[str, Any], model: str, folder: Any) -> None:
  """Raises UserError, which names both models and `folder`, unless two states have the same names and shapes."""
  # The optimizer's state repeats the parameters' names: it is compared only if they agree.
  differences = tree_differences(_variables(stored), _variables(wanted)) or tree_differences(stored, wanted)
  if differences:
    shown = '; '.join(differences[:3]) + (f'; and {len(differences) - 3} more' if len(differences) > 3 else '')
    raise UserError(
      f'{folder} has a checkpoint of {stored_model}, which does not fit the {model} of this config: '
      f'{shown}. Nothing was changed; choose another --workdir'
    )


def _variables(state: dict[str, Any]) -> dict[str, Any]:
  return {name: state[name] for name in ('params', 'frozen') if name in state}


def tree_differences(stored: Any, wanted: Any) -> Sequence[str]:
  """Lines, one for each array whose shape differs or that only one of two nested dicts of arrays has."""
  stored_shapes, wanted_shapes = (
    {name: tuple(leaf.shape) for name, leaf in traverse_util.flatten_dict(tree, sep='/').items()}
    for tree in (stored, wanted)
  )
  lines = []
  for name in sorted(stored_shapes.keys() | wanted_shapes.keys()):
    there, here = stored_shapes.get(name), wanted_shapes.get(name)
    if there != here:
      lines.append(f'{name} is {_shape(there)} in the checkpoint, {_shape(here)} in this run')
  return lines


def _shape(shape: tuple[int, ...] | None) -> str:
  return 'missing' if shape is None else str(shape)


def block_form(state: dict[str, Any]) -> Callable[[Any], Any]:
  """The function that brings the blocks of any state into the form of `state`: stacked, or by name."""
  return stack_blocks if STACK in state.get('params', ()) else unstack_blocks
