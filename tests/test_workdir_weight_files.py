"""Weight files of a run: the numbers of its last step, with everything that `load_pretrained` and readers need."""

import dataclasses
import json
import re
import shutil

from etils import epath
import jax
import numpy as np
import pytest
import safetensors
import yaml

from configs import digits
from t2t_vit_jax import UserError, create_model, load_pretrained
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.conversion.weight_format import read_header
from t2t_vit_jax.recipe.evaluation import Accuracy
from t2t_vit_jax.recipe.run import build_run
from t2t_vit_jax.training import loop
from t2t_vit_jax.training.evaluate_only import evaluate_only
from t2t_vit_jax.workdir import weight_files
from t2t_vit_jax.workdir.checkpoints import Checkpoints
from t2t_vit_jax.workdir.description import description
from t2t_vit_jax.workdir.model_card import model_card
from tests import golden
from tests.small_disk import fill, small_disk
from tests.test_training_loop import small_config

pytestmark = pytest.mark.usefixtures('shared_programs')

STEPS = 3
CHANGES = {'schedule.max_steps': STEPS, 'data.eval_split': 'test[:100]', 'ema.decay': 0.5}


@pytest.fixture(scope='module', name='config')
def fixture_config(data_dir):
  return small_config(data_dir, **CHANGES)


@pytest.fixture(scope='module', name='workdir')
def fixture_workdir(config, tmp_path_factory):
  """Of a run of three steps with a moving average, on two devices that divide nothing."""
  workdir = tmp_path_factory.mktemp('digits')
  loop.train(config, workdir)
  return workdir


def metadata_of(path):
  with safetensors.safe_open(path, framework='np') as file:
    return json.loads(file.metadata()['t2t_vit_jax'])


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_are_the_last_states_weights_bit_for_bit(config, workdir):
  run = build_run(config)
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    state = jax.device_get(checkpoints.restore(run.recipe.abstract_state, description(run))[0])
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state.params, state.ema)), strict=True))
  images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
  for name, params in (('model', state.ema), ('model_raw', state.params)):
    model, variables = load_pretrained(workdir / 'weights' / f'{name}.safetensors')
    jax.tree.map(np.testing.assert_array_equal, variables, state.variables(params))
    assert model == dataclasses.replace(run.recipe.model, stochastic_depth_rate=0.0)
    logits = golden.apply(model, variables, images)
    np.testing.assert_array_equal(logits, golden.apply(run.recipe.model, state.variables(params), images))


def test_the_header_says_what_the_weights_are(workdir):
  for name, kind in (('model', 'ema'), ('model_raw', 'raw')):
    path = workdir / 'weights' / f'{name}.safetensors'
    metadata = metadata_of(path)
    assert metadata['model'] is None  # t2t_vit_tiny has other widths
    assert metadata['channels'] == 3
    assert metadata['class_names'] == [str(digit) for digit in range(10)]
    assert metadata['data'] == dict(
      image_size=16,
      num_classes=10,
      crop_fraction=1.0,
      interpolation='bilinear',
      mean=[0.3] * 3,
      std=[0.35] * 3,
      orientation='ignored',
    )
    source = metadata['source']
    assert (source['run'], source['step'], source['weights']) == (workdir.name, STEPS, kind)
    assert len(source['code']) == 12
    assert source['commit'] is None or re.fullmatch('[0-9a-f]{40}(-dirty)?', source['commit'])
    with path.open('rb') as file:
      assert json.loads(json.dumps(read_header(file))) == metadata
  assert (workdir / 'weights' / 'README.md').stat().st_mode == path.stat().st_mode


