"""Whole runs in this process: resume, refusal, completeness, and that every config field counts."""

import copy
import dataclasses
import functools
import json
from pathlib import Path
import re
import shutil
import signal
import struct

import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest
from tensorboardX.proto.event_pb2 import Event

from configs import digits
from t2t_vit_jax import UserError, load_pretrained
from t2t_vit_jax.conversion import Options
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.conversion.weight_format import write_weights
from t2t_vit_jax.data import loader
from t2t_vit_jax.models.blocks import unstack_blocks
from t2t_vit_jax.recipe import evaluation
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.recipe.sharding import replicated
from t2t_vit_jax.training import loop
from t2t_vit_jax.training.calendar import Calendar
from t2t_vit_jax.training.evaluate_only import evaluate_only
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import description
from tests.image_folder import write_image_folder

pytestmark = pytest.mark.usefixtures('shared_programs')


def small_config(data_dir, **changes):
  """Digits with a model that compiles in seconds; changes are given with dots, as on the command line.

  Its tokens are convolutions: those of a performer take half as long again.
  """
  config = digits.get_config()
  config.data.update(source='tfds', data_dir=data_dir)  # which has parts of splits too
  config.model.depth = 1
  config.model.embed_dim = 32
  config.model.token_dim = 16
  config.model.tokens_type = 'convolution'
  config.model.performer_dropout_rate = 0.1
  config.model.stochastic_depth_rate = 0.1
  config.data.image_size = 16
  config.data.batch_size = 64
  config.augment.mixing_group_size = 60  # unused while the alphas are 0
  config.update_from_flattened_dict(changes)
  return config


def performer_config(data_dir, **changes):
  return small_config(data_dir, **{'model.tokens_type': 'performer', **changes})


def final_state(config, workdir):
  run = build_run(config)
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    return jax.device_get(checkpoints.restore(run.recipe.abstract_state, description(run))[0])


@pytest.fixture(scope='module')
def four_steps(data_dir, tmp_path_factory):
  """A run of four steps on two devices."""
  workdir = tmp_path_factory.mktemp('run')
  loop.train(performer_config(data_dir, **{'schedule.max_steps': 4}), workdir)
  return workdir


def test_two_steps_and_two_more_equal_four(data_dir, four_steps, tmp_path):
  config = performer_config(data_dir, **{'schedule.max_steps': 4})
  assert build_run(config).recipe.mesh.size == 2
  loop.train(performer_config(data_dir, **{'schedule.max_steps': 2}), tmp_path)
  loop.train(config, tmp_path)
  straight, resumed = final_state(config, four_steps), final_state(config, tmp_path)
  assert int(resumed.step) == 4
  jax.tree.map(np.testing.assert_array_equal, resumed, straight)


@pytest.mark.slow
def test_one_device_gives_the_same_as_two(data_dir, four_steps, tmp_path):
  config = performer_config(data_dir, **{'schedule.max_steps': 4, 'mesh.data': 1})
  loop.train(config, tmp_path)
  rows = [
    [json.loads(row) for row in (workdir / 'metrics.jsonl').read_text().splitlines()]
    for workdir in (four_steps, tmp_path)
  ]
  for one, two in zip(*rows, strict=True):
    assert one.get('loss') == pytest.approx(two.get('loss'), rel=1e-5)


def test_a_finished_run_says_so_and_repeats_its_result(data_dir, four_steps, capsys):
  def files():
    return {path: path.stat().st_mtime_ns for path in four_steps.rglob('*') if path.is_file() and path.name != 'lock'}

  before = files()
  loop.train(performer_config(data_dir, **{'schedule.max_steps': 4}), four_steps)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('This run is complete: 4 steps in ')
  row = json.loads((four_steps / 'metrics.jsonl').read_text().splitlines()[-1])
  assert lines[-1] == f'test top-1 {100 * row["correct"] / 360:.2f} % ({row["correct"]}/360)'
  assert before == files()


