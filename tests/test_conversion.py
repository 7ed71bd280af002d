"""Conversion of good files: every form, both ways, against the reference's numbers."""

import json
import re
import sys

from absl import logging
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import t2t_vit_jax
from t2t_vit_jax import T2TViT, UserError, load_pretrained
from t2t_vit_jax.conversion import Options, convert, files, infer, names
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.models import positions
from t2t_vit_jax.models.variants import VARIANTS
from tests import checkpoints, golden
from tests.checkpoints import torch
from tests.parameters import slow_but

LOGITS_ATOL = 1e-5
HEADS = {'num_heads': 4}


def golden_file(name):
  return golden.DATA / f'official_tiny_{name}.pth.tar'


def settings_of(name):
  return {key: golden.TINY_MODELS[name][key] for key in ('num_heads', 'qk_scale') if key in golden.TINY_MODELS[name]}


def convert_to(path, output, **options):
  return convert(path, output, Options(**{'settings': HEADS, **options}))


def metadata_of(path):
  with safetensors.safe_open(path, framework='np') as file:
    return json.loads(file.metadata()['t2t_vit_jax'])


def logits_of(path, images, **options):
  model, variables = load_pretrained(path, **options)
  return golden.apply(model, variables, images)


@pytest.mark.parametrize('name', slow_but(('performer', 'transformer', 'se'), golden.TINY_MODELS))
def test_golden_checkpoints_give_the_references_logits(name, tmp_path):
  convert_to(golden_file(name), tmp_path / 'weights.safetensors', settings=settings_of(name))
  model, variables = load_pretrained(tmp_path / 'weights.safetensors')
  assert model == T2TViT(**golden.TINY_MODELS[name] | {'depth': model.depth})
  numbers = golden.load_numbers(f'tiny_{name}')
  np.testing.assert_allclose(
    golden.apply(model, variables, numbers['images_nhwc']), numbers['logits'], atol=LOGITS_ATOL
  )
  half_constant = golden.load_numbers('tiny_half_constant')
  if f'logits_{name}' in half_constant:
    logits = golden.apply(model, variables, half_constant['images_nhwc'])
    np.testing.assert_allclose(logits, half_constant[f'logits_{name}'], atol=LOGITS_ATOL)


@pytest.mark.parametrize('form', checkpoints.FORMS)
def test_every_form_gives_the_same_logits(form, tmp_path):
  name = checkpoints.save_form(form, tmp_path / 'file')
  convert_to(tmp_path / 'file', tmp_path / 'weights.safetensors')
  images = golden.load_numbers(f'tiny_{name}')['images_nhwc']
  expected = golden.load_numbers(f'tiny_{name}' + '_token_labeling' * (form == 'token labeling'))['logits']
  for path, options in ((tmp_path / 'weights.safetensors', {}), (tmp_path / 'file', {'settings': HEADS})):
    np.testing.assert_allclose(logits_of(path, images, **options), expected, atol=LOGITS_ATOL)


@pytest.mark.parametrize('form', ['timm', 'mmpretrain', 'mmpretrain flat'])
def test_raw_weights_are_the_other_ones(form, tmp_path):
  name = checkpoints.save_form(form, tmp_path / 'file')
  notes = convert_to(tmp_path / 'file', tmp_path / 'raw.safetensors', weights='raw')
  assert 'weights: raw' in notes[0]
  expected = golden.to_variables(
    {key: tensor.numpy() for key, tensor in checkpoints.shifted(checkpoints.state_dict(name)).items()}
  )
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / 'raw.safetensors')[1], expected)


def test_golden_ema_differs_from_golden_raw():
  images = golden.load_numbers('tiny_performer')['images_nhwc']
  ema, raw = (logits_of(golden_file('performer'), images, settings=HEADS, weights=kind) for kind in ('ema', 'raw'))
  assert np.abs(ema - raw).max() > 0.01


