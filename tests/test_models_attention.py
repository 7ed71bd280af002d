"""Attention: derivatives in half precision, the padding for cuDNN, and the form that each platform gets."""

import os
from pathlib import Path
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2t_vit_jax import T2TViT
from t2t_vit_jax.models.attention import cudnn_attention, full_attention, padded_attention, softmax
from tests import golden
from tests.parameters import slow

IMAGES = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)


def queries_keys_values(length, dtype=jnp.float32):
  return [jax.random.normal(jax.random.key(i), (2, length, 3, 16), dtype) for i in range(3)]


@pytest.mark.parametrize('length', [slow(16), 17])
def test_padded_tokens_change_neither_values_nor_gradients(length):
  """The computation for cuDNN, in XLA's own implementation."""

  def padded(q, k, v):
    return padded_attention(q, k, v, implementation='xla')

  arguments = queries_keys_values(length)
  (expected, pull_back), (actual, pull_back_padded) = (jax.vjp(f, *arguments) for f in (full_attention, padded))
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  cotangent = jax.random.normal(jax.random.key(3), actual.shape)
  for x, y in zip(pull_back_padded(cotangent), pull_back(cotangent), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-6)


def test_derivatives_in_half_precision_are_those_of_float32_but_for_rounding():
  """Forward, backward and mixed, of a batch of attentions."""
  arguments = [jnp.stack([x, x[::-1]]) for x in queries_keys_values(9)]
  tangents = [x[::-1] / 2 for x in arguments]

  def derivatives(q, k, v, *tangents):
    def loss(q, k, v):
      return (full_attention(q, k, v).astype(jnp.float32) ** 2).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2))
    return jax.jvp(full_attention, (q, k, v), tangents), jax.jvp(gradients, (q, k, v), tangents)

  exact, rounded = (
    jax.jit(jax.vmap(derivatives))(*(x.astype(dtype) for x in (*arguments, *tangents)))
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  for x, y in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
    assert jnp.linalg.norm(y - x) < 3e-2 * jnp.linalg.norm(x)


def test_the_gradient_of_equal_scores_is_zero_in_half_precision():
  """Each weight is 1 / 1024, and all together are 1: summed in half precision they need not be."""
  weights, pull_back = jax.vjp(softmax, jnp.zeros((3, 1024), jnp.bfloat16))
  (gradient,) = pull_back(jnp.full_like(weights, 3))
  np.testing.assert_array_equal(gradient.astype(jnp.float32), 0)


def test_the_gradient_of_keys_is_a_float32_product_on_a_cpu_alone():
  arguments = queries_keys_values(16, jnp.bfloat16)
  traced = jax.jit(jax.grad(lambda *x: full_attention(*x).sum(), argnums=(0, 1, 2))).trace(*arguments)
  for platform, wide in (('cpu', 1), ('tpu', 0), ('cuda', 0)):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    factors = re.findall(r'stablehlo.dot_general.* : \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\)', text)
    assert sorted(factors) == [('bf16', 'bf16')] * (5 - wide) + [('f32', 'f32')] * wide


def lowered(fields, platform, dtype=jnp.bfloat16, **options):
  """Text of the program for loss and gradients, where kernels by cuDNN are seen."""
  model = T2TViT(**{**golden.TINY, 'depth': 3, **fields}, dtype=dtype)
  variables = golden.shapes_of(model, IMAGES)

  def loss(variables, images):
    return model.apply(variables, images, rngs={'dropout': jax.random.key(0)}, **options).sum()

  traced = jax.jit(jax.grad(loss)).trace(variables, IMAGES)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def kernels(text):
  """How many calls of cuDNN's attention there are, forward and backward."""
  return text.count('@__cudnn$fmhaSoftmax('), text.count('@__cudnn$fmhaSoftmaxBackward(')


@pytest.mark.needs('nvidia.cudnn')
@pytest.mark.parametrize('more', [{}, {'scan_blocks': True, 'remat': 'nothing_saveable'}])
def test_each_platform_gets_its_form(more):
  fields = {'tokens_type': 'transformer', **more}
  cudnn = {**fields, 'attention_form': 'cudnn', 'token_attention_form': 'cudnn'}
  for platform in ('cpu', 'tpu'):
    assert kernels(lowered(cudnn, platform)) == (0, 0)
  forward, backward = kernels(lowered(cudnn, 'cuda'))
  assert forward >= backward > 0
  if not more:
    assert (forward, backward) == (2 + 2, 2 + 2)  # both soft splits, and all blocks but the last


@pytest.mark.needs('nvidia.cudnn')
def test_where_the_kernel_cannot_do_it_the_products_do():
  cudnn = {'tokens_type': 'transformer', 'attention_form': 'cudnn', 'token_attention_form': 'cudnn'}
  assert kernels(lowered(cudnn, 'cuda', dtype=jnp.float32)) == (0, 0)
  dropping = {**cudnn, 'token_attention_form': 'auto', 'attention_dropout_rate': 0.1}
  assert kernels(lowered(dropping, 'cuda', train=True)) == (0, 0)
  assert kernels(lowered(dropping, 'cuda')) == (2, 2)  # in evaluation nothing is dropped


@pytest.mark.slow
def test_values_are_those_of_the_products_where_the_kernel_is_not():
  arguments = queries_keys_values(17, jnp.bfloat16)
  np.testing.assert_array_equal(cudnn_attention(*arguments), full_attention(*arguments))
  images = jnp.asarray(golden.load_numbers('tiny_transformer')['images_nhwc'])
  variables = golden.load_variables('transformer')
  plain = T2TViT(**golden.TINY_MODELS['transformer'], dtype=jnp.bfloat16)
  other = plain.clone(attention_form='cudnn', token_attention_form='cudnn')
  np.testing.assert_array_equal(other.apply(variables, images), plain.apply(variables, images))


@pytest.mark.skipif(not Path('/dev/nvidia0').exists(), reason='needs an NVIDIA GPU')
@pytest.mark.needs('nvidia.cudnn')
def test_on_the_gpu_of_this_machine():
  """Runs the next test there: by default tests compute on the CPU."""
  command = [sys.executable, '-m', 'pytest', '-n', '0', __file__, '-k', 'test_the_kernel_on_a_gpu']
  done = subprocess.run(command, env={**os.environ, 'JAX_PLATFORMS': 'cuda,cpu'}, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  assert '4 passed' in done.stdout


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='test_on_the_gpu_of_this_machine runs it')
@pytest.mark.parametrize('length', [196, 197, 784, 3136])
def test_the_kernel_on_a_gpu(length):
  arguments = queries_keys_values(length, jnp.bfloat16)
  wide = [x.astype(jnp.float32) for x in arguments]
  (expected, pull_back), (actual, pull_back_kernel) = (
    jax.vjp(full_attention, *wide),
    jax.vjp(cudnn_attention, *arguments),
  )
  np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=2e-2)
  cotangent = jax.random.normal(jax.random.key(3), actual.shape, jnp.bfloat16)
  for x, y in zip(pull_back_kernel(cotangent), pull_back(cotangent.astype(jnp.float32)), strict=True):
    np.testing.assert_allclose(x.astype(jnp.float32), y, atol=5e-2)
