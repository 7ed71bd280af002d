"""Evaluation of weight files and of workdirs."""

import dataclasses
import io
import json
from pathlib import Path
import shutil

import numpy as np
from PIL import Image
import pytest

from configs import digits, finetune
from t2t_vit_jax import UserError, load_pretrained
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.conversion.weight_format import write_weights
from t2t_vit_jax.data import loader
from t2t_vit_jax.data.sources import find_images
from t2t_vit_jax.data.tfds_source import open_tfds
from t2t_vit_jax.predict import open_classifier, predict
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.training import loop
from t2t_vit_jax.training.evaluate_only import evaluate_only
from tests import golden
from tests.golden import DATA
from tests.image_folder import write_image_folder
from tests.processes import run
from tests.test_training_loop import small_config
from tests.weights_cache import put_into_cache

pytestmark = pytest.mark.usefixtures('shared_programs')


def config_of(data_dir, **changes):
  config = digits.get_config()
  config.update_from_flattened_dict(
    {'data.source': 'tfds', 'data.data_dir': data_dir, 'data.eval_split': 'test[:40]', **changes}
  )
  return config


@pytest.mark.slow
def test_a_weight_file_is_evaluated_at_another_size_than_its_own(data_dir, tmp_path, monkeypatch):
  path = tmp_path / 'weights.safetensors'
  convert(DATA / 'official_tiny_performer.pth.tar', path, Options(settings={'num_heads': 4}))
  config = config_of(data_dir, **{'data.image_size': 48, 'data.eval_batch_size': 7})
  accuracy = evaluate_only(config, path)['weights']
  put_into_cache(path.read_bytes(), 't2t_vit_7', tmp_path / 'cache')
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path / 'cache'))
  assert evaluate_only(config, 't2t_vit_7') == {'weights': accuracy}

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


def test_both_heads_of_token_labeling_are_evaluated(data_dir, tmp_path):
  path = golden.with_second_head(golden.converted('performer', tmp_path), 1e3 * np.eye(10)[3])
  labels = [record.label for record in open_tfds('digits', 'test[:40]', data_dir)]
  accuracy = evaluate_only(config_of(data_dir, **{'data.image_size': 32}), path)['weights']
  assert (accuracy.count, accuracy.correct) == (40, labels.count(3))
  assert labels.count(3) > 0


@pytest.mark.slow
def test_several_processes_evaluate_a_weight_file_alike(data_dir, tmp_path):
  path = tmp_path / 'weights.safetensors'
  convert(DATA / 'official_tiny_performer.pth.tar', path, Options(settings={'num_heads': 4}))
  data = ['--config.data.source=tfds', f'--config.data.data_dir={data_dir}', '--config.data.eval_split=test[:41]']
  flags = [f'--evaluate={path}', '--json', *data]
  alone, together = (json.loads(run(count, *flags, devices=2).splitlines()[-1])['weights'] for count in (1, 2))
  for name in ('loss_sum', 'loss'):
    assert alone.pop(name) == pytest.approx(together.pop(name), rel=1e-6)
  assert alone == together
  assert alone['count'] == 41


def test_a_workdir_gives_what_its_last_evaluation_gave(data_dir, tmp_path, capsys):
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
  exported = evaluate_only(config_of(data_dir, **{'data.image_size': 16}), tmp_path / 'weights')['weights']
  assert (exported.correct, exported.loss_sum) == (found['ema'].correct, pytest.approx(found['ema'].loss_sum, rel=1e-6))

  shutil.copytree(tmp_path / 'checkpoints' / '3', tmp_path / 'checkpoints' / '9')
  (tmp_path / 'checkpoints' / '9' / '_CHECKPOINT_METADATA').write_text('{}')
  capsys.readouterr()
  assert evaluate_only(config_of(data_dir, **{'data.image_size': 16}), tmp_path) == found
  damage, taken = capsys.readouterr().err.splitlines()
  assert damage.startswith(f'warning: The checkpoint {tmp_path}/checkpoints/9 is damaged (')
  assert taken == 'warning: The checkpoint of step 3 was taken.'


