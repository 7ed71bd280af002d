"""Tiny tfds datasets of ImageNet's relatives, made by each builder's own `_info` and `_generate_examples`.

Only `_split_generators`, which would download, is replaced: it names raw data in the layout that the builder reads.
"""

from collections.abc import Callable, Sequence
import io
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from t2t_vit_jax.data.class_names import imagenet_names

IDS = tuple(imagenet_names())
Raw = dict[str, Any]  # arguments of `_generate_examples`


def _in_folders(
  argument: str, name_of: Callable[[int], str]
) -> Callable[[Path, Sequence[bytes], list[list[int]]], Raw]:
  """Raw data as FOLDER/<class>/<number>.jpg; `name_of` names the folder of a label."""

  def write(folder: Path, files: Sequence[bytes], labels: list[list[int]]) -> Raw:
    for number, (file, (label,)) in enumerate(zip(files, labels, strict=True)):
      (folder / name_of(label)).mkdir(parents=True, exist_ok=True)
      (folder / name_of(label) / f'{number:02d}.jpg').write_bytes(file)
    return {argument: str(folder)}

  return write


def _sketches(folder: Path, files: Sequence[bytes], labels: list[list[int]]) -> Raw:
  names = [f'sketch/{IDS[label]}/sketch_{number}.JPEG' for number, (label,) in enumerate(labels)]
  return {'archive': zip(names, map(io.BytesIO, files), strict=True)}


def _validation(files: Sequence[bytes]) -> list[tuple[str, io.BytesIO]]:
  """An archive as tfds iterates over it: names and open files, not in the order of the names."""
  names = [f'ILSVRC2012_val_{number + 1:08d}.JPEG' for number in range(len(files))]
  return list(zip(names, map(io.BytesIO, files), strict=True))[::-1]


def _reassessed(folder: Path, files: Sequence[bytes], labels: list[list[int]]) -> Raw:
  archive = _validation(files)
  names = sorted(name for name, _ in archive)
  original = dict.fromkeys(names, IDS[0])
  return {'archive': iter(archive), 'original_labels': original, 'real_labels': dict(zip(names, labels, strict=True))}


def _labelled(folder: Path, files: Sequence[bytes], labels: list[list[int]]) -> Raw:
  archive = _validation(files)
  names = sorted(name for name, _ in archive)
  return {
    'archive': iter(archive),
    'validation_labels': {name: IDS[x] for name, (x,) in zip(names, labels, strict=True)},
  }


DATASETS = {  # our name -> dataset, split, what writes its raw data
  'val': ('imagenet2012', 'validation', _labelled),
  'real': ('imagenet2012_real', 'validation', _reassessed),
  'v2': ('imagenet_v2/matched-frequency', 'test', _in_folders('imagenet_v2_root', str)),
  'a': ('imagenet_a', 'test', _in_folders('imagenet_a_root', IDS.__getitem__)),
  'r': ('imagenet_r', 'test', _in_folders('imagenet_r_root', IDS.__getitem__)),
  'sketch': ('imagenet_sketch', 'test', _sketches),
  'c/fog/3': ('imagenet2012_corrupted/fog_3', 'validation', _labelled),
}


def prepare(name: str, data_dir: Path, raw: Path, files: Sequence[bytes], labels: list[list[int]]) -> None:
  """Prepares a set of `DATASETS` from JPEG files and their labels, one each but for 'real'."""
  dataset, split, write = DATASETS[name]
  builder = tfds.builder(dataset, data_dir=str(data_dir))
  generator = tfds.core.SplitGenerator(name=split, gen_kwargs=write(raw, files, labels))
  builder._split_generators = lambda manager: [generator]
  if dataset.startswith('imagenet2012_corrupted'):  # its own would corrupt them, by libraries that need not be here
    builder._generate_examples = super(type(builder), builder)._generate_examples
  builder.download_and_prepare(file_format='array_record')