def test_another_models_workdir_is_refused_and_left_alone(data_dir, four_steps):
  before = {path: path.read_bytes() for path in four_steps.rglob('*') if path.is_file() and path.name != 'lock'}
  config = performer_config(data_dir, **{'schedule.max_steps': 8, 'model.embed_dim': 64})
  with pytest.raises(UserError, match=r'proj/bias is \(32,\) in the checkpoint, \(64,\) in this run.* --workdir'):
    loop.train(config, four_steps)
  assert before == {path: path.read_bytes() for path in before}


def test_checkpoints_hold_what_the_step_left_though_its_buffers_are_donated(data_dir, tmp_path):
  run = build_run(small_config(data_dir))
  state = run.recipe.make_state(run.recipe.rng)
  batches = run.train_batches(0)
  with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
    saved = jax.device_get(state)
    checkpoints.save(state, metrics=None, run=description(run))
    for _ in range(3):  # while the save runs in the background
      state, _ = run.recipe.train_step(state, next(batches), run.recipe.rng)
  with Checkpoints(tmp_path) as checkpoints:
    restored, _, changes, _ = checkpoints.restore(run.recipe.abstract_state, description(run))
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert changes == []
  batches.close()


def test_latest_and_best_checkpoints_are_kept(data_dir, tmp_path):
  run = build_run(small_config(data_dir))
  state = run.recipe.make_state(run.recipe.rng)
  with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
    for step, top1 in enumerate([0.1, 0.9, 0.3, 0.2, 0.5]):
      checkpoints.save(state.replace(step=jax.numpy.int32(step)), metrics={'top1': top1}, run={})
  assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [1, 3, 4]


@pytest.mark.parametrize(
  ('field', 'value'),
  [('model.num_heads', 8), ('seed', 7), ('data.batch_size', 32), ('data.train_split', 'train[:700]')],
)
def test_a_config_of_another_run_is_refused(data_dir, four_steps, field, value):
  before = {path: path.read_bytes() for path in four_steps.rglob('*') if path.is_file() and path.name != 'lock'}
  with pytest.raises(UserError, match=rf'belongs to another run: {field} was \S+ and is {re.escape(str(value))}[.;]'):
    loop.train(performer_config(data_dir, **{field: value}), four_steps)
  assert before == {path: path.read_bytes() for path in before}


def test_a_finished_run_names_the_split_that_it_evaluated(data_dir, four_steps, capsys):
  loop.train(performer_config(data_dir, **{'schedule.max_steps': 4, 'data.eval_split': 'test[:30]'}), four_steps)
  assert capsys.readouterr().out.splitlines()[-1].startswith('test top-1 ')


