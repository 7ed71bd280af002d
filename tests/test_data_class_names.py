"""Names of ImageNet's classes: their order, their source, and where they are used."""

import json

import pytest
import tensorflow_datasets as tfds

from docs.imagenet_names import class_names
from t2t_vit_jax import UserError
from t2t_vit_jax.data.class_names import imagenet_names, imagenet_subset, labels_by_name, readable_names
from tests.golden import DATA


def test_names_have_the_ids_and_the_order_of_tfds():
  synsets = tfds.core.tfds_path('datasets/imagenet2012/labels.txt').read_text().split()
  assert list(imagenet_names()) == synsets


def test_names_are_those_that_everyone_knows_by_their_label():
  names = readable_names(None, 1000)
  assert names[0] == 'tench, Tinca tinca'
  assert names[207] == 'golden retriever'
  assert names[999] == 'toilet tissue, toilet paper, bathroom tissue'
  assert len(set(names)) == 1000
  assert [name for name in names if name.startswith('crane')] == ['crane (wading bird)', 'crane (lifting device)']


def test_subsets_are_those_of_their_authors():
  ids = list(imagenet_names())
  for name, labels in json.loads((DATA / 'imagenet_subsets.json').read_text()).items():
    assert [ids.index(synset) for synset in imagenet_subset(name)] == labels
    assert len(labels) == 200


def test_ids_become_words_and_other_names_stay():
  assert readable_names(('n02102040', 'n01440764', 'Oma'), 3) == (
    'English springer, English springer spaniel',
    'tench, Tinca tinca',
    'Oma',
  )
  assert readable_names(None, 3) == ('class 0', 'class 1', 'class 2')
  thousand = tuple(f'sort {i}' for i in range(1000))
  assert readable_names(thousand, 1000) == thousand


def test_names_are_read_from_wordnets_file():
  file = '  1 licence  \n'
  starts = {}

  def add(key, words, hypernym):
    """Appends an entry: number of words, and after each of them its sense, in hexadecimal digits."""
    nonlocal file
    starts[key] = f'n{len(file):08d}'
    senses = ' '.join(f'{word} 0' for word in words)
    pointers = f'003 #m 00000001 n 0000 @ {starts[hypernym][1:] if hypernym else "00000000"} n 0000 ~ 00000002 n 0000'
    file += f'{len(file):08d} 05 n {len(words):02x} {senses} {pointers} | a gloss; "with @ | and more"  \n'

  add('bird', ['wading_bird', 'wader'], None)
  add('crane', ['crane'], 'bird')
  add('device', ['lifting_device'], None)
  add('machine', ['crane'], 'device')
  add('eleven', [f'word_{i}' for i in range(11)], 'device')
  ids = [starts[key] for key in ('crane', 'machine', 'eleven')]
  expected = ['crane (wading bird)', 'crane (lifting device)', ', '.join(f'word {i}' for i in range(11))]
  assert class_names(ids, file.encode()) == expected


def test_labels_are_found_by_name():
  assert labels_by_name(('10', '1', '2'), ('1', '2', '10'), 'DIR') == [2, 0, 1]
  assert labels_by_name(
    ('n02102040', 'cafe\u0301'), ('caf\u00e9', 'English springer, English springer spaniel'), 'DIR'
  ) == [1, 0]
  with pytest.raises(UserError, match=r'the model knows no class two, three of DIR; its own are one, 2'):
    labels_by_name(('one', 'two', 'three'), ('one', '2'), 'DIR')


def test_other_lists_of_imagenets_words_are_imagenets():
  """In mmpretrain both cranes are just cranes."""
  words = ['crane' if name.startswith('crane') else name for name in imagenet_names().values()]
  synsets = list(imagenet_names())
  assert labels_by_name(synsets, words, 'DIR') == list(range(1000))


def test_two_classes_of_one_name_are_refused():
  with pytest.raises(UserError, match='the model has two classes crane, so those of DIR cannot be told by name'):
    labels_by_name(('crane', 'dog'), ('crane', 'dog', 'crane'), 'DIR')
  assert labels_by_name(('dog',), ('crane', 'dog', 'crane'), 'DIR') == [1]