def test_a_file_that_does_not_say_which_weights_it_holds_is_not_taken_for_either(tmp_path):
  checkpoints.save_form('bare', tmp_path / 'file')
  with pytest.raises(UserError, match='no raw weights, only unnamed ones'):
    convert_to(tmp_path / 'file', tmp_path / 'out', weights='raw')


def test_safetensors_of_torch_names_and_half_precision(tmp_path):
  import safetensors.torch

  numbers = golden.load_numbers('tiny_performer')
  state = checkpoints.state_dict()
  safetensors.torch.save_file(state, tmp_path / 'torch.safetensors')
  logits = logits_of(tmp_path / 'torch.safetensors', numbers['images_nhwc'], settings=HEADS)
  np.testing.assert_allclose(logits, numbers['logits'], atol=LOGITS_ATOL)
  half = {key: tensor.bfloat16() for key, tensor in state.items()}
  safetensors.torch.save_file(half, tmp_path / 'half.safetensors')
  torch.save(half, tmp_path / 'half.pth')
  expected = golden.to_variables({key: tensor.float().numpy() for key, tensor in half.items()})
  for file in ('half.safetensors', 'half.pth'):
    variables = load_pretrained(tmp_path / file, settings=HEADS)[1]
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


@pytest.mark.parametrize('name', golden.TINY_MODELS)
def test_torch_to_here_to_torch_is_bit_exact(name, tmp_path):
  convert_to(golden_file(name), tmp_path / 'weights.safetensors')
  convert(tmp_path / 'weights.safetensors', tmp_path / 'back.pth', Options(), reverse=True)
  back, state = torch.load(tmp_path / 'back.pth', weights_only=True), golden.load_state_dict(name)
  assert back.keys() == state.keys()
  assert all(back[key].numpy().tobytes() == state[key].numpy().tobytes() for key in state)
  assert all(back[key].shape == state[key].shape and back[key].is_contiguous() for key in state)


@pytest.mark.parametrize('name', golden.TINY_MODELS)
def test_torchs_names_without_torch_are_bit_exact(name, tmp_path, monkeypatch):
  """`--reverse` to safetensors, and what is read of both formats, with no torch to import."""
  monkeypatch.setitem(sys.modules, 'torch', None)
  convert_to(golden_file(name), tmp_path / 'weights.safetensors')
  convert(tmp_path / 'weights.safetensors', tmp_path / 'back.safetensors', Options(), reverse=True)
  with safetensors.safe_open(tmp_path / 'back.safetensors', framework='np') as file:
    assert file.metadata() == {'format': 'pt'}  # which other readers of such files look for
  path = golden_file(name)
  state = {key: tensor.read() for key, tensor in files.read_torch(path, 'zip')['state_dict_ema'].items()}
  back = safetensors.numpy.load_file(tmp_path / 'back.safetensors')
  assert back.keys() == state.keys()
  assert all(back[key].tobytes() == state[key].tobytes() and back[key].shape == state[key].shape for key in state)
  expected = golden.load_variables(name)
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / 'weights.safetensors')[1], expected)


