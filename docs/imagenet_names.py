"""Writes t2t_vit_jax/data/imagenet_names.tsv: `python -m docs.imagenet_names WORDNET/data.noun`.

ImageNet's classes are nouns of WordNet 3.0: the number in a class's id is where its entry begins in WordNet's file of
nouns. On Debian, `apt-get install wordnet-base` puts that file at /usr/share/wordnet/data.noun.
"""

from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
import sys

OUTPUT = Path(__file__).parents[1] / 't2t_vit_jax' / 'data' / 'imagenet_names.tsv'
LABELS = resources.files('tensorflow_datasets') / 'datasets' / 'imagenet2012' / 'labels.txt'
HEADER = """\
# The classes of ImageNet-1k in the order of their labels: WordNet id, and the words of that synset.
# Written by docs/imagenet_names.py. Ids: tensorflow-datasets, datasets/imagenet2012/labels.txt. Words: WordNet 3.0,
# data.noun of the Debian package wordnet-base 1:3.0-37; where two classes have the same words, with a word of the
# synset above in brackets.
#
"""


def class_names(ids: Sequence[str], nouns: bytes) -> list[str]:
  """The words of each id, such as 'tench, Tinca tinca' for 'n01440764'.

  Args:
    ids: 'n' and the place of an entry in `nouns`.
    nouns: WordNet's `data.noun`; man page wndb(5WN) describes it.
  """
  entries = [_entry(nouns, int(synset[1:])) for synset in ids]
  names = [', '.join(words) for words, _ in entries]
  counts = Counter(names)
  return [
    name if counts[name] == 1 else f'{name} ({_entry(nouns, above)[0][0]})'
    for name, (_, above) in zip(names, entries, strict=True)
  ]


def _entry(nouns: bytes, start: int) -> tuple[list[str], int]:
  """Words of the entry that begins there, and the place of its hypernym's."""
  fields = nouns[start : nouns.index(b'\n', start)].decode().split(' ')
  num_words = int(fields[3], 16)
  words = [word.replace('_', ' ') for word in fields[4 : 4 + 2 * num_words : 2]]
  pointers = fields[5 + 2 * num_words : fields.index('|')]
  return words, int(pointers[pointers.index('@') + 1])


def licence(nouns: bytes) -> str:
  """WordNet's, which must go with copies: the file begins with it, on lines that are indented and numbered."""
  lines = [line for line in nouns.decode().splitlines() if line.startswith('  ')]
  return ''.join(f'# {line.split(maxsplit=1)[1].strip()}\n' if line.split()[1:] else '#\n' for line in lines)


if __name__ == '__main__':
  data = Path(sys.argv[1]).read_bytes()
  synsets = LABELS.read_text().split()
  rows = [f'{synset}\t{name}\n' for synset, name in zip(synsets, class_names(synsets, data), strict=True)]
  OUTPUT.write_text(HEADER + licence(data) + ''.join(rows))
