"""The feature pyramid against PyTorch's stages, and shapes counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t2t_vit_jax import T2TViT, UserError, create_model, feature_pyramid
from t2t_vit_jax.planning.flops import count_flops
from tests import golden, torch_reference
from tests.parameters import slow_but

NAMES = ['performer', 'transformer', 'performer_qkbias_qkscale', 'se', 'ghost', 'dense']


def pyramid_of(name, images=None, **overrides):
  """The golden model's, of its images in PyTorch's numbers."""
  model = T2TViT(**{**golden.TINY_MODELS[name], **overrides})
  images = golden.load_numbers(f'tiny_{name}')['images_nhwc'] if images is None else images
  return jax.jit(functools.partial(feature_pyramid, model))(golden.load_variables(name), images)


@pytest.mark.parametrize('name', slow_but(['performer', 'dense'], NAMES))
def test_maps_equal_torchs_stages(name):
  model = torch_reference.create(golden.TINY_MODELS[name]).eval()
  model.load_state_dict(golden.load_state_dict(name))
  found = []
  for module in (model.tokens_to_token.attention1, model.tokens_to_token.attention2, model.norm):
    module.register_forward_hook(lambda module, inputs, output: found.append(output.numpy()))
  numbers = golden.load_numbers(f'tiny_{name}')
  with torch.no_grad():
    model(torch.from_numpy(numbers['images_nhwc'].transpose(0, 3, 1, 2)))
  first, second, last = found
  np.testing.assert_allclose(last[:, 0], numbers['features'], atol=1e-5)

  pyramid = pyramid_of(name)
  for level, expected in zip(pyramid, (first, second, last[:, 1:]), strict=True):
    np.testing.assert_allclose(level.reshape(expected.shape), expected, atol=1e-5)
    assert np.std(expected) > 0.1


def test_blocks_in_a_loop_give_the_same():
  for level, expected in zip(pyramid_of('transformer', scan_blocks=True), pyramid_of('transformer'), strict=True):
    np.testing.assert_allclose(level, expected, atol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'channels'),
  [
    ({'tokens_type': 'transformer', 'num_classes': 0}, (16, 16, 64)),
    ({'tokens_type': 'convolution', 'dtype': jnp.bfloat16}, (16, 16, 64)),
    ({'tokens_type': 'performer', 'token_labeling': True}, (16, 16, 64)),
    # From 32: a block adds 16, the transition halves 48 to 24, two blocks add 32.
    ({**golden.TINY_MODELS['dense'], 'token_dim': 24}, (24, 24, 56)),
  ],
)
def test_shapes_at_a_size_that_no_stride_divides(fields, channels):
  """Rows, (size + 2 * padding - kernel) // stride + 1: of 50 px 12, 6 and 3; columns of 71 px 18, 9 and 5."""
  model = T2TViT(**{**golden.TINY, **fields})
  images = jax.ShapeDtypeStruct((2, 50, 71, 3), jnp.float32)
  variables = golden.shapes_of(model, images)
  pyramid = jax.eval_shape(functools.partial(feature_pyramid, model), variables, images)
  first, second, last = channels
  assert [level.shape for level in pyramid] == [(2, 12, 18, first), (2, 6, 9, second), (2, 3, 5, last)]
  assert pyramid.channels == channels
  assert pyramid.strides == (4, 8, 16)
  assert {level.dtype for level in jax.tree.leaves(pyramid)} == {jnp.dtype(model.dtype)}


def test_shapes_of_a_published_model():
  model, images = create_model('t2t_vit_14'), jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
  variables = golden.shapes_of(model, images)
  pyramid = jax.eval_shape(functools.partial(feature_pyramid, model), variables, images)
  assert [level.shape for level in pyramid] == [(8, 56, 56, 64), (8, 28, 28, 64), (8, 14, 14, 384)]


def test_nothing_is_computed_beyond_the_features():
  model = T2TViT(**golden.TINY_MODELS['performer'])
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = golden.shapes_of(model, images)
  features = jax.jit(functools.partial(model.apply, features=True))
  pyramid = jax.jit(functools.partial(feature_pyramid, model))
  assert count_flops(pyramid, variables, images) == count_flops(features, variables, images)


@pytest.mark.slow
def test_gradients_reach_images_and_the_layers_before_each_map():
  variables, images = golden.load_variables('performer'), golden.load_numbers('tiny_performer')['images_nhwc']
  model = T2TViT(**golden.TINY_MODELS['performer'])

  @jax.jit
  def gradients(params, images, level):
    def total(params, images):
      pyramid = feature_pyramid(
        model, {**variables, 'params': params}, images, train=True, rngs={'dropout': jax.random.key(0)}
      )
      sums = jnp.stack([jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in pyramid])
      return sums[level]

    return jax.value_and_grad(total, argnums=(0, 1))(params, images)

  reached = []
  for level in range(3):
    _, (of_params, of_images) = gradients(variables['params'], images, level)
    assert (np.abs(of_images).max(axis=(0, 3)) > 0).all()  # every pixel counts
    layers = {**of_params.pop('tokens_to_token'), **of_params}
    reached.append({name for name, tree in layers.items() if any(np.any(x != 0) for x in jax.tree.leaves(tree))})
  assert reached[0] == {'attention1'}
  assert reached[1] == {'attention1', 'attention2'}
  assert reached[2] == {'attention1', 'attention2', 'project', 'cls_token', 'blocks_0', 'blocks_1', 'norm'}


@pytest.mark.slow
def test_dropout_is_drawn_in_training_only():
  variables, images = golden.load_variables('performer'), golden.load_numbers('tiny_performer')['images_nhwc']
  model = T2TViT(**golden.TINY_MODELS['performer'])
  pyramid = jax.jit(functools.partial(feature_pyramid, model, train=True))
  trained = pyramid(variables, images, rngs={'dropout': jax.random.key(0)})
  assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(trained, pyramid_of('performer'), strict=True))


def test_images_that_are_too_small_are_refused():
  with pytest.raises(UserError, match='is too small'):
    pyramid_of('performer', np.zeros((1, 2, 2, 3), np.float32))
