"""Figures of each of ImageNet's relatives against plain NumPy, from the logits of each picture by itself."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax import T2TViT, UserError
from t2t_vit_jax.conversion.weight_format import Weights, write_weights
from t2t_vit_jax.data.class_names import imagenet_names, imagenet_subset
from t2t_vit_jax.evaluate.accuracy import Options, Runner, fit, open_candidate
from t2t_vit_jax.evaluate.results import corruption_row
from t2t_vit_jax.evaluate.sets import ALEXNET_ERRORS, SETS, expand, open_folder_set, open_set
from t2t_vit_jax.models.t2t_vit import ARCHITECTURE
from t2t_vit_jax.models.variants import DataDefaults
from t2t_vit_jax.recipe.sharding import make_mesh
from tests import golden, imagenet_sets
from tests.image_folder import encoded
from tests.parameters import slow

IDS = tuple(imagenet_names())
NUM_IMAGES = 23  # no batch size divides it
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
MODEL = T2TViT(**{**golden.TINY, 'num_classes': 1000, 'image_size': 32, 'depth': 1})


def write_classifier(path, class_names=None, **data):
  """A weight file of a small classifier of 1,000 classes at random, whose guesses differ from picture to picture."""
  variables = golden.random_variables(MODEL, jnp.zeros((1, 32, 32, 3)))
  arrays = {
    f'{group}/{"/".join(key.key for key in keys)}': leaf
    for group, tree in variables.items()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  arguments = {field: getattr(MODEL, field) for field in (*ARCHITECTURE, 'image_size', 'num_classes')}
  data = {**dataclasses.asdict(DataDefaults()), 'image_size': 32, 'crop_fraction': 1.0, **data}
  write_weights(Weights(arrays, None, arguments, 3, data, class_names, {'weights': None}), path)
  return variables


@pytest.fixture(scope='module')
def files():
  """JPEG files of random pictures of the model's size: nothing is resized."""
  rng = np.random.default_rng(0)
  small = rng.integers(0, 256, (NUM_IMAGES, 4, 4, 3), np.uint8)
  return [encoded(Image.fromarray(pixels).resize((32, 32)), 'JPEG', quality=95) for pixels in small]


@pytest.fixture(scope='module')
def classifier(tmp_path_factory, files):
  """A weight file, and the logits of each picture, (23, 1000) float64."""
  path = tmp_path_factory.mktemp('weights') / 'weights.safetensors'
  variables = write_classifier(path)
  pixels = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
  logits = [golden.apply(MODEL, variables, ((x / 255 - MEAN) / STD).astype(np.float32)[None])[0] for x in pixels]
  return path, np.asarray(logits, np.float64)


def labels_of(logits, classes):
  """A label for each picture: the best of `classes`, the third best, or one of them at random."""
  rng = np.random.default_rng(1)
  ranked = [sorted(classes, key=lambda label: -row[label]) for row in logits]
  return [ranked[i][(0, 2, rng.integers(len(classes)))[i % 3]] for i in range(len(logits))]


def figures(logits, label_sets, classes):
  """Correct, correct in five, images and loss by a loop over pictures with Python's own sorting and sums."""
  top1 = top5 = count = loss = 0
  for row, labels in zip(logits, label_sets, strict=True):
    labels = [label for label in labels if label in classes]
    if labels:
      ranked = sorted(classes, key=lambda label: -row[label])
      probabilities = np.exp(row[ranked]) / np.exp(row[ranked]).sum()
      count, top1, top5 = count + 1, top1 + (ranked[0] in labels), top5 + any(x in labels for x in ranked[:5])
      loss -= np.log(sum(probabilities[ranked.index(label)] for label in set(labels)))
  return top1, top5, count, loss


def write_set(folder, files, names, file_names=None):
  """Writes `folder/<class>/<file>` for each picture, of a class each."""
  file_names = file_names or [f'{i:02d}.jpg' for i in range(len(files))]
  for file, name, file_name in zip(files, names, file_names, strict=True):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / file_name).write_bytes(file)


