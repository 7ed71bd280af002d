"""The whole model against the reference's numbers."""

import functools
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from t2t_vit_jax import Features, HeadLogits, T2TViT, UserError
from t2t_vit_jax.models.blocks import stack_blocks, unstack_blocks
from t2t_vit_jax.models.positions import resize_position_embedding
from t2t_vit_jax.models.t2t_vit import classify
from t2t_vit_jax.planning.flops import count_flops
from tests import golden
from tests.parameters import slow

LOGITS_ATOL = 1e-5
GRADIENT_RTOL = 2e-5  # of the tensor's largest entry


def tiny(name, **overrides):
  return T2TViT(**{**golden.TINY_MODELS[name], **overrides})


@pytest.mark.parametrize('name', golden.TINY_MODELS)
def test_parameters_have_the_references_names_and_shapes(name):
  fresh = jax.eval_shape(tiny(name).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  assert jax.tree.map(jnp.shape, golden.load_variables(name)) == jax.tree.map(lambda x: x.shape, dict(fresh))


@pytest.mark.parametrize('name', golden.TINY_MODELS)
def test_logits_equal_the_references(name, strict_dtypes):
  numbers = golden.load_numbers(f'tiny_{name}')
  logits = golden.apply(tiny(name), golden.load_variables(name), numbers['images_nhwc'])
  np.testing.assert_allclose(logits, numbers['logits'], atol=LOGITS_ATOL)


def test_both_heads_of_token_labeling_equal_the_references(strict_dtypes):
  model, variables, numbers = golden.token_labeling()
  images = golden.load_numbers('tiny_performer')['images_nhwc']
  head_logits = golden.apply(model, variables, images, head_logits=True)
  assert isinstance(head_logits, HeadLogits)
  np.testing.assert_allclose(head_logits.cls, numbers['head_logits'], atol=LOGITS_ATOL)
  np.testing.assert_allclose(head_logits.tokens, numbers['token_logits'], atol=LOGITS_ATOL)
  np.testing.assert_allclose(golden.apply(model, variables, images), numbers['logits'], atol=LOGITS_ATOL)
  assert np.abs(numbers['logits'] - numbers['head_logits']).max() > 0.1
  features = golden.apply(model, variables, images, features=True)
  np.testing.assert_allclose(classify(model, variables, features), numbers['logits'], atol=LOGITS_ATOL)


def test_training_mode_uses_the_first_head_alone():
  model, variables, numbers = golden.token_labeling()
  model = model.clone(performer_dropout_rate=0.0)
  images = golden.load_numbers('tiny_performer')['images_nhwc']
  fresh = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), images)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda x: x.shape, dict(fresh))

  def loss_of(params):
    logits = model.apply({**variables, 'params': params}, images, train=True)
    return logits.sum(), logits

  (_, logits), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(variables['params'])
  np.testing.assert_allclose(logits, numbers['head_logits'], atol=LOGITS_ATOL)
  assert not any(x.any() for x in jax.tree.leaves(gradients['aux_head']))
  assert np.all(gradients['head']['bias'] == 2)  # of two images


def test_the_second_head_costs_nothing_where_it_is_not_used():
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  plain, two_heads = tiny('performer'), tiny('performer', token_labeling=True)

  def program(model, **options):
    variables = golden.shapes_of(model, images)
    variables = {**variables, 'params': {key: x for key, x in variables['params'].items() if key != 'aux_head'}}
    rngs = {'dropout': jax.random.key(0)}
    return jax.jit(functools.partial(model.apply, rngs=rngs, **options)).lower(variables, images).as_text()

  assert program(two_heads, train=True) == program(plain, train=True)
  assert program(two_heads, features=True) == program(plain, features=True)
  assert 'aux_head' not in jax.eval_shape(two_heads.clone(num_classes=0).init, jax.random.key(0), images)['params']


