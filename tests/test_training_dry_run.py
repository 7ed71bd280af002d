"""Every config as a dry run: everything is built and checked, nothing trained or written."""

import importlib
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest
import torch

from t2t_vit_jax import UserError
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.training.dry_run import dry_run
from tests import torch_reference
from tests.image_folder import encoded, picture, write_image_folder
from tests.parameters import slow_but
from tests.test_configs import NAMES
from tests.weights_cache import put_into_cache

ROOT = Path(__file__).parents[1]
CLASSES = {'imagenet2012': 1000, 'cifar10': 10, 'cifar100': 100, 'digits': 10}


@pytest.fixture(scope='module')
def stand_ins(tmp_path_factory):
  """For each dataset an image folder with as many classes, and at least 128 images."""
  image = encoded(picture(np.random.default_rng(0)), 'JPEG')
  folder = tmp_path_factory.mktemp('data')
  for name, num_classes in CLASSES.items():
    for split in ('train', 'val'):
      for number in range(num_classes):
        path = folder / name / split / f'n{number:04d}'
        path.mkdir(parents=True)
        for i in range(max(1, 130 // num_classes)):
          (path / f'{i}.JPEG').write_bytes(image)
  return folder


def weights_of(model, folder):
  """Bytes of a weight file of a named model."""
  torch.save(torch_reference.T2TViT(**torch_reference.MODELS[model]).state_dict(), folder / 'state.pth')
  convert(folder / 'state.pth', folder / 'weights', Options(model_name=model))
  return (folder / 'weights').read_bytes()


@pytest.mark.parametrize('name', slow_but(['digits', 'finetune', 't2t_vit_7'], NAMES))
def test_dry_run(name, stand_ins, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  config = importlib.import_module(f'configs.{name}').get_config()
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path / 'cache'))
  if config.init_from:
    model = config.model.name or 't2t_vit_7'  # with weights of any model
    put_into_cache(weights_of(model, tmp_path), config.init_from, tmp_path / 'cache')
  elif name == 't2t_vit_dense':
    config.model.dense_stages = (1, 1)
  else:
    config.model.depth = 2  # blocks are alike, and it takes long to trace them all
  before = sorted(tmp_path.iterdir())
  config.data.source = 'folder'
  config.data.path = str(stand_ins / config.data.name)
  config.data.eval_split = 'val'
  dry_run(config)
  output = capsys.readouterr().out
  assert output.startswith(f'model: {config.model.name or "t2t_vit_7"}, ')  # as the weight file says
  assert f' of {config.data.batch_size} images' in output
  assert output.endswith('dry run: nothing was trained, nothing written\n')
  assert sorted(tmp_path.iterdir()) == before


def test_missing_data_is_said(tmp_path):
  config = importlib.import_module('configs.t2t_vit_14').get_config()
  config.data.data_dir = str(tmp_path)
  with pytest.raises(UserError, match='imagenet2012 is not prepared'):
    dry_run(config)


def test_images_that_cannot_be_read_are_found_before_a_run(tmp_path, capsys):
  folder = write_image_folder(tmp_path, ('a', 'b'), train=4, val=2)
  config = importlib.import_module('configs.digits').get_config()
  config.data.update(source='folder', path=str(folder), eval_split='val', orientation='upright', batch_size=8)
  (folder / 'train' / 'b' / '3.JPEG').write_bytes(b'no picture')
  for path in (folder / 'val').rglob('*.JPEG'):
    path.write_bytes(b'')
  with pytest.raises(UserError, match=r'^of 4 images of \S+/val that were tried, none can be read; .* a/0\.JPEG \(no'):
    dry_run(config)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(
    f'warning: of 8 images of {folder}/train that were tried, 1 cannot be read; the first is b/3.JP'
  )
  assert 'data.max_bad_fraction' in line


@pytest.mark.slow
def test_the_program_writes_nothing(tmp_path, data_dir):
  command = [sys.executable, ROOT / 'train.py', '--dry_run', f'--config.data.data_dir={data_dir}']
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == 'dry run: nothing was trained, nothing written'
  assert list(tmp_path.iterdir()) == []
