"""Files that are damaged or hostile: one line of error that names them, and nothing written or executed."""

import argparse
import json
import pathlib

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from t2t_vit_jax import UserError, load_pretrained
from t2t_vit_jax.conversion import Options, convert, files
from t2t_vit_jax.conversion.weight_format import check_field
from t2t_vit_jax.data.decoding import ORIENTATIONS
from t2t_vit_jax.data.transforms import INTERPOLATIONS
from t2t_vit_jax.predict import open_classifier
from tests import checkpoints, golden, mutate_checkpoints
from tests.checkpoints import torch
from tests.small_disk import fill, small_disk

OPTIONS = Options(settings={'num_heads': 4})


def assert_refused(path, output, options=OPTIONS, says=''):
  before = set(output.parent.iterdir())
  with pytest.raises(UserError) as caught:
    convert(path, output, options)
  message = str(caught.value)
  assert message.isprintable()  # so one line
  assert message.startswith(f'{path}: ')
  assert says in message
  assert set(output.parent.iterdir()) == before
  return message


@pytest.mark.parametrize('damage', checkpoints.BAD)
def test_bad_files_are_refused(damage, tmp_path):
  path = tmp_path / 'weights.pth'
  says = checkpoints.save_bad(damage, path)
  assert_refused(path, tmp_path / 'out.safetensors', says=says)
  assert not list(tmp_path.glob('*.executed'))


def test_all_faults_are_listed_at_once(tmp_path):
  state = checkpoints.state_dict()
  del state['cls_token']
  state['norm.bias'][3] = np.inf
  state['head.weight'] = state['head.weight'].T.contiguous()
  state['gate'] = torch.ones(3)
  torch.save(state, tmp_path / 'file')
  message = assert_refused(tmp_path / 'file', tmp_path / 'out')
  for fault in ('cls_token is missing', 'norm.bias holds NaN', 'head.weight is (64, 10), not (10, 64)', 'gate (3,)'):
    assert fault in message