@pytest.mark.parametrize(
  ('fields', 'options'),
  [({}, {}), ({'token_labeling': True}, {'features': True}), ({'token_labeling': True, 'num_classes': 0}, {})],
)
def test_logits_of_a_second_head_that_is_not_there_are_refused(fields, options):
  model, images = tiny('performer', **fields), jnp.zeros((1, 64, 64, 3))
  with pytest.raises(UserError, match='head_logits=True needs a model with classes and token_labeling=True'):
    model.apply(golden.load_variables('performer'), images, head_logits=True, **options)


@pytest.mark.parametrize('name', ['performer', 'transformer', 'performer_qkbias_qkscale'])
def test_tokens_and_features_equal_the_references(name, strict_dtypes):
  numbers = golden.load_numbers(f'tiny_{name}')
  model = tiny(name)
  features, state = golden.apply(
    model, golden.load_variables(name), numbers['images_nhwc'], features=True, capture_intermediates=True
  )
  assert isinstance(features, Features)
  assert features.tokens.shape == (2, 4, 4, 64)
  np.testing.assert_allclose(features.cls, numbers['features'], atol=LOGITS_ATOL)
  (tokens,) = state['intermediates']['tokens_to_token']['__call__']
  np.testing.assert_allclose(tokens.reshape(2, 16, 64), numbers['tokens'], atol=LOGITS_ATOL)


@pytest.mark.parametrize('name', ['performer', 'transformer'])
def test_constant_images_show_the_right_epsilon(name):
  numbers = golden.load_numbers('tiny_half_constant')
  logits = golden.apply(tiny(name), golden.load_variables(name), numbers['images_nhwc'])
  np.testing.assert_allclose(logits, numbers[f'logits_{name}'], atol=LOGITS_ATOL)


@pytest.mark.parametrize('name', ['performer', 'transformer'])
def test_gradients_equal_the_references(name):
  numbers = golden.load_numbers(f'tiny_{name}')
  variables = golden.load_variables(name)

  gradient = golden.loss_and_gradients(tiny(name))
  (loss, _), gradients = gradient(variables['params'], variables['frozen'], numbers['images_nhwc'], numbers['labels'])
  expected = golden.to_variables({key[5:]: value for key, value in numbers.items() if key.startswith('grad/')})
  # Eight of float32's steps: which products a CPU has moves it by five.
  assert loss == pytest.approx(float(numbers['loss']), abs=2e-6)
  assert expected.keys() == {'params'}
  assert jax.tree.structure(gradients) == jax.tree.structure(expected['params'])
  errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), gradients, expected['params'])
  assert max(jax.tree.leaves(errors)) <= GRADIENT_RTOL, errors


@pytest.mark.parametrize('tokens_type', [slow('performer'), slow('transformer'), 'convolution'])
def test_devices_that_share_a_batch_exchange_gradients_of_parameters_only(tokens_type):
  mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
  divided, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (['data'], []))
  model = tiny('performer', tokens_type=tokens_type)
  images = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32, sharding=divided)
  variables = golden.shapes_of(model, images)
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), variables['params'])
  frozen = golden.random_variables(model, images)['frozen']

  def loss_of(params, images):
    return model.apply({'params': params, 'frozen': frozen}, images).mean()

  compiled = jax.jit(jax.value_and_grad(loss_of), out_shardings=replicated).lower(params, images).compile()
  collectives = re.findall(
    r'= (.*) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(', compiled.as_text()
  )
  assert {kind for _, kind in collectives} == {'all-reduce'}
  shapes = re.findall(r'\w+\[([\d,]*)\]', ' '.join(shape for shape, _ in collectives))
  exchanged = sum(math.prod(map(int, filter(None, shape.split(',')))) for shape in shapes)
  assert exchanged <= 1.1 * sum(x.size for x in jax.tree.leaves(params))