@pytest.mark.slow
def test_a_short_run_says_that_its_average_is_mostly_initial_weights(data_dir, tmp_path, capsys):
  changes = {
    'schedule.max_steps': 60,
    'schedule.warmup_epochs': 0,
    'ema.decay': 0.99996,
    'data.eval_split': 'test[:200]',
  }
  accuracy = loop.train(small_config(data_dir, **changes), tmp_path)
  rows = [json.loads(row) for row in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  raw, ema = ([row for row in rows if row.get('weights') == kind][-1] for kind in ('raw', 'ema'))
  assert raw['correct'] > ema['correct'] == accuracy.correct
  line = capsys.readouterr().out.splitlines()[-2]
  assert line.startswith('100% of the moving average, which the last line is about, is still the initial weights. ')
  assert f'top-1 is {raw["correct"] / 200:.2%}: {tmp_path}/weights/model_raw.safetensors has' in line
  assert (tmp_path / 'weights' / 'model_raw.safetensors').exists()


@pytest.mark.slow
def test_other_changes_are_said_and_evaluations_come_when_they_should(data_dir, tmp_path, capsys):
  # Two steps an epoch.
  changes = {
    'data.train_split': 'train[:128]',
    'data.eval_split': 'test[:30]',
    'checkpoint.every_epochs': 1,
    'checkpoint.keep_latest': 9,
  }
  loop.train(small_config(data_dir, **changes, **{'schedule.max_steps': 3}), tmp_path)
  loop.train(small_config(data_dir, **changes, **{'schedule.max_steps': 5}), tmp_path)
  assert 'changed since the checkpoint: schedule.max_steps was 3 and is 5' in capsys.readouterr().out
  rows = [json.loads(row) for row in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows if row.get('weights') == 'ema'] == [2, 3, 4, 5]
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [2, 3, 4, 5]


def test_a_loss_that_is_not_finite_ends_the_run(data_dir, tmp_path):
  rates = {'schedule.base_learning_rate': 1e30, 'schedule.warmup_learning_rate': 1e30}
  config = small_config(data_dir, **rates, **{'optimizer.nan_tolerance': 4, 'logging.every_steps': 10})
  with pytest.raises(UserError, match=r'4 steps in a row up to 5 had a loss or gradients that are not finite \('):
    loop.train(config, tmp_path)
  assert list((tmp_path / 'checkpoints').iterdir()) == []


def test_metrics_after_the_checkpoint_are_dropped_on_resume(data_dir, tmp_path):
  config = small_config(data_dir, **{'schedule.max_steps': 2, 'logging.every_steps': 1})
  loop.train(config, tmp_path)
  metrics = tmp_path / 'metrics.jsonl'
  kept = metrics.read_text()
  metrics.write_text(kept + '{"step": 3, "kind": "train"}\n{"step": 4, "ki')
  loop.train(small_config(data_dir, **{'schedule.max_steps': 3, 'logging.every_steps': 1}), tmp_path)
  rows = metrics.read_text()
  assert rows.startswith(kept)
  assert [json.loads(row)['step'] for row in rows.splitlines()] == [1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('model.name', 't2t_vit_41', "unknown model 't2t_vit_41': did you mean .*'t2t_vit_14'"),
    ('model.dtype', 'float99', r'model\.dtype must be'),
    ('model.num_classes', 7, r'the model has 7 classes, but digits test .* has 10'),
    ('data.image_size', 2, '2 x 2 px is too small'),
    ('data.batch_size', 63, '63 images cannot be divided among 2 devices: set data.batch_size to 62 or 64'),
    ('data.batch_size', 2000, 'more than the 1437 training images'),
    ('data.interpolation', 'cubic', r"data\.interpolation must be 'bilinear' or 'bicubic'"),
    ('augment.crop', 'random', r"augment\.crop must be 'resized' or 'padded'"),
    ('augment.label_smoothing', 1.5, 'must lie between 0 and 1'),
    ('augment.mixup_alpha', 0.8, 'mixing_group_size 60 does not divide the batch of 64 images'),
    ('mesh.data', 3, r'mesh\.data 3 x mesh\.fsdp 1 needs 3 devices, but there are 2'),
    ('schedule.epochs', 0, r'schedule\.epochs must be positive'),
    ('seed', -1, 'seed must lie between'),
    ('model.num_heads', 0, r'model\.num_heads must be positive'),
    ('schedule.cooldown_epochs', -3, r'cooldown_epochs must not be negative'),
    ('data.std', (0.1, 0.0, 0.1), r'data\.std must'),
    ('data.eval_split', 'test[:abc]', r"no split 'test\[:abc\]'"),
  ],
)
def test_bad_fields_are_refused_before_anything_is_written(data_dir, tmp_path, field, value, message):
  workdir = tmp_path / 'run'
  with pytest.raises(UserError, match=message) as caught:
    loop.train(small_config(data_dir, **{field: value}), workdir)
  assert '\n' not in str(caught.value)
  assert not workdir.exists()


def test_a_workdir_that_cannot_be_made_is_refused(data_dir, tmp_path):
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(UserError, match='cannot write to workdir'):
    loop.train(small_config(data_dir), tmp_path / 'file' / 'run')


