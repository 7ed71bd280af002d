"""Forms of published T2T-ViT checkpoints: which of a file's tensors are the model's, and under which names."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from pathlib import Path
import re
from typing import Any, Literal

import numpy as np

from t2t_vit_jax.conversion import files, names
from t2t_vit_jax.conversion.torch_pickle import type_name
from t2t_vit_jax.errors import UserError

WeightsKind = Literal['ema', 'raw']
State = Mapping[Any, Any]  # a state dict, before anything is known about it

_DESCRIPTIONS = {'ema': 'moving average (ema)', 'raw': 'raw', None: 'the only ones in the file'}
_COUNTER = r'steps|n_averaged'  # of the moving average: no part of a model
# Where training scripts keep state dicts: timm and Lightning, DeiT and its relatives, PyTorch's tutorials.
_EMA_KEYS = ('state_dict_ema', 'model_ema')
_RAW_KEYS = ('state_dict', 'model', 'model_state_dict')
# What DataParallel, torch.compile, and modules that hold a model (Lightning's) put before every name.
_WRAPPERS = re.compile(r'^((module|_orig_mod|model|net)\.)+')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The tensors of one model under the reference's names."""

  tensors: dict[str, np.ndarray]  # float32, in torch's layout
  weights: WeightsKind | None  # None: the file does not say
  cifar: bool  # saved by the reference's CIFAR transfer
  class_names: tuple[str, ...] | None
  notes: tuple[str, ...]  # what was chosen and dropped, for the user
  files: tuple[Path, ...]  # the file, or the index and its shards


def read_checkpoint(path: Path, file_format: files.Format, weights: WeightsKind | None) -> Checkpoint:
  """Reads a checkpoint with the reference's or mmpretrain's names.

  Args:
    path: the file, or an index of shards.
    file_format: result of `files.file_format`.
    weights: the moving average or the raw weights; None takes the average where the file has both.

  Raises:
    UserError: the file is damaged or unsafe, or does not hold the weights that are asked for.
  """
  shards = files.read_index(path) if file_format == 'index' else {}
  saved = _joined(shards) if shards else _read(path, file_format)
  if not isinstance(saved, dict):
    raise UserError(f'holds a {type_name(saved)}, not a state dict: save its state_dict()')
  sets = _sets_of_weights(saved)
  label = next(iter(sets)) if weights is None else weights
  if label not in sets:
    held = ' and '.join(str(key or 'unnamed') for key in sets)
    raise UserError(f'has no {label} weights, only {held} ones: leave --weights out')
  notes = [
    f'weights: {_DESCRIPTIONS[label]}' + ''.join(f'; --weights={key} for the others' for key in sets if key != label)
  ]

  state = _renamed(sets[label], names.from_mmpretrain)
  if dropped := [name for name in state if isinstance(name, str) and re.fullmatch(_COUNTER, name)]:
    notes.append(f'dropped: {", ".join(dropped)} (counter of the moving average)')
    state = {name: tensor for name, tensor in state.items() if name not in dropped}
  if any(getattr(tensor, 'dtype', '') == 'float64' for tensor in state.values()):
    notes.append('precision: float64 numbers are rounded to float32')
  paths = (path, *shards)
  arrays = files.tensors_to_arrays(state, max_bytes=2 * sum(file.stat().st_size for file in paths))
  return Checkpoint(arrays, label, isinstance(saved.get('net'), dict), _class_names(saved), tuple(notes), paths)


def _read(path: Path, file_format: files.Format) -> Any:
  if file_format == 'safetensors':
    return files.read_safetensors(path)
  if file_format == 'index':
    raise UserError('is an index of shards, not a shard')
  return files.read_torch(path, file_format)


def _joined(shards: Mapping[Path, Sequence[str]]) -> State:
  """One state dict of all shards; UserError if a shard lacks one of its tensors."""
  joined: dict[Any, Any] = {}
  for shard, tensors in shards.items():
    try:
      state = _read(shard, files.file_format(shard))
      if not isinstance(state, dict) or not state.keys() >= set(tensors):
        raise UserError(f'lacks {", ".join(name for name in tensors if name not in state)}, which the index promises')
    except UserError as error:
      raise UserError(f'its shard {shard.name}: {error}') from error
    if twice := [str(name) for name in state if name in joined]:
      raise UserError(f'its shards hold {", ".join(twice)} twice')
    joined.update(state)
  return joined


def _sets_of_weights(saved: State) -> dict[WeightsKind | None, State]:
  """The file's state dicts, the preferred first: of a training script, mmpretrain or the CIFAR transfer, or bare.

  Raises:
    UserError: there is none.
  """
  sets: dict[WeightsKind | None, Any] = {'ema': _first(saved, _EMA_KEYS), 'raw': _first(saved, _RAW_KEYS)}
  if all(state is None for state in sets.values()):
    sets = {None: saved['net'] if isinstance(saved.get('net'), dict) else saved}
  sets = {label: state for label, state in sets.items() if state is not None}
  if not all(isinstance(state, dict) and state for state in sets.values()):
    raise UserError('its state dict is empty or not a dict')
  sets = {label: _renamed(state, lambda name: _WRAPPERS.sub('', name)) for label, state in sets.items()}
  if 'backbone.cls_token' in sets.get('raw', {}):
    ema_state_dict = saved.get('ema_state_dict')
    return _mmpretrain_sets(sets['raw'], ema_state_dict if isinstance(ema_state_dict, dict) else {})
  return sets


def _first(saved: State, keys: Sequence[str]) -> Any:
  """The first value under one of `keys` that is a dict; else the value under the first key, which only weights have."""
  return next((saved[key] for key in keys if isinstance(saved.get(key), dict)), saved.get(keys[0]))


def _mmpretrain_sets(state_dict: State, ema_state_dict: State) -> dict[WeightsKind | None, State]:
  """Returns the average and, if saved, the raw weights. mmpretrain swaps them: `state_dict` is the average.

  In older files the raw ones lie beside the average, with underscores for dots in their names, and without the position
  table, which is not trained.
  """
  average = {name: tensor for name, tensor in state_dict.items() if not str(name).startswith('ema_')}
  raw_names = {name: f'ema_{str(name).replace(".", "_")}' for name in average}
  raw = {name: state_dict[raw_name] for name, raw_name in raw_names.items() if raw_name in state_dict}
  if raw and 'backbone.pos_embed' in average:
    raw.setdefault('backbone.pos_embed', average['backbone.pos_embed'])
  raw = raw or _renamed(ema_state_dict, lambda name: name.removeprefix('module.'))
  return {'ema': average, 'raw': raw} if raw else {'ema': average}


def _renamed(state: State, new_name: Callable[[str], str]) -> dict[Any, Any]:
  """`state` under new names; UserError if two entries get the same name."""
  renamed: dict[Any, Any] = {}
  for name, tensor in state.items():
    new = new_name(name) if isinstance(name, str) else name
    if new in renamed:
      raise UserError(f'holds {new} twice, once as {name}')
    renamed[new] = tensor
  return renamed


def _class_names(saved: State) -> tuple[str, ...] | None:
  """Names of the classes where mmpretrain saves them: `CLASSES`, later `dataset_meta.classes`; None if it does not."""
  meta = saved.get('meta')
  if not isinstance(meta, dict):
    return None
  dataset = meta.get('dataset_meta')
  classes = meta.get('CLASSES') or (dataset.get('classes') if isinstance(dataset, dict) else None)
  if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
    return tuple(classes)
  return None