def damaged(state, name, damage):
  """`state` with one tensor damaged in a way that its shape or values show; None if this one can't be."""
  tensor = state[name]
  if damage == 'missing':
    del state[name]
  elif damage == 'extra':
    state[f'{name}.extra'] = tensor
  elif damage == 'transposed':
    if tensor.ndim < 2 or tensor.shape == tensor.T.shape:
      return None
    state[name] = tensor.T.contiguous()
  elif damage == 'wider':
    state[name] = torch.cat([tensor, tensor], dim=-1)
  elif damage == 'axis':
    state[name] = tensor[None]
  elif damage == 'scalar':
    state[name] = tensor.flatten()[0].clone()
  else:
    tensor.view(-1)[tensor.numel() // 2] = float(damage)
  return state


@pytest.mark.filterwarnings('ignore:The use of `x.T` on tensors')
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_tensor_is_named(tmp_path, data):
  model = data.draw(st.sampled_from(sorted(golden.TINY_MODELS)))
  state = checkpoints.state_dict(model)
  name = data.draw(st.sampled_from(sorted(state)))
  damage = data.draw(
    st.sampled_from(['missing', 'extra', 'transposed', 'wider', 'axis', 'scalar', 'nan', 'inf', '-inf'])
  )
  state = damaged(state, name, damage)
  if state is None or (name, damage) == ('head.bias', 'wider'):  # which of the head's two tensors is right?
    return
  torch.save({'state_dict_ema': state}, tmp_path / 'file')
  assert_refused(tmp_path / 'file', tmp_path / 'out', says=name)


def test_random_mutations_convert_or_are_refused(tmp_path):
  outcomes = mutate_checkpoints.run(tmp_path, count=60, seed=1)
  assert sum(outcomes.values()) == 60
  assert outcomes['refused'] > 20


def test_what_other_libraries_allow_stays_refused(tmp_path):
  torch.save({'x': pathlib.PurePosixPath('a')}, tmp_path / 'file')
  torch.serialization.add_safe_globals([pathlib.PurePosixPath, argparse.Namespace])
  assert_refused(tmp_path / 'file', tmp_path / 'out', says='pathlib.PurePosixPath')


# ------------------------------------------------------------------ our own files


def converted(tmp_path):
  """(arrays, metadata) of a converted file."""
  checkpoints.save_form('bare', tmp_path / 'file')
  convert(tmp_path / 'file', tmp_path / 'good.safetensors', OPTIONS)
  return (
    files.read_safetensors(tmp_path / 'good.safetensors'),
    json.loads(files.read_metadata(tmp_path / 'good.safetensors')['t2t_vit_jax']),
  )


def set_argument(field, value):
  return lambda arrays, metadata: metadata['arguments'].update({field: value})


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    (lambda arrays, metadata: arrays.pop('params/norm/bias'), 'params/norm/bias is missing'),
    (lambda arrays, metadata: arrays.update(extra=np.ones(2, np.float32)), 'extra (2,) has no place'),
    (lambda arrays, metadata: arrays.update({'params/head/bias': np.ones(3, np.float32)}), 'params/head/bias is (3,)'),
    (lambda arrays, metadata: arrays['params/norm/bias'].fill(np.nan), 'params/norm/bias holds NaN'),
    (lambda arrays, metadata: arrays.update({'params/norm/bias': np.zeros(64)}), 'params/norm/bias is of type F64'),
    (lambda arrays, metadata: arrays.pop('frozen/pos_embed'), 'frozen/pos_embed'),
    (lambda arrays, metadata: metadata.pop('arguments'), 'metadata'),
    (lambda arrays, metadata: metadata.update(surprise=1), 'surprise'),
    (set_argument('depth', 10**7), 'blocks'),
    (set_argument('image_size', 2**16), 'frozen/pos_embed'),
    (set_argument('embed_dim', 10**7), 'frozen/pos_embed'),
    (set_argument('num_heads', 3), 'num_heads must divide'),
    (
      set_argument('depth', 10**9),
      'arguments.depth in its metadata must be a whole number from 1 to 16777216, not 1000000000',
    ),
    (
      set_argument('image_size', 10**6),
      'arguments.image_size in its metadata must be a number of px, or two, not 1000000',
    ),
    (set_argument('num_heads', 'many'), 'arguments.num_heads in its metadata must be a whole number'),
    (set_argument('qkv_bias', 'false'), "arguments.qkv_bias in its metadata must be true or false, not 'false'"),
    (set_argument('qk_scale', np.nan), 'arguments.qk_scale in its metadata must be a number from'),
    (set_argument('mlp_ratio', 1e308), 'arguments.mlp_ratio in its metadata must be a number from'),
    (set_argument('norm_layer', 'eval'), 'unknown fields, as of a newer version: arguments.norm_layer'),
    (set_argument('dtype', 'bfloat16'), 'unknown fields'),
    (set_argument('tokens_type', 'other'), 'tokens_type'),
    (lambda arrays, metadata: metadata['arguments'].pop('num_heads'), 'lack arguments.num_heads'),
    (
      lambda arrays, metadata: metadata['data'].update(std=[1, 0, 1]),
      'data.std in its metadata must be a list of 1 or 3',
    ),
    (
      lambda arrays, metadata: metadata['data'].update(mean='grey'),
      'data.mean in its metadata must be a list of 1 or 3',
    ),
    (lambda arrays, metadata: metadata['data'].pop('crop_fraction'), 'lack data.crop_fraction: it must be a number'),
    (
      lambda arrays, metadata: metadata['data'].update(interpolation=['x']),
      "must be 'bilinear' or 'bicubic', not ('x',)",
    ),
    (
      lambda arrays, metadata: metadata['data'].update(orientation=1),
      "data.orientation in its metadata must be 'upright' or 'ignored', not 1",
    ),
    (
      lambda arrays, metadata: metadata.update(class_names=['a'] * 9),
      'class_names in its metadata are 9, of 10 classes',
    ),
    (
      lambda arrays, metadata: metadata.update(class_names=[1] * 10),
      'class_names in its metadata must be a list, each text, or null',
    ),
    (lambda arrays, metadata: metadata.update(source='x'), "source in its metadata must be an object, not 'x'"),
    (
      lambda arrays, metadata: metadata.update(source={'weights': 7}),
      "source.weights in its metadata must be 'ema' or 'raw', or null, not 7",
    ),
  ],
)
def test_own_files_are_checked_too(change, says, tmp_path):
  arrays, metadata = converted(tmp_path)
  change(arrays, metadata)
  safetensors.numpy.save_file(arrays, tmp_path / 'bad.safetensors', {'t2t_vit_jax': json.dumps(metadata)})
  assert_refused(tmp_path / 'bad.safetensors', tmp_path / 'out', options=Options(), says=says)


