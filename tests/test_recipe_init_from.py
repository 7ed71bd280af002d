"""Training that starts from a weight file."""

import csv
import hashlib
import importlib
import math
import shutil

from absl import logging
import jax
import numpy as np
from PIL import Image
import pytest

from configs import digits
from t2t_vit_jax import UserError, load_pretrained
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.recipe.build import build_model
from t2t_vit_jax.recipe.init_from import pretrained_variables, resolve, resolve_for_evaluation, weights_header
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.training import loop
from tests import golden
from tests.image_folder import write_image_folder
from tests.weights_cache import put_into_cache

pytestmark = pytest.mark.usefixtures('shared_programs')


@pytest.fixture(name='config')
def fixture_config(data_dir):
  """The golden performer, for digits."""
  config = digits.get_config()
  config.data.data_dir = data_dir
  config.data.batch_size = 16
  for field in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'token_dim'):
    config.model[field] = golden.TINY[field]
  return config


@pytest.fixture(name='weights')
def fixture_weights(tmp_path):
  path = tmp_path / 'weights.safetensors'
  convert(golden.DATA / 'official_tiny_performer.pth.tar', path, Options(settings={'num_heads': 4}, num_classes=7))
  return path


def test_a_name_or_a_runs_folder_takes_the_place_of_a_file(weights, tmp_path, monkeypatch):
  put_into_cache(weights.read_bytes(), 't2t_vit_7', tmp_path / 'cache')
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'run' / 'weights').mkdir(parents=True)
  shutil.copy(weights, tmp_path / 'run' / 'weights' / 'model.safetensors')
  model, variables = load_pretrained(weights)
  for source in ('t2t_vit_7', str(tmp_path / 'run')):
    assert weights_header(source)['source']['file'] == 'official_tiny_performer.pth.tar'
    same = pretrained_variables(source, model, 3, 0, None)
    jax.tree.map(np.testing.assert_array_equal, same, variables)


@pytest.mark.slow
def test_a_run_starts_with_the_files_weights_and_trains(config, weights, tmp_path):
  config.init_from = str(weights)
  run = build_run(config)
  state = run.recipe.fresh_state()
  loaded = load_pretrained(weights, num_classes=10, image_size=32, seed=config.seed)[1]
  assert loaded['frozen']['pos_embed'].shape == (1, 1 + 2 * 2, 64)
  for params in (state.params, state.ema):
    jax.tree.map(np.testing.assert_array_equal, params, loaded['params'])
  jax.tree.map(np.testing.assert_array_equal, state.frozen, loaded['frozen'])
  assert int(state.step) == 0
  images = np.zeros((16, 32, 32, 3), np.uint8)
  batch = {'image': images, 'label': np.zeros(16, np.int32)}
  state, metrics = run.recipe.train_step(state, batch, run.recipe.rng)  # donates the state's buffers
  assert np.isfinite(metrics['loss'])
  assert int(state.step) == 1


def test_a_torch_checkpoint_will_do(config):
  config.init_from = str(golden.DATA / 'official_tiny_performer.pth.tar')
  state = build_run(config).recipe.fresh_state()
  expected = golden.load_variables('performer')['params']['blocks_0']
  jax.tree.map(np.testing.assert_array_equal, dict(state.params['blocks_0']), expected)


@pytest.mark.parametrize('num_classes', [10, 3])
def test_a_run_starts_without_the_second_head_of_token_labeling(num_classes, config, tmp_path, caplog):
  config.init_from = str(golden.with_second_head(golden.converted('performer', tmp_path), np.ones(10)))
  model = build_model(resolve(config), num_classes)
  with caplog.at_level(logging.WARNING, logger='absl'):
    variables = pretrained_variables(config.init_from, model, 3, 0, None)
  fresh = golden.shapes_of(model, np.zeros((1, 32, 32, 3), np.float32))
  assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda x: x.shape, dict(fresh))
  reason = "training uses the class token's head alone" if num_classes == 10 else 'it is of the old classes'
  assert f'aux_head: dropped; {reason}' in caplog.text


def test_another_model_is_refused(config, weights):
  config.init_from = str(weights)
  config.model.depth = 3
  with pytest.raises(UserError, match='depth=2 instead of 3'):
    build_run(config).recipe.fresh_state()
  config.model.depth = 2
  config.model.num_heads = 8
  with pytest.raises(UserError, match='num_heads=4, not 8'):
    build_run(config).recipe.fresh_state()


def finetuning(weights, **changes):
  config = importlib.import_module('configs.finetune').get_config()
  config.update_from_flattened_dict({'init_from': str(weights), **changes})
  return config


