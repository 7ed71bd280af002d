"""The digits of the package: scikit-learn's, each once, whatever the way in which they are read."""

import collections
import io
import pickle

import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from t2t_vit_jax import UserError
from t2t_vit_jax.data import pipeline
from t2t_vit_jax.data.digits import open_digits
from t2t_vit_jax.data.tfds_source import open_tfds
from tests.test_training_loop import small_config

SPLITS = ('train', 'test')


def test_digits_are_scikit_learns_images_each_once():
  digits, seen = load_digits(), {}
  for split in SPLITS:
    source = open_digits(split)
    for i in range(len(source)):
      record = source[i]
      index = int(record.id.removeprefix('digit_').removesuffix('.png'))
      assert index not in seen
      seen[index] = record.label
      pixels = np.asarray(Image.open(io.BytesIO(record.image)))
      np.testing.assert_array_equal(np.round(pixels / 255 * 16), digits.images[index])
  assert [seen[i] for i in range(len(digits.target))] == digits.target.tolist()


def test_digits_are_split_with_equal_shares_as_by_scikit_learn():
  labels = load_digits().target
  train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
  for split, numbers in zip(SPLITS, (train, test), strict=True):
    source = open_digits(split)
    assert [source[i].id for i in range(len(source))] == [f'digit_{number:04d}.png' for number in sorted(numbers)]
  counts = collections.Counter(open_digits('test')[i].label for i in range(360))
  assert all(abs(counts[label] - 360 * np.mean(labels == label)) < 1 for label in range(10))


@pytest.mark.parametrize('split', SPLITS)
def test_as_a_tfds_dataset_they_are_the_same(data_dir, split):
  ours, theirs = open_digits(split), open_tfds('digits', split, data_dir)
  by_name = {record.id: record for record in map(theirs.__getitem__, range(len(theirs)))}
  assert by_name == {record.id: record for record in map(ours.__getitem__, range(len(ours)))}
  assert ours.class_names == theirs.class_names == tuple('0123456789')


def test_workers_get_no_images_and_the_same_split():
  source = open_digits('test')
  content = pickle.dumps(source)
  assert len(content) < 1000
  assert pickle.loads(content)[359] == source[359]
  assert pickle.loads(content).fingerprint() == source.fingerprint() != open_digits('train').fingerprint()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data.eval_split': 'tset'}, "^digits has no split 'tset': did you mean 'test'"),
    ({'data.name': 'cifar10'}, r'^data\.name=cifar10 needs .* --config\.data\.source=tfds$'),
    ({'data.path': 'photos'}, r"^data\.path is for data\.source='folder', not 'digits'"),
  ],
)
def test_fields_that_ask_for_other_data_are_refused(changes, message):
  config = small_config(None, **{'data.source': 'digits', 'data.orientation': 'ignored', **changes})
  with pytest.raises(UserError, match=message):
    pipeline.open_sources(config.data)