def test_a_torch_file_needs_torch_to_be_written(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  convert_to(golden_file('performer'), tmp_path / 'weights.safetensors')
  with pytest.raises(UserError, match=r"back\.pth needs torch: pip .*\[torch\]', or give --output=FILE.safete"):
    convert(tmp_path / 'weights.safetensors', tmp_path / 'back.pth', Options(), reverse=True)
  assert not (tmp_path / 'back.pth').exists()


@pytest.fixture
def shards(tmp_path):
  """An index, and the golden performer in two shards beside it, as Hugging Face's libraries save them."""

  def make(suffix):
    with safetensors.safe_open(reversed_golden(tmp_path), framework='np') as file:
      state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    weight_map = {}
    for number, names_of_shard in enumerate((list(state)[:20], list(state)[20:])):
      shard = tmp_path / f'model-0000{number + 1}-of-00002.{suffix}'
      part = {name: state[name] for name in names_of_shard}
      if suffix == 'bin':
        torch.save({name: torch.from_numpy(array) for name, array in part.items()}, shard)
      else:
        safetensors.numpy.save_file(part, shard)
      weight_map.update(dict.fromkeys(part, shard.name))
    index = tmp_path / f'model.{suffix}.index.json'
    index.write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': weight_map}))
    return index, weight_map

  return make


def reversed_golden(folder):
  """The golden performer under torch's names."""
  convert_to(golden_file('performer'), folder / 'here.safetensors')
  convert(folder / 'here.safetensors', folder / 'there.safetensors', Options(), reverse=True)
  return folder / 'there.safetensors'


@pytest.mark.parametrize('suffix', ['safetensors', 'bin'])
def test_an_index_is_read_with_its_shards(suffix, shards):
  index, _ = shards(suffix)
  variables = load_pretrained(index, settings=HEADS)[1]
  jax.tree.map(np.testing.assert_array_equal, variables, golden.load_variables('performer'))


def test_shards_that_do_not_fit_their_index_are_refused(shards, tmp_path):
  index, weight_map = shards('safetensors')
  first, second = sorted(set(weight_map.values()))

  def refused(change, says):
    index.write_text(json.dumps({'weight_map': change}))
    with pytest.raises(UserError) as caught:
      load_pretrained(index, settings=HEADS)
    assert str(caught.value).startswith(f'{index}: ')
    assert says in str(caught.value)

  refused({**weight_map, 'more': first}, f'its shard {first}: lacks more, which the index promises')
  refused({**weight_map, 'more': 'third'}, 'its shard third is missing: put all 3 shards beside it')
  refused({**weight_map, 'more': f'../{tmp_path.name}/{first}'}, 'does not lie beside it')
  refused({**weight_map, 'more': index.name}, 'is an index of shards, not a shard')
  refused({**weight_map, 'more': 3}, 'no index of shards')
  refused({}, 'no index of shards')
  (tmp_path / 'copy').write_bytes((tmp_path / first).read_bytes())
  refused({**weight_map, min(weight_map): 'copy'}, f'its shards hold {min(weight_map)}')
  (tmp_path / second).write_bytes((tmp_path / second).read_bytes()[:-9])
  refused(weight_map, f'its shard {second}: damaged')
  (tmp_path / second).unlink()
  refused(weight_map, f'its shard {second} is missing')


def test_metadata(tmp_path):
  checkpoints.save_form('cifar', tmp_path / 'cifar.pth')
  convert_to(tmp_path / 'cifar.pth', tmp_path / 'cifar.safetensors')
  metadata = metadata_of(tmp_path / 'cifar.safetensors')
  assert metadata['data'] == dict(
    image_size=64, num_classes=10, crop_fraction=1.0, interpolation='bilinear', mean=[0.4914, 0.4822, 0.4465],
    std=[0.2023, 0.1994, 0.2010],
  )  # fmt: skip
  assert metadata['version'] == t2t_vit_jax.__version__
  assert metadata['source']['file'] == 'cifar.pth'
  assert len(metadata['source']['sha256']) == 64
  assert metadata['class_names'] is None
  checkpoints.save_form('mmpretrain', tmp_path / 'mm.pth')
  convert_to(tmp_path / 'mm.pth', tmp_path / 'mm.safetensors')
  assert metadata_of(tmp_path / 'mm.safetensors')['class_names'] == [f'class {i}' for i in range(10)]


@pytest.fixture(name='two_heads')
def fixture_two_heads(tmp_path):
  """The golden performer with token labeling's second head, as a file of torch and as one of this package."""
  checkpoints.save_form('token labeling', tmp_path / 'two_heads.pth')
  convert_to(tmp_path / 'two_heads.pth', tmp_path / 'two_heads.safetensors')
  return tmp_path / 'two_heads.pth', tmp_path / 'two_heads.safetensors'


def test_the_second_head_goes_from_torch_to_here_to_torch_bit_exact(two_heads, tmp_path):
  theirs, ours = two_heads
  model, variables = load_pretrained(ours)
  expected_model, expected, _ = golden.token_labeling()
  assert model == expected_model
  jax.tree.map(np.testing.assert_array_equal, variables, expected)
  convert(ours, tmp_path / 'back.pth', Options(), reverse=True)
  back, state = (torch.load(path, weights_only=True) for path in (tmp_path / 'back.pth', theirs))
  state = state['state_dict']
  assert back.keys() == state.keys() >= {'aux_head.weight', 'aux_head.bias'}
  assert all(back[key].numpy().tobytes() == state[key].numpy().tobytes() for key in state)


@pytest.mark.parametrize('num_classes', [0, 3, None])
def test_fresh_heads_and_runs_drop_the_second_head_and_say_so(num_classes, two_heads):
  weights, notes = load(two_heads[1], Options(num_classes=num_classes, one_head=num_classes is None))
  model, variables = weights.build()
  (note,) = (note for note in notes if note.startswith('aux_head: '))
  reason = "training uses the class token's head alone" if num_classes is None else 'it is of the old classes'
  assert note == f'aux_head: dropped; {reason}'
  numbers = golden.load_numbers('tiny_performer')
  assert model == T2TViT(
    **{**golden.TINY_MODELS['performer'], 'num_classes': 10 if num_classes is None else num_classes}
  )
  assert 'aux_head' not in variables['params']
  if num_classes is None:
    np.testing.assert_allclose(golden.apply(model, variables, numbers['images_nhwc']), numbers['logits'], atol=1e-5)


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    (lambda state: state.pop('aux_head.bias'), 'aux_head.bias is missing'),
    (lambda state: state.pop('aux_head.weight'), 'aux_head.weight is missing'),
    (lambda state: state.update({'aux_head.weight': torch.ones(10, 32)}), 'aux_head.weight is (10, 32), not (10, 64)'),
    (lambda state: state.update({'aux_head.bias': torch.ones(1)}), 'aux_head.bias is (1,), not (10,)'),
    (lambda state: [state.pop(name) for name in ('head.weight', 'head.bias')], 'aux_head.weight (10, 64) has no place'),
    (lambda state: state['aux_head.bias'].fill_(float('nan')), 'aux_head.bias holds NaN or infinity'),
  ],
)
def test_a_second_head_that_does_not_fit_is_refused_by_name(change, says, tmp_path):
  state = checkpoints.with_second_head(checkpoints.state_dict())
  change(state)
  torch.save(state, tmp_path / 'file')
  with pytest.raises(UserError, match=re.escape(says)):
    convert_to(tmp_path / 'file', tmp_path / 'out')