def test_the_weight_file_decides_what_the_config_leaves_open(weights, tmp_path):
  config = resolve(finetuning(weights))
  assert config.model.name is None
  assert {field: config.model[field] for field in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'token_dim')} == {
    field: golden.TINY[field] for field in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'token_dim')
  }
  assert (config.data.image_size, config.data.crop_fraction, config.data.interpolation) == (64, 0.9, 'bicubic')
  assert (config.data.mean, config.data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  config = resolve(finetuning(weights, **{'data.image_size': 96, 'data.mean': (0.5, 0.5, 0.5)}))
  assert (config.data.image_size, config.data.mean, config.data.crop_fraction) == (96, (0.5, 0.5, 0.5), 0.9)
  # A checkpoint of torch, whose head counts tensors do not show.
  config = resolve(finetuning(golden.DATA / 'official_tiny_performer.pth.tar', **{'model.num_heads': 4}))
  assert (config.model.depth, config.data.image_size) == (golden.TINY['depth'], 64)


def test_a_config_that_leaves_nothing_open_does_not_need_the_file(config):
  config.init_from, config.data.orientation = 'nowhere.safetensors', 'ignored'
  config.data.channels = 3
  assert resolve(config).to_dict() == config.to_dict()


def test_weights_that_cannot_be_fetched_are_asked_for_once(config, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('T2T_VIT_JAX_MIRROR', 'http://127.0.0.1:9')
  config.init_from, config.data.orientation = 't2t_vit_7', None
  config = resolve(config)  # a run that is resumed does not need them
  assert (config.data.orientation, config.data.channels) == ('ignored', 3)
  assert capsys.readouterr().err.count('fetching') == 1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'init_from': 'nowhere'}, 'init_from: nowhere: no such file or folder; nor are weights of this name published'),
    ({'init_from': 'nowhere.safetensors'}, 'init_from: nowhere.safetensors: no such file'),
    ({'init_from': None}, r'data\.image_size, .*model\.name must be set: .* --config\.init_from=FILE'),
    (
      {'model.name': 't2t_vit_14'},
      r'init_from: .*weights\.safetensors: is a weight file with model=None, not t2t_vit_14',
    ),
    (
      {'init_from': str(golden.DATA / 'official_tiny_performer.pth.tar')},
      r'init_from: .* number of attention heads: add --config\.model\.num_heads=N',
    ),
  ],
)
def test_what_does_not_fit_gets_one_line(weights, changes, message):
  with pytest.raises(UserError, match=message) as caught:
    resolve(finetuning(weights, **changes))
  assert '\n' not in str(caught.value)


def test_data_fields_that_make_no_sense_are_refused(weights):
  for data in ({}, {'image_size': (64, 96)}, {'image_size': 64, 'crop_fraction': 'all'}):
    with pytest.raises(UserError, match=r'^file has no usable data\.(image_size|crop_fraction): set --config'):
      resolve_for_evaluation(finetuning(weights), data, 3, 'file')


@pytest.mark.slow
def test_finetuning_on_a_folder_without_splits_from_one_file_to_another(weights, tmp_path, capsys):
  classes = ('a b', 'c, d', 'ü')
  folder = write_image_folder(tmp_path / 'data', classes, photos=25) / 'photos'
  config = finetuning(weights, **{
    'data.source': 'folder', 'data.path': str(folder), 'schedule.max_steps': 3, 'schedule.warmup_epochs': 0,
    'model.dtype': 'float32', 'logging.every_steps': 1,
  })  # fmt: skip
  accuracy = loop.train(config, tmp_path / 'run')
  output = capsys.readouterr().out
  # 60 images on two devices: 64, 32, 16 and 8 are halved until an epoch has 8 steps.
  assert 'steps: 3 of 4 images, 15 an epoch, on 2 cpu devices' in output
  assert 'step 3/3 epoch 0.2' in output
  assert ' lr 3.12e-03 ' in output  # 0.05 * 4 / 64

  # The file alone, in the hands of somebody else: the held-out images, prepared as its header says.
  path = tmp_path / 'run' / 'weights' / 'model.safetensors'
  model, variables = load_pretrained(path)
  found = load(path, Options())[0]
  assert found.class_names == classes
  data, counts, apply = found.data, [], jax.jit(model.apply)
  for label, name in enumerate(classes):
    files = sorted(
      (folder / name).iterdir(), key=lambda p: hashlib.sha256(f'{p.parent.name}/{p.name}'.encode()).digest()
    )
    images = np.stack([prepared(file, data) for file in files[:5]])
    counts.append(int((apply(variables, images).argmax(axis=1) == label).sum()))
  assert (sum(counts), 15) == (accuracy.correct, accuracy.count)
  with (tmp_path / 'run' / 'per_class.csv').open(newline='', encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  assert [(row['class'], int(row['images']), int(row['correct'])) for row in rows] == [
    (name, 5, correct) for name, correct in zip(classes, counts, strict=True)
  ]
  table = output.split('accuracy of each class, the worst first:\n')[1].splitlines()[:3]
  assert sorted(table) == sorted(
    f'  {name:<4}  {20 * correct:6.2f} % ({correct}/5)' for name, correct in zip(classes, counts, strict=True)
  )
  assert [line.split('(')[1] for line in table] == sorted(line.split('(')[1] for line in table)
  assert output.splitlines()[-1] == f'validation top-1 {100 * sum(counts) / 15:.2f} % ({sum(counts)}/15)'


def prepared(file, data):
  """An image as evaluation prepares it: float32 (H, W, 3)."""
  image, side = Image.open(file), data['image_size']
  scale = math.floor(side / data['crop_fraction']) / min(image.size)
  size = [int(scale * length) for length in image.size]
  image = image.resize(size, Image.Resampling[data['interpolation'].upper()])
  left, top = (round((length - side) / 2) for length in size)
  pixels = np.asarray(image.crop((left, top, left + side, top + side)))
  return ((pixels / 255 - np.array(data['mean'])) / np.array(data['std'])).astype(np.float32)
