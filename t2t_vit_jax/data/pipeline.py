"""The input pipeline that `config.data` and `config.augment` describe."""

from pathlib import Path
from typing import Any

from t2t_vit_jax.data import transforms
from t2t_vit_jax.data.randaugment import RandAugment
from t2t_vit_jax.data.sources import Source, open_divided_folder, open_folder, open_tfds
from t2t_vit_jax.errors import UserError


def open_sources(data: Any) -> tuple[Source, Source]:
  """The training and the evaluation split of `config.data`.

  Raises:
    UserError: the source is unknown, or its data missing.
  """
  if divided := _divided(data):
    return divided
  train = _open_split(data, data.train_split)
  return train, _open_split(data, data.eval_split, train.class_names)


def open_eval_source(data: Any) -> Source:
  """The evaluation split of `config.data` alone: the training split may be missing.

  Raises:
    UserError: the source is unknown, or its data missing.
  """
  if divided := _divided(data):
    return divided[1]
  if data.source == 'folder' and data.path is not None and (Path(data.path).expanduser() / data.train_split).is_dir():
    return open_sources(data)[1]  # the training split decides which label a folder has
  return _open_split(data, data.eval_split)


def _divided(data: Any) -> tuple[Source, Source] | None:
  """Both splits of an image folder that has none for evaluation, if `data.eval_fraction` says what to do then."""
  if data.source != 'folder' or data.path is None or not data.eval_fraction:
    return None
  return open_divided_folder(data.path, data.train_split, data.eval_split, data.eval_fraction)


def _open_split(data: Any, split: str, class_names: tuple[str, ...] | None = None) -> Source:
  if data.source == 'tfds':
    if data.path is not None:
      raise UserError("data.path is the folder of data.source 'folder'; that of 'tfds' is data.data_dir")
    return open_tfds(data.name, split, data.data_dir)
  if data.source == 'folder':
    if data.path is None:
      raise UserError("data.source 'folder' needs --config.data.path")
    return open_folder(data.path, split, class_names)
  raise UserError(f"data.source must be 'tfds' or 'folder', not {data.source!r}")


def train_transform(config: Any) -> transforms.TrainTransform:
  """The host's part of `config.augment`.

  Raises:
    UserError: `config.augment.crop` or `config.data.interpolation` is unknown, or `config.data.fast_decode` needs
      another crop or another package.
  """
  size, augment, fast = config.data.image_size, config.augment, config.data.fast_decode
  if augment.crop == 'resized':
    crop: Any = transforms.RandomResizedCrop(size, tuple(augment.crop_scale), tuple(augment.crop_ratio), fast=fast)
  elif augment.crop == 'padded':
    if fast:
      raise UserError("data.fast_decode is for augment.crop='resized' only")
    crop = transforms.RandomPaddedCrop(size, augment.crop_padding, _interpolation(config))
  else:
    raise UserError(f"augment.crop must be 'resized' or 'padded', not {augment.crop!r}")
  randaugment = RandAugment(
    augment.randaugment_operations,
    augment.randaugment_magnitude,
    augment.randaugment_magnitude_std,
    augment.randaugment_probability,
    fill=tuple(round(255 * channel) for channel in config.data.mean),
  )
  return transforms.Chain(crop, (transforms.RandomHorizontalFlip(augment.horizontal_flip_probability), randaugment))


def eval_transform(config: Any) -> transforms.EvalTransform:
  """The evaluation transform of `config.data`."""
  return transforms.ResizeCenterCrop(config.data.image_size, config.data.crop_fraction, _interpolation(config))


def _interpolation(config: Any) -> str:
  if config.data.interpolation not in transforms.INTERPOLATIONS:
    known = ' or '.join(map(repr, transforms.INTERPOLATIONS))
    raise UserError(f'data.interpolation must be {known}, not {config.data.interpolation!r}')
  return config.data.interpolation