def test_what_cannot_be_evaluated_gets_one_line(data_dir, tmp_path):
  with pytest.raises(UserError, match='no such file'):
    evaluate_only(config_of(data_dir), tmp_path / 'nothing')
  with pytest.raises(UserError, match='there is no checkpoint in'):
    evaluate_only(config_of(data_dir), tmp_path)
  assert list(tmp_path.iterdir()) == []
  other = tmp_path / 'other.safetensors'
  convert(DATA / 'official_tiny_performer.pth.tar', other, Options(settings={'num_heads': 4}, num_classes=7))
  with pytest.raises(UserError, match='the model has 7 classes, but digits test'):
    evaluate_only(config_of(data_dir), other)


DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


@pytest.fixture(scope='module')
def named_weights(tmp_path_factory):
  """A weight file whose ten classes have names, in the order of their numbers and not of their names."""
  path = tmp_path_factory.mktemp('weights') / 'weights.safetensors'
  convert(DATA / 'official_tiny_performer.pth.tar', path, Options(settings={'num_heads': 4}))
  weights, _ = load(path, Options())
  write_weights(dataclasses.replace(weights, class_names=DIGITS), path)
  return path


def folder_config(folder, **changes):
  config = config_of(None, **{'data.source': 'folder', 'data.path': str(folder), 'data.eval_split': 'val', **changes})
  with config.unlocked():
    for field in ('image_size', 'crop_fraction', 'interpolation', 'mean', 'std', 'orientation'):
      config.data[field] = changes.get(f'data.{field}')
  return config


def photographs(folder, classes, images_per_class=2):
  """Pictures that are stored sideways, mirrored or upright, as a phone does it."""
  write_image_folder(folder, classes, val=images_per_class)
  for number, path in enumerate(sorted((folder / 'val').rglob('*.JPEG'))):
    exif = Image.Exif()
    exif[0x0112] = 1 + number % 8
    Image.open(path).save(path, exif=exif)
  return folder


def test_prediction_and_evaluation_agree_picture_by_picture(named_weights, tmp_path, capsys):
  folder = photographs(tmp_path, DIGITS)
  accuracy = evaluate_only(folder_config(folder), named_weights)['weights']
  predictions = list(predict(open_classifier(named_weights), find_images([folder / 'val']), top=1))
  right = [Path(image).parent.name == guesses[0].name for image, guesses, _ in predictions]
  assert (accuracy.count, accuracy.correct) == (20, sum(right))
  for number, name in enumerate(DIGITS):
    own = [guesses[0].name == name for image, guesses, _ in predictions if Path(image).parent.name == name]
    assert accuracy.class_correct[number] == sum(own)
  assert capsys.readouterr().err == ''

  # Ignored, the tags make other pictures.
  ignored = evaluate_only(folder_config(folder, **{'data.orientation': 'ignored'}), named_weights)['weights']
  assert ignored.loss_sum != pytest.approx(accuracy.loss_sum, rel=1e-4)
  open_classifier(named_weights, orientation='ignored')
  assert 'EXIF orientation: ignored, but the weights were' in capsys.readouterr().err


def test_a_weight_file_says_what_to_do_with_orientation(named_weights, tmp_path, capsys):
  weights, _ = load(named_weights, Options())
  path = tmp_path / 'weights.safetensors'
  write_weights(dataclasses.replace(weights, data={**weights.data, 'orientation': 'ignored'}), path)
  assert not open_classifier(path).upright
  assert open_classifier(named_weights).upright
  folder = photographs(tmp_path, DIGITS, images_per_class=1)
  by_record = evaluate_only(folder_config(folder), path)['weights']
  explicit = evaluate_only(folder_config(folder, **{'data.orientation': 'ignored'}), named_weights)['weights']
  assert by_record.loss_sum == explicit.loss_sum
  capsys.readouterr()
  evaluate_only(folder_config(folder, **{'data.orientation': 'upright'}), path)
  assert 'data.orientation is upright, not ignored' in capsys.readouterr().err


