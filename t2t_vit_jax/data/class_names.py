"""Readable names of classes: datasets and weights name ImageNet's by ids of WordNet synsets, or not at all."""

from collections.abc import Sequence
import functools
from importlib import resources


@functools.cache
def imagenet_names() -> dict[str, str]:
  """Words of the 1,000 classes of ImageNet-1k by id, such as 'tench, Tinca tinca' by 'n01440764', in label order.

  The words are WordNet's; `imagenet_names.tsv` has their source.
  """
  text = (resources.files('t2t_vit_jax.data') / 'imagenet_names.tsv').read_text(encoding='utf-8')
  rows = (line.split('\t') for line in text.splitlines() if not line.startswith('#'))
  return {synset: name for synset, name in rows}  # noqa: C416 (dict() would take rows of any length for pairs)


def readable_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
  """One readable name for each class.

  Args:
    class_names: names stored with the weights. ImageNet's ids, which tfds and image folders have, become words; other
      names stay. None if there are none: 1,000 classes are then ImageNet's, as in every published file.
    num_classes: number of classes of the model.
  """
  names = imagenet_names()
  if class_names is None:
    class_names = tuple(names) if num_classes == len(names) else [f'class {label}' for label in range(num_classes)]
  return tuple(names.get(name, name) for name in class_names)