@pytest.fixture(scope='module')
def data(tmp_path_factory, classifier, files):
  """A data folder with unpacked archives; and by set the labels of each picture and the classes that are scored."""
  root, (_, logits), everything = tmp_path_factory.mktemp('data'), classifier, range(1000)
  expected = {}
  names = [f'ILSVRC2012_val_{i + 1:08d}.JPEG' for i in range(NUM_IMAGES)]
  labels = labels_of(logits, everything)
  write_set(root / 'val', files, [IDS[label] for label in labels], names)
  expected['val'] = [[label] for label in labels], everything
  ranked = np.argsort(-logits, axis=1)
  several = [[], [int(ranked[1][0]), 3], [5, int(ranked[2][4])], [7, 8], [int(ranked[4][0])]] * 5
  (root / 'real.json').write_text(json.dumps(several[:NUM_IMAGES] + [[1]] * 10))
  expected['real'] = several[:NUM_IMAGES], everything
  write_set(root / 'imagenetv2-matched-frequency-format-val', files, map(str, labels))
  expected['v2'] = expected['val']
  for name in 'ar':
    classes = [IDS.index(synset) for synset in imagenet_subset(name)]
    labels = labels_of(logits, classes)
    outside = next(label for label in everything if label not in classes)
    labels[5] = outside  # does not belong there
    write_set(root / f'imagenet-{name}', files, [IDS[label] for label in labels])
    expected[name] = [[label] for label in labels], classes
  write_set(root / 'sketch', files, [IDS[labels[0]]] * NUM_IMAGES)
  expected['sketch'] = [[labels[0]]] * NUM_IMAGES, everything
  write_set(root / 'imagenet-c' / 'fog' / '3', files, [IDS[label] for [label] in expected['val'][0]])
  expected['c/fog/3'] = expected['val']
  return str(root), expected


def run(path, name, data_dir, num_devices=1, **options):
  options = Options(allow_missing_classes=True, num_workers=0, **options)
  mesh = make_mesh(ConfigDict({'data': -1, 'fsdp': 1}), jax.devices()[:num_devices])
  pair = fit(open_candidate(str(path)), open_set(name, data_dir), options)
  return Runner(pair.candidate, options, mesh)(pair, print, lambda number: None)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory, files, data):
  """The same sets as tfds prepares them, in a data folder without unpacked archives."""
  root = tmp_path_factory.mktemp('prepared')
  for name, (label_sets, _) in data[1].items():
    imagenet_sets.prepare(name, root, tmp_path_factory.mktemp('raw'), files, label_sets)
  return str(root), data[1]


BATCHES = [(7, 2), slow(1, 1), slow(64, 2)]


@pytest.mark.parametrize(('batch_size', 'num_devices'), BATCHES)
@pytest.mark.parametrize('name', ['val', 'real', slow('v2'), 'a', slow('r'), slow('sketch'), slow('c/fog/3')])
def test_figures_equal_numpy(classifier, data, name, batch_size, num_devices):
  check_figures(classifier, data, name, num_devices, batch_size)


@pytest.mark.slow
@pytest.mark.needs('tensorflow')
@pytest.mark.parametrize(('batch_size', 'num_devices'), BATCHES)
@pytest.mark.parametrize('name', ['val', 'real', 'v2', 'a', 'r', 'sketch', 'c/fog/3'])
def test_figures_of_datasets_of_tfds_equal_numpy(classifier, prepared, name, batch_size, num_devices):
  row = check_figures(classifier, prepared, name, num_devices, batch_size)
  dataset = imagenet_sets.DATASETS[name][0]
  assert re.fullmatch(rf'{dataset}/\d+\.\d+\.\d+ (validation|test)', row['version'])


def check_figures(classifier, data, name, num_devices, batch_size):
  path, logits = classifier
  data_dir, expected = data
  label_sets, classes = expected[name]
  top1, top5, count, loss = figures(logits, label_sets, classes)
  if name != 'sketch':
    assert 0 < top1 < top5 < count
  row = run(path, name, data_dir, num_devices, batch_size=batch_size)
  assert (row['correct'], row['correct_top5'], row['count'], row['unreadable']) == (top1, top5, count, 0)
  assert row['left_out'] == NUM_IMAGES - count == {'real': 5, 'a': 1, 'r': 1}.get(name, 0)
  assert (row['top1'], row['scored_classes']) == (top1 / count, len(classes))
  assert row['loss'] == pytest.approx(loss / count, rel=1e-5)
  return row


@pytest.mark.slow
def test_a_subset_is_scored_over_all_classes_on_request(classifier, data):
  path, logits = classifier
  data_dir, expected = data
  label_sets, classes = expected['a']
  top1, top5, count, _ = figures(logits, label_sets, range(1000))
  assert count == NUM_IMAGES
  assert top1 < figures(logits, label_sets, classes)[0]
  row = run(path, 'a', data_dir, all_classes=True)
  assert (row['correct'], row['correct_top5'], row['count'], row['scored_classes']) == (top1, top5, count, 1000)


@pytest.mark.slow
def test_images_that_cannot_be_read_count_as_wrong(classifier, files, tmp_path, capsys):
  path, logits = classifier
  best = [int(row.argmax()) for row in logits]
  names = [f'ILSVRC2012_val_{i + 1:08d}.JPEG' for i in range(NUM_IMAGES)]
  write_set(tmp_path / 'val', files, [IDS[label] for label in best], names)
  (tmp_path / 'val' / IDS[best[3]] / names[3]).write_bytes(b'no picture')
  (tmp_path / 'real.json').write_text(json.dumps([[label] for label in best]))
  for name in ('val', 'real'):
    row = run(path, name, str(tmp_path), batch_size=8)
    assert (row['correct'], row['count'], row['unreadable']) == (NUM_IMAGES - 1, NUM_IMAGES, 1)
    assert f'{names[3]} cannot be read' in capsys.readouterr().out