def test_the_forms_of_the_soft_split_share_parameters_and_results():
  images = np.random.default_rng(0).normal(size=(1, 48, 80, 3)).astype(np.float32)
  conv, patches = (tiny('performer', soft_split_form=form) for form in ('conv', 'patches'))
  variables = jax.jit(conv.init)(jax.random.key(0), images)
  jax.tree.map(np.testing.assert_array_equal, variables, jax.jit(patches.init)(jax.random.key(0), images))
  np.testing.assert_allclose(golden.apply(conv, variables, images), golden.apply(patches, variables, images), atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('performer', {'scan_blocks': True}),
    ('performer', {'scan_blocks': True, 'remat': 'dots_with_no_batch_dims_saveable'}),
    slow('performer', {'remat': 'nothing_saveable'}),
    slow('se', {'scan_blocks': True}),
    slow('ghost', {'scan_blocks': True}),
    slow('dense', {'remat': 'dots_saveable'}),
  ],
)
def test_blocks_in_a_loop_and_computed_again_are_the_same_model(name, fields):
  """With the reference's weights, and with its logits and the plain form's gradients."""
  variables, numbers = golden.load_variables(name), golden.load_numbers(f'tiny_{name}')
  inputs = variables['frozen'], numbers['images_nhwc'], np.array([3, 7])
  model = tiny(name, **fields)
  fresh, plain = (jax.eval_shape(m.init, jax.random.key(0), inputs[1]) for m in (model, tiny(name)))
  assert jax.tree.structure(fresh) == jax.tree.structure(plain)

  gradient = golden.loss_and_gradients(model)
  (_, logits), actual = gradient(variables['params'], *inputs)
  _, expected = golden.loss_and_gradients(tiny(name))(variables['params'], *inputs)
  np.testing.assert_allclose(logits, numbers['logits'], atol=LOGITS_ATOL)
  found = [actual]
  if model.scan_blocks:
    (_, logits), stacked = gradient(stack_blocks(variables['params']), *inputs)
    np.testing.assert_allclose(logits, numbers['logits'], atol=LOGITS_ATOL)
    found.append(unstack_blocks(stacked))
  for each in found:
    errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), each, expected)
    assert max(jax.tree.leaves(errors)) <= GRADIENT_RTOL, errors


def test_blocks_in_a_loop_have_their_own_stochastic_depth():
  """Rates 0, 0.5 and 1: the first block is always kept, the last never, the second in half of the cases and doubled."""
  image = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)
  model = tiny('performer', depth=3, scan_blocks=True, stochastic_depth_rate=1.0, performer_dropout_rate=0.0)
  variables = golden.random_variables(model, image)
  without_last = tiny('performer', depth=2)
  params = {key: value for key, value in variables['params'].items() if key != 'blocks_2'}
  trained = golden.apply(model, variables, image.repeat(64, axis=0), {'dropout': jax.random.key(2)}, train=True)
  second = params['blocks_1']

  def scaled(attention, mlp):
    """The logits of both branches of the second block times these."""
    attn, fc2 = second['attn'], second['mlp']['fc2']
    block = {
      **second,
      'attn': {**attn, 'proj': jax.tree.map(lambda x: attention * x, attn['proj'])},
      'mlp': {**second['mlp'], 'fc2': jax.tree.map(lambda x: mlp * x, fc2)},
    }
    return golden.apply(without_last, {**variables, 'params': {**params, 'blocks_1': block}}, image)[0]

  possible = np.stack([scaled(attention, mlp) for attention in (0, 2) for mlp in (0, 2)])
  distances = np.abs(np.asarray(trained)[:, None] - possible).max(axis=-1)  # (64, 4)
  assert distances.min(axis=1).max() < 1e-5
  counts = np.bincount(distances.argmin(axis=1), minlength=4)
  assert counts.min() >= 5  # of 16 expected: less in one of 1,000 cases


def test_a_loop_over_blocks_makes_a_small_program():
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

  def lines(depth):
    model = tiny('performer', depth=depth, scan_blocks=True)
    variables = golden.shapes_of(model, images)
    return jax.jit(model.apply).lower(variables, images).as_text().count('dot_general')

  assert lines(12) == lines(2)