class Recorder:
  """A config that notes which of its leaves are read."""

  def __init__(self, config, read, path=''):
    self._config, self._read, self._path = config, read, path

  def __getattr__(self, field):
    value = getattr(self._config, field)
    path = f'{self._path}{field}'
    if isinstance(value, ConfigDict):
      return Recorder(value, self._read, f'{path}.')
    if not callable(value):
      self._read.add(path)
    return value

  def __setattr__(self, field, value):
    if field.startswith('_'):
      super().__setattr__(field, value)
    else:
      setattr(self._config, field, value)

  def __getitem__(self, field):
    return getattr(self, field)

  def __setitem__(self, field, value):
    setattr(self, field, value)

  def __deepcopy__(self, memo):
    return Recorder(copy.deepcopy(self._config), self._read, self._path)

  def items(self):
    return [(field, getattr(self, field)) for field in self._config]

  def to_dict(self):  # a copy for the record uses nothing
    return self._config.to_dict()


def leaves(config, path=''):
  for field, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f'{path}{field}.')
    else:
      yield f'{path}{field}'


def test_every_config_field_is_read_by_something(data_dir, tmp_path):
  read = set()
  for crop in ('padded', 'resized'):
    config = small_config(data_dir, **{'schedule.max_steps': 1, 'augment.crop': crop})
    loop.train(Recorder(config, read), tmp_path / crop)
  evaluate_only(Recorder(config, read), tmp_path / crop)
  assert set(leaves(config)) - read == set()


def test_the_run_leaves_checkpoints_and_metrics(four_steps):
  names = {path.name for path in Path(four_steps).iterdir()}
  assert names == {'checkpoints', 'lock', 'metrics.jsonl', 'per_class.csv', 'report.png', 'tensorboard', 'weights'}
  with Image.open(four_steps / 'report.png') as page:
    assert page.width > 1000
    assert len(np.unique(page.convert('L').resize((64, 64)))) > 20  # curves and images, no blank page


def test_tensorboard_gets_what_metrics_jsonl_has(four_steps):
  written = {}
  for file in (four_steps / 'tensorboard').iterdir():
    content = file.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])  # then a checksum of four bytes, the event, another checksum
      event = Event.FromString(content[12 : 12 + length])
      written |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
      content = content[16 + length :]
  rows = [json.loads(line) for line in (four_steps / 'metrics.jsonl').read_text().splitlines()]
  for row in rows:
    name = 'train/loss' if row['kind'] == 'train' else f'test/{row["weights"]}/top1'
    assert written[name, row['step']] == pytest.approx(row[name.split('/')[-1]], rel=1e-6)


@pytest.mark.slow
def test_changes_are_allowed_when_asked_for(data_dir, four_steps, tmp_path, capsys):
  shutil.copytree(four_steps, tmp_path / 'run')
  changes = {'seed': 7, 'schedule.max_steps': 5, 'checkpoint.allow_changes': True}
  loop.train(performer_config(data_dir, **changes), tmp_path / 'run')
  output = capsys.readouterr().out
  assert 'changed since the checkpoint: ' in output
  assert 'seed was 0 and is 7' in output


def test_a_signal_during_the_last_evaluation_stops_the_run_as_often_as_it_comes(
  data_dir, tmp_path, monkeypatch, capsys
):
  config = small_config(data_dir, **{'schedule.max_steps': 2})

  def interrupted(*arguments):
    signal.raise_signal(signal.SIGTERM)  # not SIGINT, which the shell ignores for tests in the background
    yield from loader.eval_batches(*arguments)

  with monkeypatch.context() as patch:
    patch.setattr(evaluation, 'eval_batches', interrupted)
    for _ in range(2):  # the second time no step is left
      with pytest.raises(loop.Stopped, match='stopped at step 2 and saved') as stopped:
        loop.train(config, tmp_path / 'run')
      assert stopped.value.exit_code == 128 + signal.SIGTERM
      assert not (tmp_path / 'run' / 'weights').exists()
  loop.train(config, tmp_path / 'run')
  assert (tmp_path / 'run' / 'report.png').exists()
  accuracy = loop.train(config, tmp_path / 'straight')
  assert untimed_rows(tmp_path / 'run') == untimed_rows(tmp_path / 'straight')
  capsys.readouterr()
  assert accuracy == loop.train(config, tmp_path / 'run')  # not evaluated once more
  assert capsys.readouterr().out.startswith('This run is complete: 2 steps in ')


