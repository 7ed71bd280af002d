"""Evaluation of weight files and of workdirs."""

import io
import json

import numpy as np
from PIL import Image
import pytest

from configs import digits
from t2t_vit_jax import UserError, load_pretrained
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.data.sources import open_tfds
from t2t_vit_jax.training import loop
from t2t_vit_jax.training.evaluate_only import evaluate_only
from tests import golden
from tests.golden import DATA
from tests.processes import run
from tests.test_training_loop import small_config


def config_of(data_dir, **changes):
  config = digits.get_config()
  config.update_from_flattened_dict({'data.data_dir': data_dir, 'data.eval_split': 'test[:40]', **changes})
  return config


def test_a_weight_file_is_evaluated_at_another_size_than_its_own(data_dir, tmp_path):
  path = tmp_path / 'weights.safetensors'
  convert(DATA / 'official_tiny_performer.pth.tar', path, Options(settings={'num_heads': 4}))
  accuracy = evaluate_only(config_of(data_dir, **{'data.image_size': 48, 'data.eval_batch_size': 7}), path)['weights']

  model, variables = load_pretrained(path)
  assert model.image_size == 64
  top1 = top5 = loss = 0
  for record in open_tfds('digits', 'test[:40]', data_dir):
    image = Image.open(io.BytesIO(record.image)).convert('RGB').resize((48, 48), Image.Resampling.BILINEAR)
    pixels = ((np.asarray(image) / 255 - 0.3) / 0.35).astype(np.float32)
    logits = np.asarray(golden.apply(model, variables, pixels[None])[0], np.float64)
    rank = int((logits > logits[record.label]).sum())
    top1, top5 = top1 + (rank < 1), top5 + (rank < 5)
    loss += np.log(np.exp(logits - logits[record.label]).sum())
  assert (accuracy.count, accuracy.correct, accuracy.correct_top5) == (40, top1, top5)
  assert accuracy.loss_sum == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_several_processes_evaluate_a_weight_file_alike(data_dir, tmp_path):
  path = tmp_path / 'weights.safetensors'
  convert(DATA / 'official_tiny_performer.pth.tar', path, Options(settings={'num_heads': 4}))
  flags = [f'--evaluate={path}', '--json', f'--config.data.data_dir={data_dir}', '--config.data.eval_split=test[:41]']
  alone, together = (json.loads(run(count, *flags, devices=2).splitlines()[-1])['weights'] for count in (1, 2))
  for name in ('loss_sum', 'loss'):
    assert alone.pop(name) == pytest.approx(together.pop(name), rel=1e-6)
  assert alone == together
  assert alone['count'] == 41


def test_a_workdir_gives_what_its_last_evaluation_gave(data_dir, tmp_path):
  changes = {'schedule.max_steps': 3, 'data.eval_split': 'test[:40]'}
  loop.train(small_config(data_dir, **changes), tmp_path)
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  files = sorted(tmp_path.rglob('*'))
  # Only the data matters: the architecture is the checkpoint's.
  found = evaluate_only(config_of(data_dir, **{'data.image_size': 16}), tmp_path)
  for weights in ('raw', 'ema'):
    (row,) = (row for row in rows if row.get('weights') == weights)
    assert (found[weights].correct, found[weights].count) == (row['correct'], 40)
    assert found[weights].loss_sum == pytest.approx(row['loss_sum'], rel=1e-6)
  assert sorted(tmp_path.rglob('*')) == files


def test_what_cannot_be_evaluated_gets_one_line(data_dir, tmp_path):
  with pytest.raises(UserError, match='there is no weight file and no workdir'):
    evaluate_only(config_of(data_dir), tmp_path / 'nothing')
  with pytest.raises(UserError, match='there is no checkpoint in'):
    evaluate_only(config_of(data_dir), tmp_path)
  assert list(tmp_path.iterdir()) == []
  other = tmp_path / 'other.safetensors'
  convert(DATA / 'official_tiny_performer.pth.tar', other, Options(settings={'num_heads': 4}, num_classes=7))
  with pytest.raises(UserError, match='the model has 7 classes, but digits test'):
    evaluate_only(config_of(data_dir), other)