def test_the_last_block_computes_what_the_head_needs():
  """By hand: of T tokens of D = 64 channels all but one are spared their query, output and MLP of width 2 D."""
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  tokens, dim = 1 + 4 * 4, 64
  head = 2 * dim * 10

  def spared(name):
    model = tiny(name)
    shapes = golden.shapes_of(model, images)
    features = jax.jit(functools.partial(model.apply, features=True))
    return count_flops(features, shapes, images) + head - count_flops(jax.jit(model.apply), shapes, images)

  attention, mlp = 2 * dim**2 + 2 * tokens * dim, 2 * 2 * dim**2  # products of a token
  assert spared('performer') == 2 * (tokens - 1) * (attention + mlp)
  assert spared('se') == 2 * (tokens - 1) * mlp  # its gate needs the mean over all tokens of the attention's output


def test_dense_blocks_are_not_scanned():
  with pytest.raises(UserError, match='scan_blocks needs blocks of one width'):
    tiny('dense', scan_blocks=True)


@pytest.mark.parametrize(('dtype', 'expected'), [('float32', 'float32'), ('bfloat16', 'bfloat16')])
def test_the_residual_stream_is_bfloat16_where_that_is_asked_for_and_enough(dtype, expected):
  numbers = golden.load_numbers('tiny_performer')
  model = tiny('performer', dtype=jnp.dtype(dtype), residual_dtype='bfloat16')
  variables = golden.load_variables('performer')
  logits, state = golden.apply(model, variables, numbers['images_nhwc'], capture_intermediates=True)
  assert [state['intermediates'][f'blocks_{i}']['__call__'][0].dtype for i in range(2)] == [expected] * 2
  assert logits.dtype == jnp.float32
  tolerance = LOGITS_ATOL if dtype == 'float32' else 5e-2 * numbers['logits'].std()
  np.testing.assert_allclose(logits, numbers['logits'], rtol=0, atol=tolerance)


def test_another_image_size_resizes_the_stored_table():
  variables = golden.load_variables('performer_own_pos_embed')
  images = np.random.default_rng(0).normal(size=(1, 96, 128, 3)).astype(np.float32)
  resized = resize_position_embedding(variables['frozen']['pos_embed'], (4, 4), (6, 8))
  expected = golden.apply(
    tiny('performer', image_size=(96, 128)),
    {'params': variables['params'], 'frozen': {**variables['frozen'], 'pos_embed': resized}},
    images,
  )
  np.testing.assert_allclose(golden.apply(tiny('performer'), variables, images), expected, atol=1e-6)


def test_non_square_images_keep_their_grid():
  model = tiny('performer', image_size=(32, 96), num_classes=0)
  images = np.random.default_rng(1).normal(size=(2, 32, 96, 3)).astype(np.float32)
  variables = golden.random_variables(model, images)
  assert variables['frozen']['pos_embed'].shape == (1, 1 + 2 * 6, 64)
  features = golden.apply(model, variables, images)
  assert features.tokens.shape == (2, 2, 6, 64)
  assert np.isfinite(features.tokens).all()


def test_features_do_not_depend_on_the_other_images_of_the_batch():
  variables = golden.load_variables('transformer')
  images = golden.load_numbers('tiny_transformer')['images_nhwc']
  both = golden.apply(tiny('transformer'), variables, images)
  np.testing.assert_allclose(golden.apply(tiny('transformer'), variables, images[1:]), both[1:], atol=1e-5)