def test_classes_are_matched_by_name(named_weights, tmp_path):
  """Folders are in the order of their names, eight first; each picture must count for the class of its folder."""
  folder = write_image_folder(tmp_path / 'all', DIGITS, val=1)
  accuracy = evaluate_only(folder_config(folder), named_weights)['weights']
  assert accuracy.class_names == DIGITS
  classifier = open_classifier(named_weights)
  loss = 0
  for label, name in enumerate(DIGITS):
    pixels = np.asarray(classifier.prepare(Image.open(folder / 'val' / name / '0.JPEG')))
    logits = np.asarray(
      golden.apply(classifier.model, classifier.variables, classifier.normalize(pixels[None]))[0], float
    )
    loss += np.log(np.exp(logits - logits[label]).sum())
  assert accuracy.loss_sum == pytest.approx(loss, rel=1e-5)


def test_other_classes_are_refused_and_some_are_evaluated_on_request(named_weights, tmp_path):
  folder = write_image_folder(tmp_path / 'some', ('two', 'eight', 'one'), val=1)
  with pytest.raises(UserError, match=r'lacks 7 of the 10 classes of the weights; .*allow_missing_classes=True'):
    evaluate_only(folder_config(folder), named_weights)
  accuracy = evaluate_only(folder_config(folder, **{'data.allow_missing_classes': True}), named_weights)['weights']
  assert accuracy.class_count == (0, 1, 1, 0, 0, 0, 0, 0, 1, 0)
  folder = write_image_folder(tmp_path / 'other', tuple(map(str, range(1, 11))), val=1)
  with pytest.raises(
    UserError, match=r'the model knows no class 1, 10, 2 and 7 more of .*; its own are zero, one, two'
  ):
    evaluate_only(folder_config(folder), named_weights)


def test_another_preparation_than_the_weights_own_is_said(named_weights, tmp_path, capsys):
  folder = write_image_folder(tmp_path, DIGITS, val=1)
  evaluate_only(folder_config(folder, **{'data.crop_fraction': 1.0, 'data.mean': (0.5, 0.5, 0.5)}), named_weights)
  assert capsys.readouterr().err.splitlines() == [
    f'warning: images are prepared otherwise than those of {named_weights}: data.crop_fraction is 1.0, not 0.9; '
    'data.mean is [0.5, 0.5, 0.5], not [0.485, 0.456, 0.406]'
  ]


def test_what_a_checkpoint_does_not_show_the_config_tells(data_dir):
  """The advice names flags of this program."""
  path = DATA / 'official_tiny_performer.pth.tar'
  config = config_of(data_dir, **{'data.eval_split': 'test[:5]'})
  assert config.model.name  # of another model, which does not matter
  with pytest.raises(UserError, match=r'--config\.model\.num_heads=N'):
    evaluate_only(config, path)
  config.model.num_heads = 4
  assert evaluate_only(config, path)['weights'].count == 5


@pytest.fixture(scope='module')
def grey_weights(tmp_path_factory):
  """A converted checkpoint for images of one channel."""
  return with_channels(1, tmp_path_factory.mktemp('grey') / 'grey.safetensors')


def with_channels(channels, path):
  """The golden checkpoint with its first channels alone, or its first one several times."""
  import torch

  state = golden.load_state_dict('performer')
  for name in ('norm1.weight', 'norm1.bias', 'kqv.weight'):  # of the first stage, which sees 7 x 7 px
    name = f'tokens_to_token.attention1.{name}'
    state[name] = torch.cat([state[name][..., :49]] * channels, dim=-1)
  torch.save(state, path.with_suffix('.pth'))
  convert(path.with_suffix('.pth'), path, Options(settings={'num_heads': 4}))
  return path


def test_weights_for_grey_images_are_evaluated_on_grey_images(data_dir, grey_weights):
  weights = load(grey_weights, Options())[0]
  np.testing.assert_allclose([*weights.data['mean'], *weights.data['std']], [0.449, 0.226], rtol=1e-6)  # RGB's averages
  accuracy = evaluate_only(config_of(data_dir, **{'data.image_size': 64}), grey_weights)['weights']
  model, variables = load_pretrained(grey_weights)
  correct = 0
  for record in open_tfds('digits', 'test[:40]', data_dir):
    image = Image.open(io.BytesIO(record.image)).convert('L').resize((64, 64), Image.Resampling.BILINEAR)
    pixels = ((np.asarray(image) / 255 - 0.3) / 0.35).astype(np.float32)  # the config's RGB values are all alike
    correct += int(golden.apply(model, variables, pixels[None, ..., None])[0].argmax()) == record.label
  assert (accuracy.count, accuracy.correct) == (40, correct)


