"""Outputs and attention weights of layers: against the reference's numbers, torch, and what they must add up to."""

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t2t_vit_jax import T2TViT, UserError
from t2t_vit_jax.models.layer_outputs import layer_outputs, layer_shapes
from tests import golden, torch_reference
from tests.parameters import slow


def tiny(name, **overrides):
  return T2TViT(**{**golden.TINY_MODELS[name], **overrides})


def images_of(name):
  return golden.load_numbers(f'tiny_{name}')['images_nhwc']


def outputs(name, layers, **overrides):
  return layer_outputs(tiny(name, **overrides), golden.load_variables(name), images_of(name), layers)


def torch_outputs(name):
  """What layers of the PyTorch model return, by our names, and what a performer's stages attend to.

  First the encoder's blocks, MLPs and attention weights, and a token transformer's attention weights. A token performer
  has none: for each of its stages there are the values and the weighted values, (B, T, D).
  """
  model = torch_reference.create(golden.TINY_MODELS[name]).eval()
  model.load_state_dict(golden.load_state_dict(name))
  found, attended = {}, {}

  def keep(layer, module):
    module.register_forward_hook(lambda module, inputs, output: found.update({layer: output.numpy()}))

  for number, block in enumerate(model.blocks):
    keep(f'blocks_{number}', block)
    if hasattr(block, 'attn'):
      keep(f'blocks_{number}/mlp', block.mlp)
      # In evaluation this dropout passes on the weights as they are.
      keep(f'blocks_{number}/attn/attention', block.attn.attention_dropout)
  for stage in ('attention1', 'attention2'):
    module = getattr(model.tokens_to_token, stage)
    layer = f'tokens_to_token/{stage}/attention'
    if hasattr(module, 'attn'):

      def weigh(_, inputs, output, layer=layer, scale=module.attn.scale):
        q, k, _ = output.chunk(3, dim=-1)
        found[layer] = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1).numpy()

      module.attn.qkv.register_forward_hook(weigh)
    else:

      def split(_, inputs, output, layer=layer):
        attended[layer] = [output.chunk(3, dim=-1)[2].numpy()]

      module.kqv.register_forward_hook(split)
      module.proj.register_forward_pre_hook(lambda _, inputs, layer=layer: attended[layer].append(inputs[0].numpy()))
  with torch.no_grad():
    model(torch.from_numpy(images_of(name).transpose(0, 3, 1, 2)))
  return found, attended


@pytest.mark.parametrize('name', ['performer_qkbias_qkscale', 'transformer', slow('se'), slow('ghost'), slow('dense')])
def test_outputs_equal_torch_in_every_layer(name):
  expected, attended = torch_outputs(name)
  features, found = outputs(name, [*expected, *attended, 'tokens_to_token'])

  numbers = golden.load_numbers(f'tiny_{name}')
  np.testing.assert_allclose(features.cls, numbers['features'], atol=1e-5)
  np.testing.assert_allclose(found['tokens_to_token'].reshape(2, 16, -1), numbers['tokens'], atol=1e-5)
  assert features.tokens.shape[:3] == (2, 4, 4)
  assert len(expected) + len(attended) >= 2 + 3 * 2
  for layer, output in expected.items():
    np.testing.assert_allclose(found[layer], output, atol=2e-5, err_msg=layer)
  # Weights that the performer never forms, times values, are what its linear form computes.
  for layer, (values, weighted_values) in attended.items():
    np.testing.assert_allclose(np.asarray(found[layer]) @ values, weighted_values, atol=1e-5)


def test_attention_in_chunks_shows_the_same_weights():
  layer = 'tokens_to_token/attention1/attention'
  _, found = outputs('transformer', [layer], token_attention_form='chunked')
  np.testing.assert_allclose(found[layer], torch_outputs('transformer')[0][layer], atol=1e-6)


@pytest.mark.slow
def test_weights_are_distributions_at_any_image_size():
  model = tiny('performer')
  images = np.random.default_rng(0).normal(size=(1, 48, 80, 3)).astype(np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  shapes = layer_shapes(model, variables, images)
  features, found = layer_outputs(model, variables, images, [layer for layer in shapes if layer.endswith('/attention')])
  assert features.tokens.shape[:3] == (1, 3, 5)
  assert {layer: weights.shape for layer, weights in found.items()} == {
    'blocks_0/attn/attention': (1, 4, 16, 16),
    'blocks_1/attn/attention': (1, 4, 16, 16),
    'tokens_to_token/attention1/attention': (1, 12 * 20, 12 * 20),
    'tokens_to_token/attention2/attention': (1, 6 * 10, 6 * 10),
  }
  for weights in found.values():
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)


def test_other_ways_to_run_the_blocks_give_the_same():
  layers = ['blocks_0', 'blocks_1', 'blocks_1/attn/attention']
  features, found = outputs('performer', layers, scan_blocks=True, remat='nothing_saveable', num_classes=0)
  expected_features, expected = outputs('performer', layers)
  np.testing.assert_allclose(features.tokens, expected_features.tokens, atol=1e-5)
  for layer in layers:
    np.testing.assert_allclose(found[layer], expected[layer], atol=1e-5)


def test_every_layer_of_the_parameters_is_listed_unless_its_parent_computes_for_it():
  for name in ('performer', 'ghost', 'dense'):
    variables = golden.load_variables(name)
    shapes = layer_shapes(tiny(name), variables, jax.ShapeDtypeStruct((3, 64, 64, 3), jnp.float32))
    layers = {path.rpartition('/')[0] for path in flatten_dict(variables['params'], sep='/')} - {''}
    by_parents = {layer for layer in layers if layer.endswith(('/qkv', '/kqv', 'to_token/project'))}
    by_parents |= {f'tokens_to_token/attention{number}/{layer}' for number in (1, 2) for layer in ('norm1', 'proj')}
    assert layers - shapes.keys() == by_parents | {'head'}
    assert {shape[0] for shape in shapes.values()} == {3}


def test_nothing_is_computed_that_is_not_asked_for():
  model, variables, images = tiny('performer', depth=1), golden.load_variables('performer'), images_of('performer')

  def flops(function):
    return jax.jit(function).lower(variables, images).compile().cost_analysis()['flops']

  def outputs_of(*layers):
    return lambda variables, images: layer_outputs(model, variables, images, layers)

  features = flops(lambda variables, images: model.apply(variables, images, features=True))
  assert flops(outputs_of('blocks_0', 'blocks_0/attn/attention')) == features  # which form them anyway
  scores = 2 * 2 * 256**2 * 8  # multiplications and additions for two images, from 8 random features
  assert flops(outputs_of('tokens_to_token/attention1/attention')) >= features + scores
  program = str(jax.make_jaxpr(lambda images: model.apply(variables, images))(images))
  assert '256,256' not in program


def test_unknown_layers_are_refused_with_the_nearest_name():
  with pytest.raises(UserError, match=r"no layer 'block_1'.*: did you mean 'blocks_1' or 'blocks_0'"):
    outputs('performer', ['blocks_0', 'block_1'])
  with pytest.raises(UserError, match=r"'blocks_0/attn/qkv' with an output of its own: did you mean 'blocks_0/attn'"):
    outputs('performer', ['blocks_0/attn/qkv'])
