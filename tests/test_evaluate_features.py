"""Features of a split: those of the model, kept in a file for as long as nothing changes."""

import dataclasses
import math
import os
import resource
import shutil
import sys

import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax.data.loader import Share, Workers
from t2t_vit_jax.data.sources import open_folder
from t2t_vit_jax.data.tfds_source import open_tfds
from t2t_vit_jax.data.transforms import ResizeCenterCrop
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.evaluate.features import Features, cached_features, extract
from t2t_vit_jax.predict import open_classifier
from t2t_vit_jax.recipe.sharding import make_mesh
from tests import golden
from tests.image_folder import write_image_folder
from tests.parameters import slow
from tests.processes import ROOT, finish, free_port, start_command

CLASSES = ('ant', 'bee', 'cat')
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
  """The golden performer, 64 px."""
  return open_classifier(golden.converted('performer', tmp_path_factory.mktemp('weights')))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Three classes; in train, with seven images each, two cannot be read."""
  folder = write_image_folder(tmp_path_factory.mktemp('data'), CLASSES, train=7, val=2)
  for name in ('ant/3.JPEG', 'cat/6.JPEG'):
    (folder / 'train' / name).write_bytes(b'no picture')
  return folder


@pytest.fixture(scope='module')
def expected(classifier, folder):
  """Features of each image of train that can be read, computed by itself."""
  rows = []
  for label, name in enumerate(CLASSES):
    for path in sorted((folder / 'train' / name).iterdir()):
      if f'{name}/{path.name}' in ('ant/3.JPEG', 'cat/6.JPEG'):
        continue
      pixels = np.asarray(ResizeCenterCrop(64, 0.9, 'bicubic')(Image.open(path)), np.float32)
      images = ((pixels / 255 - MEAN) / STD)[None]
      cls, tokens = golden.apply(classifier.model, classifier.variables, images, features=True)
      rows.append((cls[0], np.asarray(tokens[0]).reshape(-1, 64).mean(0), label))
  return Features(*map(np.array, zip(*rows, strict=True)))


def mesh(devices):
  return make_mesh(ConfigDict({'data': devices, 'fsdp': 1}))


def extracted(classifier, source, batch_size=8, devices=1, warn=print, progress=lambda count: None):
  parts = (classifier.model, classifier.variables, classifier.prepare, classifier.normalize)
  return extract(*parts, source, Share(batch_size), Workers(num_threads=2), mesh(devices), warn, progress)


@pytest.mark.parametrize('devices', [slow(1), 2])
@pytest.mark.parametrize('batch_size', [slow(1), 7, slow(64)])
def test_features_are_the_models_in_any_batch(classifier, folder, expected, batch_size, devices):
  lines, counts = [], []
  features = extracted(classifier, open_folder(folder, 'train'), batch_size, devices, lines.append, counts.append)
  assert [x.dtype for x in features] == [np.float32, np.float32, np.int32]
  assert features.label.tolist() == [0] * 6 + [1] * 7 + [2] * 6
  np.testing.assert_allclose(features.cls, expected.cls, atol=1e-5)
  np.testing.assert_allclose(features.mean, expected.mean, atol=1e-5)
  assert lines == [
    f'image {name} cannot be read (no image file); it is left out' for name in ('ant/3.JPEG', 'cat/6.JPEG')
  ]
  assert sum(counts) == 21
  assert len(counts) == math.ceil(21 / (math.ceil(batch_size / devices) * devices))


def test_both_splits_take_one_program(classifier, folder, caplog):
  with jax.log_compiles(True):
    for split in ('train', 'val'):
      extracted(classifier, open_folder(folder, split), batch_size=5, warn=lambda line: None)
  assert len([text for text in caplog.messages if text.startswith('Compiling jit(step)')]) == 1


def test_images_that_cannot_be_read_are_counted(classifier, tmp_path):
  (tmp_path / 'train' / 'ant').mkdir(parents=True)
  for i in range(23):
    (tmp_path / 'train' / 'ant' / f'{i}.png').write_bytes(b'no picture')
  lines, source = [], open_folder(tmp_path, 'train')
  with pytest.raises(UserError, match=rf'^no image of {source.description} can be read$'):
    extracted(classifier, source, warn=lines.append)
  assert len(lines) == 21
  assert lines[-1] == f'3 more images of {source.description} cannot be read; they are left out'


def test_damaged_weights_get_one_line(classifier, folder):
  damaged = dataclasses.replace(classifier, variables=jax.tree.map(lambda x: x * np.nan, classifier.variables))
  with pytest.raises(UserError, match='the weights give features that are not finite'):
    extracted(damaged, open_folder(folder, 'val'))


IN_PROCESSES = """
import sys
import jax, numpy as np
from ml_collections import ConfigDict
from pathlib import Path
from t2t_vit_jax.data.loader import Share, Workers
from t2t_vit_jax.data.sources import open_folder
from t2t_vit_jax.evaluate.features import cached_features, extract
from t2t_vit_jax.predict import open_classifier
from t2t_vit_jax.recipe.sharding import make_mesh

