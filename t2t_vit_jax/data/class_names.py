"""Names of classes: readable ones for ImageNet's ids of WordNet synsets, and labels by name."""

from collections.abc import Iterator, Sequence
import functools
from importlib import resources
import unicodedata

from t2t_vit_jax.errors import UserError, printable


@functools.cache
def imagenet_names() -> dict[str, str]:
  """Words of the 1,000 classes of ImageNet-1k by id, such as 'tench, Tinca tinca' by 'n01440764', in label order.

  The words are WordNet's; `imagenet_names.tsv` has their source.
  """
  return {synset: name for synset, name in _rows('imagenet_names.tsv')}  # noqa: C416 (dict() takes other lengths too)


def _rows(file: str) -> Iterator[list[str]]:
  """Rows of a file of this folder, but for its comments."""
  text = (resources.files('t2t_vit_jax.data') / file).read_text(encoding='utf-8')
  return (line.split('\t') for line in text.splitlines() if not line.startswith('#'))


@functools.cache
def imagenet_subset(name: str) -> tuple[str, ...]:
  """Ids of the 200 classes of ImageNet-A ('a') or ImageNet-R ('r'), in the label order of ImageNet-1k.

  `imagenet_subsets.tsv` has their source.
  """
  return tuple(synset for synset, subsets in _rows('imagenet_subsets.tsv') if name in subsets.split())


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


def comparable(class_names: Sequence[str]) -> list[str]:
  """Class names in one form, to be compared: ImageNet's ids as words, and accented letters as one character."""
  names = imagenet_names()
  return [unicodedata.normalize('NFC', names.get(name, name)) for name in class_names]


def comparable_of_model(class_names: Sequence[str]) -> list[str]:
  """`comparable` for the classes of a model: other lists of ImageNet's words, in the same order, are ImageNet's."""
  own, names = list(imagenet_names().values()), comparable(class_names)
  if len(names) == len(own) and sum(map(str.__eq__, names, own)) > 0.9 * len(own):
    return own  # lists differ in the two cranes, and in other words for a class
  return names


def labels_by_name(class_names: Sequence[str], known: Sequence[str], origin: str) -> list[int]:
  """Label of each of `class_names` among the classes that a model knows.

  Args:
    class_names: of a dataset.
    known: of the model, in the order of its labels.
    origin: where `class_names` come from, for the message.

  Raises:
    UserError: the model does not know one of them, or knows two of that name.
  """
  of_model, names = comparable_of_model(known), comparable(class_names)
  labels = {name: label for label, name in enumerate(of_model)}
  if len(labels) < len(of_model) and (twice := [name for name in names if of_model.count(name) > 1]):
    raise UserError(f'the model has two classes {printable(twice[0])}, so those of {origin} cannot be told by name')
  unknown = [original for original, name in zip(class_names, names, strict=True) if name not in labels]
  if unknown:
    raise UserError(
      f"the model knows no class {_some(unknown)} of {origin}; its own are {_some(known)}: name the data's classes "
      "like the model's"
    )
  return [labels[name] for name in names]


def _some(names: Sequence[str]) -> str:
  return ', '.join(map(printable, names[:3])) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