def test_the_config_for_a_hub_has_the_names_of_other_libraries(workdir):
  config = json.loads((workdir / 'weights' / 'config.json').read_text('utf-8'))
  assert (config['architecture'], config['num_classes'], config['num_features']) == ('t2t_vit', 10, 32)
  assert config['pretrained_cfg'] == {
    'input_size': [3, 16, 16],
    'fixed_input_size': False,
    'interpolation': 'bilinear',
    'crop_pct': 1.0,
    'crop_mode': 'center',
    'mean': [0.3] * 3,
    'std': [0.35] * 3,
    'num_classes': 10,
    'classifier': 'head',
  }
  assert create_model('t2t_vit_tiny', **config['model_args']) == load_pretrained(workdir)[0]
  assert config['id2label']['3'] == config['label_names'][3] == '3'
  assert config['label2id']['3'] == 3


def test_to_torch_and_back_is_bit_exact(workdir, tmp_path):
  import torch

  path = workdir / 'weights' / 'model.safetensors'
  convert(path, tmp_path / 'model.pth', Options(), reverse=True)
  convert(tmp_path / 'model.pth', tmp_path / 'back', Options(settings={'num_heads': 4, 'image_size': 16}))
  there, back = load_pretrained(path)[1], load_pretrained(tmp_path / 'back')[1]
  jax.tree.map(np.testing.assert_array_equal, there, back)
  assert torch.load(tmp_path / 'model.pth', weights_only=True)['pos_embed'].shape == (1, 2, 32)


def test_the_card_has_the_accuracy_of_the_last_line(config, workdir, capsys):
  loop.train(config, workdir)
  last_line = capsys.readouterr().out.splitlines()[-1]
  card = (workdir / 'weights' / 'README.md').read_text('utf-8')
  _, header, text = card.split('---\n', 2)
  assert f'\n{last_line}, after step {STEPS}, the last.\n' in text
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  rows = {row['weights']: row for row in rows if 'weights' in row}
  assert f'| moving average of the weights | {rows["ema"]["top1"]:.2%} | {rows["ema"]["top5"]:.2%} |' in text
  assert f'| weights of the last step | {rows["raw"]["top1"]:.2%} | {rows["raw"]["top5"]:.2%} |' in text
  header = yaml.safe_load(header)
  assert (header['library_name'], header['pipeline_tag']) == ('t2t_vit_jax', 'image-classification')
  (result,) = header['model-index'][0]['results']
  assert result['dataset'] == {'type': 'digits', 'name': 'digits', 'split': 'test[:100]'}
  assert result['metrics'][0] == {'type': 'accuracy', 'name': 'top-1 of 100 images', 'value': rows['ema']['top1']}
  assert f'jax {jax.__version__}, ' in text
  # The config is there, but no folder of this machine.
  saved = yaml.safe_load(text.split('```yaml\n')[1].split('```')[0])
  assert saved['schedule'] == config.schedule.to_dict()
  assert config.data.data_dir not in card
  assert saved['data']['data_dir'] == config.data.data_dir.rsplit('/', 1)[1]


def test_files_that_are_missing_or_of_an_earlier_step_are_written_when_a_complete_run_starts_again(
  config, workdir, tmp_path
):
  run, expected = tmp_path / workdir.name, contents(workdir / 'weights')
  shutil.copytree(workdir, run)
  (run / 'weights' / 'model_raw.safetensors').unlink()
  (run / 'weights' / '.1234.tmp').write_text('half a file of a killed process')
  loop.train(config, run)
  assert contents(run / 'weights') == expected
  assert len(expected) == 4
  # A longer run that was killed after its last checkpoint, before it wrote its weights.
  longer = config.copy_and_resolve_references()
  longer.schedule.max_steps = STEPS + 1
  loop.train(longer, run)
  final = contents(run / 'weights')
  assert final['model.safetensors'] != expected['model.safetensors']
  shutil.copytree(workdir / 'weights', run / 'weights', dirs_exist_ok=True)
  loop.train(longer, run)
  assert contents(run / 'weights') == final