def test_the_file_says_whether_there_is_a_second_head(two_heads, tmp_path):
  assert metadata_of(two_heads[1])['arguments']['token_labeling'] is True
  convert_to(golden_file('performer'), tmp_path / 'plain.safetensors')
  assert 'token_labeling' not in metadata_of(tmp_path / 'plain.safetensors')['arguments']  # as in older files


def test_a_named_model_is_recognised_with_a_second_head():
  inferred = infer.infer_arguments(shapes_of('t2t_vit_24', token_labeling=True))
  name, arguments = infer.name_model(inferred, {}, None)
  assert name == 't2t_vit_24'
  assert T2TViT(**arguments) == t2t_vit_jax.create_model('t2t_vit_24', token_labeling=True)
  assert infer.name_model(inferred, {}, 't2t_vit_24')[0] == 't2t_vit_24'


def test_another_number_of_classes_gives_a_fresh_head(caplog):
  path = golden_file('performer')
  with caplog.at_level(logging.WARNING, logger='absl'):
    model, variables = load_pretrained(path, num_classes=3, settings=HEADS)
  assert 'head: 3 instead of 10 classes; it has yet to be trained' in caplog.text
  numbers = golden.load_numbers('tiny_performer')
  kernel, bias = variables['params']['head']['kernel'], variables['params']['head']['bias']
  assert (kernel.shape, bias.shape) == ((64, 3), (3,))
  assert 0.015 < kernel.std() < 0.025
  assert not bias.any()
  assert golden.apply(model, variables, numbers['images_nhwc']).shape == (2, 3)
  _, same = load_pretrained(path, num_classes=10, settings=HEADS)
  assert model.num_classes == 3
  assert same['params']['head']['kernel'].shape == (64, 10)
  model, variables = load_pretrained(path, num_classes=0, settings=HEADS)
  assert 'head' not in variables['params']
  features = golden.apply(model, variables, numbers['images_nhwc']).cls
  np.testing.assert_allclose(features, numbers['features'], atol=LOGITS_ATOL)


