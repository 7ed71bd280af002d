"""The input pipeline that `config.data` and `config.augment` describe."""

from collections.abc import Callable
import dataclasses
import os
from typing import Any

from t2t_vit_jax.data import digits, transforms
from t2t_vit_jax.data.decoding import ORIENTATIONS
from t2t_vit_jax.data.randaugment import RandAugment
from t2t_vit_jax.data.sources import (
  LayoutError,
  Source,
  has_class_folders,
  note_copies,
  open_divided_folder,
  open_folder,
)
from t2t_vit_jax.errors import UserError, choose


def open_sources(data: Any) -> tuple[Source, Source]:
  """Opens the training and the evaluation split of `config.data`.

  Raises:
    UserError: the source is unknown, or its data missing.
  """
  train, evaluation = _open(data, True)
  assert train is not None
  return train, note_copies(train, evaluation)


def open_eval_source(data: Any) -> Source:
  """Opens the evaluation split of `config.data` alone: the training split may be missing.

  Raises:
    UserError: the source is unknown, or its data missing.
  """
  return _open(data, False)[1]


def _open(data: Any, with_train: bool) -> tuple[Source | None, Source]:
  """Opens a row of `SOURCES`, whose images are turned as `data.orientation` says."""
  upright = choose(ORIENTATIONS, 'data.orientation', data.orientation)
  source = choose(SOURCES, 'data.source', data.source)
  if data.path is not None and data.source in ('tfds', 'digits'):
    raise UserError(f"data.path is for data.source='folder', not {data.source!r}: for 'tfds' set data.data_dir instead")
  train, evaluation = source(data, with_train)
  train = None if train is None else dataclasses.replace(train, upright=upright)
  return train, dataclasses.replace(evaluation, upright=upright)


def _open_tfds(data: Any, with_train: bool) -> tuple[Source | None, Source]:
  from t2t_vit_jax.data.tfds_source import open_tfds  # late: image folders need no tfds

  train = open_tfds(data.name, data.train_split, data.data_dir) if with_train else None
  return train, open_tfds(data.name, data.eval_split, data.data_dir)


def _open_digits(data: Any, with_train: bool) -> tuple[Source | None, Source]:
  if data.name != digits.NAME:
    raise UserError(f"data.name={data.name} needs data.source='tfds': add --config.data.source=tfds")
  return digits.open_digits(data.train_split) if with_train else None, digits.open_digits(data.eval_split)


def _open_folder(data: Any, with_train: bool) -> tuple[Source | None, Source]:
  if data.path is None:
    raise UserError("data.source='folder' needs --config.data.path=FOLDER")
  try:
    return _open_folder_splits(data, with_train)
  except LayoutError as error:
    if not has_class_folders(data.path):
      raise
    raise UserError(
      f'{error}; if the folders of {data.path} are its classes, add --config.data.train_split=. '
      '--config.data.eval_split=held_out --config.data.eval_fraction=0.2'
    ) from error


def _open_folder_splits(data: Any, with_train: bool) -> tuple[Source | None, Source]:
  if data.eval_fraction and (
    divided := open_divided_folder(data.path, data.train_split, data.eval_split, data.eval_fraction)
  ):
    return divided
  if not with_train and not os.path.isdir(os.path.join(os.path.expanduser(data.path), data.train_split)):
    return None, open_folder(data.path, data.eval_split)
  train = open_folder(data.path, data.train_split)  # its class folders give the labels
  return train, open_folder(data.path, data.eval_split, train.class_names)


# Openers by `data.source`: (`config.data`, whether the training split is wanted) -> training split, or None where it is
# not wanted, and evaluation split. docs/extending.md shows how to add one.
SOURCES: dict[str, Callable[[Any, bool], tuple[Source | None, Source]]] = {
  'tfds': _open_tfds,
  'folder': _open_folder,
  'digits': _open_digits,
}


def train_transform(config: Any) -> transforms.TrainTransform:
  """Crop and augmentations of `config.augment` that run on the host, in the published order.

  Raises:
    UserError: `config.augment.crop` or `config.data.interpolation` is unknown, or `config.data.fast_decode` needs
      another crop or another package.
  """
  augment, mean = config.augment, tuple(config.data.mean)
  randaugment = RandAugment(
    augment.randaugment_operations,
    augment.randaugment_magnitude,
    augment.randaugment_magnitude_std,
    augment.randaugment_probability,
    fill=tuple(round(255 * value) for value in (mean if len(mean) == 3 else 3 * mean)),
  )
  crop = choose(CROPS, 'augment.crop', augment.crop)(config)
  flip = transforms.RandomHorizontalFlip(augment.horizontal_flip_probability)
  return transforms.Chain(crop, (flip, randaugment), config.data.channels)


def _resized_crop(config: Any) -> transforms.TrainTransform:
  size, augment = config.data.image_size, config.augment
  return transforms.RandomResizedCrop(
    size, tuple(augment.crop_scale), tuple(augment.crop_ratio), fast=config.data.fast_decode
  )


def _padded_crop(config: Any) -> transforms.TrainTransform:
  if config.data.fast_decode:
    raise UserError("data.fast_decode is for augment.crop='resized' only")
  return transforms.RandomPaddedCrop(config.data.image_size, config.augment.crop_padding, _interpolation(config))


# Transforms from an encoded image to a crop of `data.image_size`, by `augment.crop`.
CROPS: dict[str, Callable[[Any], transforms.TrainTransform]] = {'resized': _resized_crop, 'padded': _padded_crop}


def eval_transform(config: Any) -> transforms.EvalTransform:
  """The evaluation transform of `config.data`."""
  data = config.data
  return transforms.ResizeCenterCrop(data.image_size, data.crop_fraction, _interpolation(config), data.channels)


def _interpolation(config: Any) -> str:
  name: str = config.data.interpolation
  choose(transforms.INTERPOLATIONS, 'data.interpolation', name)
  return name