def test_corrupted_images_are_not_cropped_again(classifier, files, tmp_path):
  _, logits = classifier
  path = tmp_path / 'weights.safetensors'
  write_classifier(path, crop_fraction=0.5)
  names = [IDS[row.argmax()] for row in logits]
  write_set(tmp_path / 'imagenet-c' / 'fog' / '3', files, names)
  write_set(tmp_path / 'val', files, names)
  row = run(path, 'c/fog/3', str(tmp_path))
  assert (row['correct'], row['crop_fraction']) == (NUM_IMAGES, 1.0)
  assert run(path, 'val', str(tmp_path))['correct'] < NUM_IMAGES


def test_mean_corruption_error_is_the_published_formula():
  """By the definition of Hendrycks and Dietterich: errors summed over severities, as a share of AlexNet's."""
  rng = np.random.default_rng(0)
  accuracies = rng.uniform(0.1, 0.9, (15, 5))
  facts = dict(weights='w', sha256='', model=None, parameters=1, bytes=1, image_size=224, dtype='float32')
  facts |= dict(version='imagenet2012_corrupted/x', count=10, unreadable=0, left_out=0, images_per_second=1.0, top5=1.0)
  rows = [
    {**facts, 'set': f'c/{name}/{severity}', 'corruption': (name, severity), 'top1': accuracies[i, severity - 1]}
    for i, name in enumerate(ALEXNET_ERRORS)
    for severity in range(1, 6)
  ]
  found = corruption_row(rows)
  alexnet = np.array(list(ALEXNET_ERRORS.values()))
  expected = np.mean((5 - accuracies.sum(axis=1)) / (5 * alexnet))
  assert found['mean_corruption_error'] == pytest.approx(expected, rel=1e-12)
  assert found['top1'] == pytest.approx(accuracies.mean(), rel=1e-12)
  assert found['corruptions']['fog']['top1'] == list(accuracies[9])
  assert corruption_row(rows[1:])['mean_corruption_error'] is None  # a part is missing
  assert corruption_row(rows[1:])['corruptions']['shot_noise']['error'] == found['corruptions']['shot_noise']['error']
  # AlexNet's own mean error makes 100 %.
  own = [{**row, 'top1': 1 - ALEXNET_ERRORS[row['set'].split('/')[1]]} for row in rows]
  assert corruption_row(own)['mean_corruption_error'] == pytest.approx(1)


def test_names_of_sets():
  assert expand(['val', 'c/fog', 'val']) == ['val', *(f'c/fog/{severity}' for severity in range(1, 6))]
  assert len(expand(['c'])) == 75
  assert set(expand(['c', 'a'])) <= SETS.keys()
  assert expand(['imagenet-a', 'imagenet_v2/topimages']) == ['a', 'v2-top']


def test_other_classes_and_missing_data_get_one_line(classifier, data, tmp_path):
  path, data_dir = classifier[0], data[0]
  with pytest.raises(
    UserError, match=r'^a is not in .*/imagenet-a/CLASS/IMAGE, or prepare it with: t2t-vit prepare imagenet_a '
  ):
    open_set('a', str(tmp_path))
  with pytest.raises(UserError, match=r'^real is not in .*: put real.json of https://\S+ into .*, beside val'):
    open_set('real', str(tmp_path))
  with pytest.raises(UserError, match=r"tfds has no dataset 'vall'.*; sets are val, real, v2"):
    open_set('vall', data_dir)
  with pytest.raises(UserError, match=r'weights.safetensors on val: .*/val lacks 9\d\d of the 1000 classes, such as'):
    fit(open_candidate(str(path)), open_set('val', data_dir), Options())
  (tmp_path / 'real.json').write_text('{"a": 1}')
  (tmp_path / 'val' / IDS[0]).mkdir(parents=True)
  (tmp_path / 'val' / IDS[0] / 'ILSVRC2012_val_00000001.JPEG').write_bytes(b'')
  with pytest.raises(UserError, match=r'real.json cannot be read as ReaL labels'):
    open_set('real', str(tmp_path))
  for name in ('cat', 'dog'):
    (tmp_path / 'own' / name).mkdir(parents=True)
    (tmp_path / 'own' / name / 'a.png').write_bytes(b'')
  with pytest.raises(UserError, match=r'weights.safetensors on /.*/own: the model has 1000 classes, but .*/own has 2'):
    fit(open_candidate(str(path)), open_folder_set(str(tmp_path / 'own')), Options())


def test_a_dataset_of_tfds_needs_its_split_where_it_has_no_single_one_for_evaluation(data_dir):
  assert open_set('digits', data_dir).version == 'digits/1.0.0 test'
  assert len(open_set('digits:train', data_dir).source) == 1437
  with pytest.raises(UserError, match="digits has no split 'dev'"):
    open_set('digits:dev', data_dir)