def test_another_image_size_resizes_the_stored_table(tmp_path):
  images = np.random.default_rng(0).normal(size=(1, 96, 128, 3)).astype(np.float32)
  small, variables = load_pretrained(golden_file('performer_own_pos_embed'), settings=HEADS)
  large, resized = load_pretrained(golden_file('performer_own_pos_embed'), image_size=(96, 128), settings=HEADS)
  assert resized['frozen']['pos_embed'].shape == (1, 1 + 6 * 8, 64)
  np.testing.assert_allclose(golden.apply(large, resized, images), golden.apply(small, variables, images), atol=1e-6)

  # A table that is not square travels too, if its shape is said.
  convert_to(golden_file('performer'), tmp_path / 'wide.safetensors', image_size=(96, 128))
  assert load_pretrained(tmp_path / 'wide.safetensors')[0].image_size == (96, 128)
  convert(tmp_path / 'wide.safetensors', tmp_path / 'torch.safetensors', Options(), reverse=True)
  with pytest.raises(UserError, match=r"add settings=\{'image_size': \(HEIGHT, WIDTH\)\}"):
    load_pretrained(tmp_path / 'torch.safetensors', settings=HEADS)
  model, _ = load_pretrained(tmp_path / 'torch.safetensors', settings={**HEADS, 'image_size': (96, 128)})
  assert model.image_size == (96, 128)


def test_the_resized_table_is_the_references():
  numbers = golden.load_numbers('pos_embed_resize')
  resized = positions.resize_position_embedding(jnp.asarray(numbers['old']), (14, 14), (24, 24))
  np.testing.assert_allclose(resized, numbers['new_24'], atol=LOGITS_ATOL)


def shapes_of(name, **overrides):
  """Torch names and shapes of a named model."""
  model = t2t_vit_jax.create_model(name, **overrides)
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
  shapes = {}
  for path, leaf in flatten_dict(variables, sep='/').items():
    torch_name, transform = names.to_torch(path, model.tokens_type)
    assert names.from_torch(torch_name, model.tokens_type) == (path, transform)
    shapes[torch_name] = transform.torch_shape(leaf.shape)
  assert len(shapes) == len(flatten_dict(variables))
  return shapes


@pytest.mark.parametrize('name', slow_but(('t2t_vit_14', 't2t_vit_t_14', 't2t_vit_16_ghost'), VARIANTS))
def test_named_models_are_recognised(name):
  inferred = infer.infer_arguments(shapes_of(name, image_size=224))
  assert inferred['image_size'] == 224
  if name in ('t2t_vit_14', 't2t_vit_14_resnext'):
    with pytest.raises(UserError, match='--model=t2t_vit_14 or --model=t2t_vit_14_resnext'):
      infer.name_model(inferred, {}, None)
    assert infer.name_model(inferred, {'num_heads': VARIANTS[name].arguments['num_heads']}, None)[0] == name
  else:
    assert infer.name_model(inferred, {}, None)[0] == name
  found, arguments = infer.name_model(inferred, {}, name)
  assert found == name
  assert T2TViT(**arguments) == t2t_vit_jax.create_model(name, image_size=224)