def test_a_checkpoint_is_exported_without_data_and_config(workdir, tmp_path):
  """By devices that divide the state, from a copy in which there is nothing but the checkpoint."""
  expected = contents(workdir / 'weights')
  shutil.copytree(workdir / 'checkpoints', tmp_path / workdir.name / 'checkpoints')
  anything = small_config('/nowhere', **{'mesh.fsdp': 2, 'model.depth': 3})
  (line,) = weight_files.export_checkpoint(anything, str(tmp_path / workdir.name))
  assert f'weights of step {STEPS} (moving average): {tmp_path / workdir.name}/weights/model.safetensors' in line
  assert contents(tmp_path / workdir.name / 'weights') == expected
  with pytest.raises(UserError, match='there is no checkpoint in'):
    weight_files.export_checkpoint(anything, str(tmp_path))


def test_an_export_takes_the_checkpoint_before_a_damaged_one_and_says_so(workdir, tmp_path):
  checkpoints = tmp_path / workdir.name / 'checkpoints'
  for step in (STEPS, 9):
    shutil.copytree(workdir / 'checkpoints' / str(STEPS), checkpoints / str(step))
  (checkpoints / '9' / '_CHECKPOINT_METADATA').write_text('')
  damage, taken, written = weight_files.export_checkpoint(small_config('/nowhere'), str(tmp_path / workdir.name))
  assert damage == f'The checkpoint {checkpoints}/9 is damaged (ValueError: its description is missing).'
  assert taken == f'The checkpoint of step {STEPS} was taken.'
  assert written.startswith(f'weights of step {STEPS} (moving average): ')
  assert contents(tmp_path / workdir.name / 'weights') == contents(workdir / 'weights')
  (checkpoints / str(STEPS) / '_CHECKPOINT_METADATA').write_text('')
  with pytest.raises(UserError, match=r'^no checkpoint can be read\. The checkpoint \S+/9 is damaged \('):
    weight_files.export_checkpoint(small_config('/nowhere'), str(tmp_path / workdir.name))


def test_a_full_disk_gets_one_line_and_the_checkpoint_stays(config, workdir, tmp_path):
  with small_disk(tmp_path):
    shutil.copytree(workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('weights'))
    before = {path: path.read_bytes() for path in (tmp_path / 'run' / 'checkpoints').rglob('*') if path.is_file()}
    (tmp_path / 'run' / 'weights').mkdir()
    fill(tmp_path, 40_000)
    says = r'could not be written \(.*/model\.safetensors.*the disk is full: at least \d.* are needed.*same command'
    with pytest.raises(UserError, match=says) as caught:
      loop.train(config, tmp_path / 'run')
    assert '\n' not in str(caught.value)
    assert before == {path: path.read_bytes() for path in before}
    assert not list((tmp_path / 'run' / 'weights').glob('*.safetensors'))
    (tmp_path / 'filler').unlink()
    loop.train(config, tmp_path / 'run')
    assert (tmp_path / 'run' / 'weights' / 'model.safetensors').exists()


def test_named_models_keep_their_names_and_old_checkpoints_have_no_class_names():
  config = digits.get_config()
  config.data.orientation, config.data.channels = 'ignored', 3
  model = create_model('t2t_vit_tiny', num_classes=10)
  shapes = golden.shapes_of(model, np.zeros((1, 32, 32, 3), np.float32))
  variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  weights = weight_files.weights_of_checkpoint({'config': config.to_dict()}, variables, 'raw', 7, 'old')
  assert (weights.model, weights.class_names) == ('t2t_vit_tiny', None)
  assert weights.source == {'run': 'old', 'step': 7, 'weights': 'raw'}
  assert weights.build()[0] == model
  card = model_card(weights, {'config': config.to_dict()}, 7, None, None)
  assert 'These weights were not evaluated.' in card
  assert 'model-index' not in card


def test_a_workdir_without_weights_is_said_to_lack_them(workdir, tmp_path):
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    assert weight_files.are_written(epath.Path(workdir), checkpoints, with_ema=True)
    assert not weight_files.are_written(epath.Path(tmp_path), checkpoints, with_ema=True)