def test_weights_for_grey_images_are_trained_on_grey_images(data_dir, grey_weights):
  run = build_run(finetuning(data_dir, grey_weights))
  state = run.recipe.fresh_state()
  kernel = load_pretrained(grey_weights)[1]['params']['tokens_to_token']['attention1']['kqv']['kernel']
  np.testing.assert_array_equal(state.params['tokens_to_token']['attention1']['kqv']['kernel'], kernel)
  batch = next(run.train_batches(0, loader.Workers()))
  assert batch['image'].shape == (run.recipe.order.batch_size, 64, 64, 1)
  assert run.recipe.abstract_batch(len(batch['image']))['image'].shape == batch['image'].shape


def test_channels_that_the_weights_do_not_take_get_one_line(data_dir, grey_weights, tmp_path):
  says = r'grey\.safetensors holds a model for images of 1 channel: leave out --config\.data\.channels=3'
  changes = {'data.channels': 3}
  with pytest.raises(UserError, match=says):
    evaluate_only(config_of(data_dir, **changes), grey_weights)
  config = finetuning(data_dir, grey_weights)
  config.update_from_flattened_dict(changes | {'data.mean': (0.5,) * 3, 'data.std': (0.5,) * 3})
  with pytest.raises(UserError, match=says):
    build_run(config).recipe.fresh_state()
  five = with_channels(5, tmp_path / 'five.safetensors')
  with pytest.raises(UserError, match=r'five\.safetensors holds a model for images of 5 channels'):
    evaluate_only(config_of(data_dir), five)
  with pytest.raises(UserError, match=r'data\.channels must be 1 or 3, not 5'):
    build_run(finetuning(data_dir, five))


@pytest.mark.slow
def test_a_grey_run_is_evaluated_and_predicts_in_grey(data_dir, tmp_path):
  changes = {'schedule.max_steps': 3, 'data.channels': 1, 'data.eval_split': 'test[:40]'}
  loop.train(small_config(data_dir, **changes), tmp_path)
  weights = tmp_path / 'weights' / 'model.safetensors'
  assert (tmp_path / 'report.png').exists()
  assert '(B, 16, 16, 1)' in (tmp_path / 'weights' / 'README.md').read_text()
  of_run = evaluate_only(config_of(data_dir, **{'data.image_size': 16}), tmp_path)['ema']
  of_file = evaluate_only(config_of(data_dir, **{'data.image_size': 16}), weights)['weights']
  assert of_run == of_file
  colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
  colour.save(tmp_path / 'colour.png')
  colour.convert('L').save(tmp_path / 'grey.png')
  first, second = predict(open_classifier(weights), [str(tmp_path / name) for name in ('colour.png', 'grey.png')])
  assert first.guesses == second.guesses


def finetuning(data_dir, path):
  config = finetune.get_config()
  config.update_from_flattened_dict(
    {'init_from': str(path), 'data.name': 'digits', 'data.data_dir': data_dir, 'data.eval_split': 'test'}
  )
  return config


def test_folders_of_labels_are_matched_by_number(tmp_path):
  """Weights without names, such as published ones; in the order of text 10 comes before 2."""
  path = tmp_path / 'weights.safetensors'
  convert(DATA / 'official_tiny_performer.pth.tar', path, Options(settings={'num_heads': 4}, num_classes=11))
  folder = write_image_folder(tmp_path, tuple(map(str, range(11))), val=1)
  (folder / 'val' / '10' / '1.JPEG').write_bytes((folder / 'val' / '10' / '0.JPEG').read_bytes())
  accuracy = evaluate_only(folder_config(folder), path)['weights']
  assert accuracy.class_count == (1,) * 10 + (2,)