def test_metadata_that_is_not_json(tmp_path):
  arrays, _ = converted(tmp_path)
  safetensors.numpy.save_file(arrays, tmp_path / 'bad.safetensors', {'t2t_vit_jax': '[' * 100_000})
  assert_refused(tmp_path / 'bad.safetensors', tmp_path / 'out', options=Options(), says='metadata')


def test_damaged_headers_are_refused_or_used(tmp_path):
  """Opens classifiers only: `python -m tests.mutate_checkpoints headers` uses every tool."""

  def use(path, image):
    classifier = open_classifier(path)
    pixels = np.asarray(classifier.prepare(Image.open(image)))[None]
    assert np.isfinite(classifier.normalize(pixels)).all()
    assert len(classifier.class_names) == classifier.model.num_classes

  outcomes = mutate_checkpoints.run_headers(tmp_path, 40, 0, use)
  assert min(outcomes['used'], outcomes['refused']) > 9


def test_words_of_a_header_are_those_of_the_data():
  for field, table in (('interpolation', INTERPOLATIONS), ('orientation', ORIENTATIONS)):
    for word in table:
      check_field(f'data.{field}', word, field)
    with pytest.raises(UserError, match=f"^{field} must be {' or '.join(map(repr, table))}, not 'other'$"):
      check_field(f'data.{field}', 'other', field)


# ------------------------------------------------------------------ the output


def test_an_output_is_overwritten_only_by_force(tmp_path):
  checkpoints.save_form('bare', tmp_path / 'file')
  output = tmp_path / 'out.safetensors'
  output.write_text('precious')
  with pytest.raises(UserError, match='exists already; --force'):
    convert(tmp_path / 'file', output, OPTIONS)
  assert output.read_text() == 'precious'
  convert(tmp_path / 'file', output, OPTIONS, force=True)
  load_pretrained(output)


def test_names_too_long_for_the_file_system(tmp_path):
  checkpoints.save_form('bare', tmp_path / 'file')
  assert_refused(tmp_path / ('x' * 300), tmp_path / 'out', says='cannot be read')
  with pytest.raises(UserError, match='cannot be written'):
    convert(tmp_path / 'file', tmp_path / ('x' * 300), OPTIONS)
  convert(tmp_path / 'file', tmp_path / ('x' * 255), OPTIONS)


@pytest.mark.parametrize('output', ['folder', 'missing/out.safetensors'])
def test_an_output_that_cannot_be_is_refused_first(output, tmp_path):
  (tmp_path / 'folder').mkdir()
  with pytest.raises(UserError, match='cannot be written'):
    convert(tmp_path / 'no such input', tmp_path / output, OPTIONS)


@pytest.mark.parametrize('reverse', [False, True])
def test_a_full_disk_keeps_what_was_there_and_one_line_says_what_is_free(reverse, tmp_path):
  with small_disk(tmp_path):
    checkpoints.save_form('bare', tmp_path / 'file')
    output = tmp_path / 'out'
    output.write_text('before')
    fill(tmp_path, 20_480)
    needed = r'at least \d+\.\d kB are needed, 20\.5 kB are free'
    with pytest.raises(UserError, match=rf'out: cannot be written: the disk is full: {needed}') as caught:
      convert(tmp_path / 'file', output, OPTIONS, reverse=reverse, force=True)
    assert '\n' not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'filler', 'out']
    assert output.read_text() == 'before'