def untimed_rows(workdir):
  rows = [json.loads(row) for row in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: x for name, x in row.items() if name not in ('images_per_second', 'data_wait')} for row in rows]


@pytest.mark.slow
def test_an_evaluation_that_a_signal_ended_is_made_by_the_next_start(data_dir, tmp_path, monkeypatch, capsys):
  """Two steps an epoch; learning so fast that the accuracy after the first epoch is the best one."""
  changes = {
    'data.train_split': 'train[:128]',
    'data.eval_split': 'test[:60]',
    'checkpoint.every_epochs': 1,
    'schedule.max_steps': 4,
    'logging.every_steps': 1,
  }
  config = small_config(data_dir, **changes)
  loop.train(config, tmp_path / 'straight')
  evaluate = loop.Trainer.evaluate
  evaluated = []

  def interrupted(self, stop):
    evaluated.append(self.step)
    if len(evaluated) < 3:  # that of step 2, and again when the next run starts with it
      signal.raise_signal(signal.SIGTERM)
    return evaluate(self, stop)

  monkeypatch.setattr(loop.Trainer, 'evaluate', interrupted)
  for _ in range(2):
    with pytest.raises(loop.Stopped, match='stopped at step 2 and saved') as stopped:
      loop.train(config, tmp_path / 'run')
    assert stopped.value.exit_code == 128 + signal.SIGTERM
  capsys.readouterr()
  loop.train(config, tmp_path / 'run')
  assert 'step 2 was not evaluated; that comes first' in capsys.readouterr().out
  assert evaluated == [2, 2, 2, 4]
  assert untimed_rows(tmp_path / 'run') == untimed_rows(tmp_path / 'straight')
  metrics = [path.parent.parent.name for path in (tmp_path / 'run').glob('checkpoints/*/metrics/metrics')]
  assert sorted(metrics) == sorted(path.name for path in (tmp_path / 'straight' / 'checkpoints').iterdir())


def test_a_signal_after_the_last_evaluation_is_too_late_to_stop_the_run(data_dir, tmp_path, monkeypatch):
  save = loop.Trainer.save

  def signalled(self, metrics=None):
    signal.raise_signal(signal.SIGTERM)
    save(self, metrics)

  monkeypatch.setattr(loop.Trainer, 'save', signalled)
  loop.train(small_config(data_dir, **{'schedule.max_steps': 1}), tmp_path / 'run')
  assert (tmp_path / 'run' / 'report.png').exists()
  assert (tmp_path / 'run' / 'weights' / 'model.safetensors').exists()


def test_what_is_due_after_a_step():
  calendar = Calendar(last_step=20, evaluate_every=9, save_every=6, report_every=4)
  steps = range(1, 21)
  assert [step for step in steps if calendar.evaluates(step)] == [9, 18, 20]
  assert [step for step in steps if calendar.saves(step)] == [6, 9, 12, 18, 20]
  assert [step for step in steps if calendar.reports(step)] == [4, 6, 8, 9, 12, 16, 18, 20]


@pytest.mark.slow
@pytest.mark.parametrize('scanned_first', [True, False])
def test_a_run_goes_on_with_its_blocks_in_a_loop_and_without(data_dir, tmp_path, scanned_first):
  """It ends like one that never changed, on two devices that divide large arrays, with a decay that would show."""
  changes = {
    'model.depth': 3,
    'model.embed_dim': 128,
    'model.num_heads': 4,
    'model.performer_dropout_rate': 0.0,
    'model.stochastic_depth_rate': 0.0,
    'optimizer.weight_decay': 1.0,
    'schedule.warmup_learning_rate': 1e-3,
    'ema.decay': 0.5,
    'mesh.data': 1,
    'mesh.fsdp': 2,
    'checkpoint.allow_changes': True,
  }

  def config(steps, scan_blocks):
    return small_config(data_dir, **changes, **{'schedule.max_steps': steps, 'model.scan_blocks': scan_blocks})

  loop.train(config(2, scanned_first), tmp_path / 'run')
  changed = config(4, not scanned_first)
  loop.train(changed, tmp_path / 'run')
  loop.train(config(4, False), tmp_path / 'straight')
  found, expected = final_state(changed, tmp_path / 'run'), final_state(config(4, False), tmp_path / 'straight')
  assert ('blocks' in found.params) == (not scanned_first)
  for one, two in ((found.params, expected.params), (found.ema, expected.ema)):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), unstack_blocks(one), two)
  _, variables = load_pretrained(tmp_path / 'run' / 'weights' / 'model.safetensors')
  jax.tree.map(np.testing.assert_array_equal, variables['params'], unstack_blocks(found.ema))