@pytest.mark.parametrize('tokens_type', ['performer', slow('transformer'), slow('convolution')])
def test_training_mode_draws_from_the_dropout_rng(tokens_type):
  model = tiny('performer', tokens_type=tokens_type, dropout_rate=0.1, attention_dropout_rate=0.1)
  images = golden.load_numbers('tiny_performer')['images_nhwc']
  variables = golden.random_variables(model, images)

  def logits(seed):
    return golden.apply(model, variables, images, {'dropout': jax.random.key(seed)}, train=True)

  np.testing.assert_array_equal(logits(0), logits(0))
  assert np.abs(logits(0) - logits(1)).max() > 1e-4
  np.testing.assert_array_equal(
    golden.apply(model, variables, images), golden.apply(model, variables, images, train=False)
  )


def test_the_performers_dropout_is_on_by_default_and_can_be_turned_off():
  images, variables = golden.load_numbers('tiny_performer')['images_nhwc'], golden.load_variables('performer')

  def difference(**overrides):
    model = tiny('performer', **overrides)
    trained = golden.apply(model, variables, images, {'dropout': jax.random.key(0)}, train=True)
    return np.abs(trained - golden.apply(model, variables, images)).max()

  assert difference() > 1e-3
  assert difference(performer_dropout_rate=0.0) == 0


@pytest.mark.slow
def test_within_flax_nnx_it_is_the_same_model_and_only_params_are_trained():
  numbers, variables = golden.load_numbers('tiny_performer'), golden.load_variables('performer')
  images, labels = numbers['images_nhwc'], numbers['labels']
  module = nnx.bridge.ToNNX(tiny('performer'), rngs=nnx.Rngs(0, dropout=1)).lazy_init(images)
  for collection in variables.values():
    nnx.update(module, collection)
  optimizer = nnx.Optimizer(module, optax.sgd(0.5), wrt=nnx.Param)

  @nnx.jit
  def step(module, optimizer):
    def loss_of(module):
      return optax.softmax_cross_entropy_with_integer_labels(module(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(module)
    trained_mode = module(images, train=True), module(images, train=True)
    optimizer.update(module, gradients)
    return loss, *trained_mode

  loss, one, other = step(module, optimizer)
  assert loss == pytest.approx(float(numbers['loss']), abs=2e-6)
  assert np.abs(one - other).max() > 1e-4  # dropout is drawn anew
  np.testing.assert_allclose(
    module.head['kernel'][...],
    variables['params']['head']['kernel'] - 0.5 * numbers['grad/head.weight'].T,
    atol=1e-5,
  )
  np.testing.assert_array_equal(module.pos_embed[...], variables['frozen']['pos_embed'])


@pytest.mark.parametrize('name', ['performer', 'transformer'])
def test_bfloat16_stays_near_float32(name):
  numbers = golden.load_numbers(f'tiny_{name}')
  variables = golden.load_variables(name)
  logits = golden.apply(tiny(name, dtype=jnp.bfloat16), variables, numbers['images_nhwc'])
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, numbers['logits'], atol=5e-2)


def test_parameters_are_float32_in_every_computation_dtype():
  shapes = jax.eval_shape(tiny('performer', dtype=jnp.bfloat16).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


def test_random_projections_have_orthogonal_rows_of_the_same_length():
  variables = jax.jit(tiny('performer', depth=1, token_dim=64).init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  first, second = (variables['frozen']['tokens_to_token'][f'attention{i}']['random_projection'] for i in (1, 2))
  assert first.shape == (32, 64)
  np.testing.assert_allclose(first @ first.T, 32 * np.eye(32), atol=1e-4)
  assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize('images', [np.zeros((1, 64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_wrong_images_are_refused(images):
  with pytest.raises(UserError, match='images must'):
    tiny('performer').apply(golden.load_variables('performer'), images)


def test_arguments_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match='tokens_type must be one of performer, transformer, convolution'):
    T2TViT(tokens_type='perfomer')
  with pytest.raises(UserError, match='num_heads'):
    jax.eval_shape(T2TViT(embed_dim=64, num_heads=5).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  with pytest.raises(UserError, match='mlp_ratio 3'):
    T2TViT(block_type='ghost', mlp_ratio=2.0)