def test_names_in_a_card_are_names_and_nothing_else():
  parser = pytest.importorskip('markdown_it').MarkdownIt('commonmark', {'html': True})
  hostile = [
    '<script>x</script>',
    '[a](http://b)',
    '![a](http://b)',
    '`` ` ``',
    'a\n# forged',
    '\x1b[2J',
    '_c_',
    '&lt;',
    '*b*',
    '',
  ]
  config = digits.get_config().to_dict()
  config['data'] |= {'source': 'folder', 'path': '/a/`x`\n---\nlicense: forged\n---', 'train_split': 'a\n```\n# forged'}
  config['data'] |= {'eval_split': 'x ' * 60 + '``` `` <b>', 'orientation': 'ignored', 'channels': 3}
  config['init_from'] = 'runs/<i>/weights/model.safetensors'
  model = create_model('t2t_vit_tiny', num_classes=10)
  shapes = golden.shapes_of(model, np.zeros((1, 32, 32, 3), np.float32))
  variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  description = {'config': config, 'class_names': hostile, 'eval_part': '10% of each class, held out'}
  weights = weight_files.weights_of_checkpoint(description, variables, 'raw', 7, 'run')
  metrics = {**Accuracy(3, 4, 5, 1.0).as_dict(), 'split': config['data']['eval_split']}
  card = model_card(weights, description, 7, metrics, None)
  assert card.replace('\n', '').isprintable()
  _, header, text = card.split('---\n', 2)
  assert yaml.safe_load(header).keys() == {'library_name', 'pipeline_tag', 'tags', 'metrics', 'model-index'}
  assert yaml.safe_load(text.split('```yaml\n')[1].rsplit('```', 1)[0])['data']['train_split'] == 'a\\n```\\n# forged'
  tokens = [token for block in parser.parse(text) for token in (block, *(block.children or ()))]
  kinds = [token.type for token in tokens]
  assert not {'html_block', 'html_inline', 'image', 'em_open'} & set(kinds)
  assert [token.attrs['href'] for token in tokens if token.type == 'link_open'] == ['https://arxiv.org/abs/2101.11986']
  assert kinds.count('heading_open') == 6
  codes = [token.content for token in tokens if token.type == 'code_inline']
  assert {'<script>x</script>', '[a](http://b)', '`` ` ``', 'a\\n# forged', '\\x1b[2J'} <= set(codes)


@pytest.mark.parametrize(
  ('change', 'says', 'only_export'),
  [
    (lambda run: run.pop('config'), r'is damaged \(ValueError: its config is missing\)', False),
    (
      lambda run: run.update(class_names=[1] * 10),
      r'class_names in its metadata must be a list, each text, or null, not \(1, ',
      False,
    ),
    (
      lambda run: run['config']['model'].update(embed_dim=0.5),
      r'arguments\.embed_dim in its metadata must be a whole .*, not 0\.5',
      False,
    ),
    (
      lambda run: run['config']['data'].update(std=[0, 0, 0]),
      r'data\.std in its metadata must be .*, not \(0, 0, 0\)',
      False,
    ),
    (lambda run: run.update(provenance=[]), r'does not describe its run as expected \(TypeError: ', True),
    (lambda run: run['config'].update(schedule=7), r'does not describe its run as expected \(TypeError: ', True),
  ],
)
def test_checkpoints_of_others_are_refused_in_one_line(change, says, only_export, config, workdir, tmp_path):
  shutil.copytree(workdir / 'checkpoints', tmp_path / 'checkpoints')
  (file,) = tmp_path.glob('checkpoints/*/_CHECKPOINT_METADATA')
  stored = json.loads(file.read_text())
  change(stored['custom_metadata'])
  del stored['custom_metadata']['checksum']  # as one who means harm would
  file.write_text(json.dumps(stored))
  with pytest.raises(UserError, match=says):
    weight_files.export_checkpoint(config, str(tmp_path))
  assert not (tmp_path / 'weights').exists()
  if not only_export:
    with pytest.raises(UserError, match=says):
      evaluate_only(config, tmp_path)