weights, folder, count, process, port, output = sys.argv[1:]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'localhost:{port}', 2, int(process))
c, mesh, lines = open_classifier(weights), make_mesh(ConfigDict({'data': -1, 'fsdp': 1})), []
def compute():
  share = Share(8, int(process), 2)
  source = open_folder(folder, 'train')
  return extract(c.model, c.variables, c.prepare, c.normalize, source, share, Workers(), mesh, lines.append)
file = Path(output).parent / f'cache{process}.npz'  # each has its own disk
for _ in range(2):
  features = cached_features(file, {}, compute, int(count), lines.append, lines.append)
np.savez(output, **features._asdict())
print(len(lines), file.exists())
"""


@pytest.mark.slow
def test_each_process_gets_all_rows(tmp_path, folder, expected):
  weights, port = golden.converted('performer', tmp_path), free_port()
  outputs = [tmp_path / f'{i}.npz' for i in range(2)]
  command = [sys.executable, '-c', IN_PROCESSES, weights, folder, len(expected.label)]
  results = finish([start_command(*command, i, port, outputs[i], cwd=ROOT) for i in range(2)])
  # Each names its own unreadable image, in both passes, since the second process finds no file.
  said = [(code, output.splitlines()[-1]) for code, output, _ in results]
  assert said == [(0, '2 True'), (0, '2 False')], results
  for path in outputs:
    with np.load(path) as features:
      assert features['label'].tolist() == expected.label.tolist()
      np.testing.assert_allclose(features['cls'], expected.cls, atol=1e-5)
      np.testing.assert_allclose(features['mean'], expected.mean, atol=1e-5)


def some_features(seed=0, count=6):
  rng = np.random.default_rng(seed)
  cls, mean = rng.normal(size=(2, count, 4)).astype(np.float32)
  return Features(cls, mean, np.arange(count, dtype=np.int32) % 3)


class Cache:
  """Calls `cached_features`, and keeps what it said and how often it computed."""

  def __init__(self, file):
    self.file, self.computed, self.notes, self.warnings = file, 0, [], []

  def __call__(self, key, features=None):
    features = features or some_features()

    def compute():
      self.computed += 1
      return features

    return cached_features(self.file, key, compute, len(features.label), self.notes.append, self.warnings.append)


def same(features, others):
  return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(features, others, strict=True))


def test_features_are_computed_once_for_each_key(tmp_path):
  cache = Cache(tmp_path / 'new' / 'train.npz')
  key = {'weights': 'abc', 'size': (64, 64), 'data': 'ü'}
  assert same(cache(key), some_features())
  assert (cache.computed, cache.notes) == (1, [])
  assert same(cache(key), some_features())
  assert (cache.computed, cache.notes) == (1, [f'features are read from {cache.file}'])
  assert same(cache({**key, 'weights': 'abd', 'size': 64}, some_features(1)), some_features(1))
  assert cache.computed == 2
  assert cache.notes[1:] == [f'{cache.file} was computed with other size, weights: the features are computed anew']
  assert same(cache({**key, 'weights': 'abd', 'size': 64}), some_features(1))
  assert (cache.computed, cache.warnings) == (2, [])
  assert list(cache.file.parent.iterdir()) == [cache.file]


def test_features_without_some_of_the_images_are_not_kept(tmp_path):
  file = tmp_path / 'train.npz'
  cached_features(file, {}, some_features, 7, print, print)
  assert not file.exists()
  cached_features(file, {}, some_features, 6, print, print)
  assert file.exists()


def test_no_damage_goes_unnoticed(tmp_path):
  cache = Cache(tmp_path / 'train.npz')
  features = some_features(count=40)
  cache({'weights': 'abc'}, features)
  whole = cache.file.read_bytes()
  damaged = [whole[:length] for length in (0, 10, len(whole) // 2, len(whole) - 1)] + [b'no archive', whole[::-1]]
  for position in range(0, len(whole), 15):
    damaged.append(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
  computed = 0
  for content in damaged:
    cache.file.write_bytes(content)
    assert same(cache({'weights': 'abc'}, features), features)
    computed += cache.computed > 1
    assert cache.warnings == []
    cache.computed = 1
  assert computed > 0.8 * len(damaged)  # the rest lies where nothing depends on it, such as times in the archive
  cache.file.unlink()
  assert same(cache({'weights': 'abc'}, features), features)
  assert cache.computed == 2


def test_a_file_with_pickles_is_not_opened(tmp_path):
  cache = Cache(tmp_path / 'train.npz')
  objects = np.array([{}], object)
  np.savez(cache.file, key=np.array('{}'), cls=objects, mean=objects, label=objects)
  assert same(cache({}), some_features())
  (line,) = cache.notes
  assert line.startswith(f'{cache.file} cannot be read (ValueError: ')


def test_a_full_disk_costs_the_file_but_not_the_features(tmp_path):
  cache = Cache(tmp_path / 'train.npz')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # bytes
  try:
    assert same(cache({}), some_features())
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  (line,) = cache.warnings
  assert line.startswith(f'{cache.file}: cannot be written: File too large; ')
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_the_file_but_not_the_features(tmp_path):
  (tmp_path / 'file').touch()
  cache = Cache(tmp_path / 'file' / 'train.npz')
  assert same(cache({}), some_features())
  assert len(cache.warnings) == 1


def test_the_fingerprint_of_a_folder_changes_with_its_files(folder, tmp_path):
  def fingerprint(**changes):
    return dataclasses.replace(open_folder(copy, 'train'), **changes).fingerprint()

  copy = shutil.copytree(folder, tmp_path / 'copy')
  own, image = open_folder(folder, 'train').fingerprint(), copy / 'train' / 'bee' / '0.JPEG'
  assert fingerprint() == own  # the copy has the same times
  assert fingerprint(upright=True) != own
  assert fingerprint(class_names=('ant', 'bee', 'dog')) != own
  others = {open_folder(copy, 'train').with_classes(names).fingerprint() for names in (CLASSES, CLASSES[::-1])}
  assert own in others
  assert len(others) == 2
  status = image.stat()
  os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  later = fingerprint()
  assert later != own
  content = image.read_bytes()
  image.write_bytes(content + b'\0')
  os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
  assert fingerprint() not in (own, later)
  image.write_bytes(content)
  os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
  assert fingerprint() == own
  opened = open_folder(copy, 'train')
  image.unlink()
  assert opened.fingerprint() != own
  assert fingerprint() not in (own, opened.fingerprint())


def test_the_fingerprint_of_a_tfds_split_changes_with_its_files(data_dir, tmp_path):
  def fingerprint(split):
    return open_tfds('digits', split, str(tmp_path)).fingerprint()

  open_tfds('digits', 'train', data_dir)  # prepares it
  shutil.copytree(f'{data_dir}/digits', tmp_path / 'digits')
  own = [fingerprint(split) for split in ('train', 'test', 'train[:100]', 'train[100:200]')]
  assert len(set(own)) == 4
  assert own[0] == open_tfds('digits', 'train', data_dir).fingerprint()
  (file,) = (tmp_path / 'digits').glob('*/digits-train.array_record*')
  os.utime(file, ns=(0, 0))
  assert fingerprint('train') != own[0]
  assert fingerprint('test') == own[1]