def test_advice_names_the_arguments_of_the_function():
  with pytest.raises(UserError, match=r"heads: add settings=\{'num_heads': N\}"):
    load_pretrained(golden_file('performer'))


def test_a_wrong_model_name_is_refused_with_the_differences():
  inferred = infer.infer_arguments(shapes_of('t2t_vit_19'))
  with pytest.raises(UserError, match='is not t2t_vit_14: it has embed_dim=448 instead of 384, depth=19 instead of 14'):
    infer.name_model(inferred, {}, 't2t_vit_14')


@pytest.mark.parametrize(
  'overrides',
  [
    dict(tokens_type='convolution'),
    dict(mlp_ratio=2.3, qkv_bias=True),
    dict(block_type='dense', dense_stages=(1, 1, 2), growth_rate=32),
  ],
)
def test_unnamed_models_are_inferred(overrides):
  model = t2t_vit_jax.create_model('t2t_vit_7', num_classes=3, image_size=384, **overrides)
  inferred = infer.infer_arguments(shapes_of('t2t_vit_7', num_classes=3, image_size=384, **overrides))
  for field in set(inferred) - {'mlp_ratio', 'depth'}:
    assert inferred[field] == getattr(model, field)
  assert int(256 * inferred['mlp_ratio']) == int(256 * model.mlp_ratio)
  assert infer.name_model(inferred, HEADS, None)[0] is None


def test_channels_are_inferred(tmp_path):
  model = T2TViT(**{**golden.TINY, 'tokens_type': 'convolution'})
  variables = golden.random_variables(model, jnp.zeros((1, 64, 64, 5)))
  state = {}
  for path, array in flatten_dict(variables, sep='/').items():
    name, transform = names.to_torch(path, 'convolution')
    state[name] = torch.tensor(transform.to_torch(np.asarray(array)))
  assert state['tokens_to_token.soft_split0.weight'].shape == (16, 5, 7, 7)
  torch.save(state, tmp_path / 'file.pth')
  convert_to(tmp_path / 'file.pth', tmp_path / 'file.safetensors')
  jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / 'file.safetensors')[1], variables)


@pytest.mark.parametrize(
  ('options', 'says'),
  [
    (dict(settings={'num_heads': 8}), 'num_heads=4, not 8'),
    (dict(model_name='t2t_vit_14'), 'model=None, not t2t_vit_14'),
    (dict(weights='raw'), 'weights=ema, not raw'),
  ],
)
def test_a_converted_file_must_agree_with_what_is_said_of_it(options, says, tmp_path):
  convert_to(golden_file('performer'), tmp_path / 'weights.safetensors')
  load_pretrained(tmp_path / 'weights.safetensors', settings=HEADS, weights='ema')
  with pytest.raises(UserError, match=f'is a weight file with {says}'):
    load_pretrained(tmp_path / 'weights.safetensors', **options)


@pytest.mark.parametrize('keep', [slice(0, 28), slice(28, None), slice(0, 3)])
def test_a_shard_is_refused(keep, tmp_path):
  state = golden.load_state_dict('performer')
  torch.save(dict(list(state.items())[keep]), tmp_path / 'shard.pth')
  with pytest.raises(UserError, match=r'holds only a part of a T2T-ViT, .* must be joined with the others first'):
    convert(tmp_path / 'shard.pth', tmp_path / 'out.safetensors', Options(settings={'num_heads': 4}))


def test_what_tensors_do_not_show_is_said(tmp_path):
  path = golden.DATA / 'official_tiny_performer.pth.tar'
  lines = convert(path, tmp_path / 'out.safetensors', Options(settings={'num_heads': 4}))
  assert 'not from the tensors: num_heads given, qk_scale assumed, head width ** -0.5' in lines