def test_a_picture_of_augmented_images_is_made_when_asked_for(data_dir, tmp_path, capsys):
  config = small_config(data_dir, **{
    'schedule.max_steps': 1, 'log_images': True, 'augment.horizontal_flip_probability': 0.0
  })  # fmt: skip
  loop.train(config, tmp_path)
  assert 'augmented_images.png shows 32 training images' in capsys.readouterr().out
  run = build_run(config)
  batch = next(run.train_batches(0))
  grid = np.asarray(Image.open(tmp_path / 'augmented_images.png'))
  assert grid.shape == (4 * 18, 8 * 18, 3)
  # Nothing but the crop is drawn here, so the picture shows the batch as it came from the host.
  np.testing.assert_allclose(grid[1:17, 19:35], batch['image'][1], atol=1)


@pytest.mark.slow
def test_a_run_from_before_orientation_was_a_field_goes_on_without_it(data_dir, tmp_path, capsys):
  folder = write_image_folder(tmp_path / 'data', ('cat', 'dog', 'emu'), train=8, val=2)
  for path in folder.rglob('*.JPEG'):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)

  def config(steps, orientation=None):
    fields = {'data.source': 'folder', 'data.path': str(folder), 'data.eval_split': 'val', 'data.batch_size': 8}
    config = small_config(data_dir, **fields, **{'schedule.max_steps': steps, 'logging.every_steps': 1})
    config.data.orientation = orientation
    return config

  loop.train(config(1, 'ignored'), tmp_path / 'run')
  (metadata,) = (tmp_path / 'run' / 'checkpoints').glob('*/_CHECKPOINT_METADATA')
  stored = json.loads(metadata.read_text())
  del stored['custom_metadata']['config']['data']['orientation'], stored['custom_metadata']['checksum']
  metadata.write_text(json.dumps(stored))
  shutil.copytree(tmp_path / 'run', tmp_path / 'turned')
  capsys.readouterr()

  loop.train(config(2), tmp_path / 'run')
  assert 'data.orientation' not in capsys.readouterr().out
  with Checkpoints(tmp_path / 'run' / 'checkpoints', read_only=True) as checkpoints:
    stored = checkpoints.load_weights(replicated(build_run(config(2)).recipe.mesh)).run
  assert stored['config']['data']['orientation'] == 'ignored'
  loop.train(config(2, 'ignored'), tmp_path / 'straight')
  rows = [
    [json.loads(row)['loss'] for row in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
    for name in ('run', 'straight')
  ]
  assert rows[0][-3:] == rows[1][-3:]  # the second step's, and of both weights

  loop.train(config(2, 'upright'), tmp_path / 'turned')
  assert 'data.orientation was ignored and is upright' in capsys.readouterr().out


def test_weights_of_other_classes_get_a_new_head(data_dir, four_steps, tmp_path, caplog):
  """Weights of as many classes with the same names keep theirs."""
  weights, _ = load(four_steps / 'weights' / 'model.safetensors', Options())
  own = tmp_path / 'own.safetensors'
  write_weights(weights, own)
  other = tmp_path / 'other.safetensors'
  write_weights(dataclasses.replace(weights, class_names=tuple('abcdefghij')), other)
  for path, kept in ((own, True), (other, False)):
    caplog.clear()
    config = performer_config(data_dir, init_from=str(path))
    head = jax.device_get(build_run(config).recipe.fresh_state().params['head']['kernel'])
    assert (head == weights.arrays['params/head/kernel']).all() == kept
    assert ('head: new, for other classes; it has yet to be trained' in caplog.text) != kept
