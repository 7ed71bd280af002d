"""Products of a float32 model have float32 factors on every platform; those of half precision stay fast."""

import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from t2t_vit_jax import T2TViT
from t2t_vit_jax.conversion import Options
from t2t_vit_jax.conversion.convert import load
from t2t_vit_jax.export import export_forward
from t2t_vit_jax.models.layers import Dense
from t2t_vit_jax.models.products import kernel_product
from tests import golden

IMAGES = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
MODELS = {
  **golden.TINY_MODELS,
  'convolution': dict(golden.TINY, tokens_type='convolution'),
  'patches': dict(golden.TINY, tokens_type='transformer', soft_split_form='patches'),
  'chunked': dict(golden.TINY, tokens_type='transformer', token_attention_form='chunked'),
  'loop': dict(golden.TINY, depth=3, scan_blocks=True, remat='nothing_saveable', qkv_bias=True),
}
SLOW = ('transformer', 'patches', 'se', 'ghost', 'dense', 'loop')


def precisions(text):
  """Yields the dtypes of the factors, and the precision, of each product in the text of a lowered program."""
  lines = re.findall(r'stablehlo\.(?:dot_general|convolution).*', text)
  assert lines
  for line in lines:
    factors = re.search(r': \(tensor<(?:[\d?]+x)*(\w+)>, tensor<(?:[\d?]+x)*(\w+)>\)', line)
    precision = re.search(r'precision(?:_config)? = \[(?:#stablehlo<precision )?(\w+)', line)
    yield factors[1], factors[2], precision[1] if precision else 'DEFAULT'


def lowered(name, dtype):
  """Text of the program for loss and gradients, with respect to parameters and images, for TPU and CUDA."""
  model = T2TViT(**MODELS[name], dtype=dtype)
  variables = golden.shapes_of(model, IMAGES)

  def loss(params, images):
    rngs = {'dropout': jax.random.key(0)}
    return model.apply({**variables, 'params': params}, images, train=True, rngs=rngs).sum()

  # jit first: derivative rules of the layers then run after the layers.
  function = jax.jit(jax.value_and_grad(jax.jit(loss), argnums=(0, 1)))
  variables = {**variables, 'frozen': jax.tree.map(lambda x: jnp.ones(x.shape), variables['frozen'])}
  return function.trace(variables['params'], IMAGES).lower(lowering_platforms=('tpu', 'cuda')).as_text()


@pytest.mark.parametrize(
  'name',
  [*(pytest.param(name, marks=pytest.mark.slow) for name in SLOW), 'performer', 'chunked', 'convolution'],
)
def test_float32_is_float32(name):
  assert set(precisions(lowered(name, jnp.float32))) == {('f32', 'f32', 'HIGHEST')}


def test_half_precision_stays_fast():
  for x, y, precision in precisions(lowered('performer', jnp.bfloat16)):
    assert precision == 'DEFAULT' or (x, y) == ('f32', 'f32')


def test_a_callers_precision_is_kept():
  with jax.default_matmul_precision('tensorfloat32'):
    found = set(precisions(lowered('convolution', jnp.float32)))
  assert {precision for _, _, precision in found} == {'HIGH'}


def test_an_export_has_the_precision_for_all_platforms(tmp_path):
  weights, _ = load(golden.converted('performer', tmp_path), Options())
  program = export_forward(weights, 'float32')
  assert set(precisions(program.mlir_module())) == {('f32', 'f32', 'HIGHEST')}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_of_kernels_are_products_that_xla_computes_fast_on_a_cpu(dtype):
  """Rows times columns: others go to a loop, in float32 as in half precision, that takes up to ten times as long."""
  layer, x = Dense(96, dtype=dtype), jnp.ones((4, 50, 64))
  params = layer.init(jax.random.key(0), x)
  gradient = jax.jit(jax.grad(lambda params: (layer.apply(params, x) ** 2).sum()))
  compiled = gradient.lower(params).compile().as_text()
  assert set(re.findall(r' dot\(.*lhs_contracting_dims=\{(\d)\}, rhs_contracting_dims=\{(\d)\}', compiled)) == {
    ('1', '0')
  }
  for platform, barriers in (('cpu', 1), ('tpu', 0), ('cuda', 0)):
    lowered = gradient.trace(params).lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count('stablehlo.optimization_barrier') == barriers


def test_direct_gradients_are_those_of_jax():
  """Forward, backward, of second order, and of a batch of kernels."""
  rng = np.random.default_rng(0)
  x, kernel, tangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 5, 4), (2, 4, 6), (2, 4, 6)))

  def derivatives(product):
    def loss(kernel):
      return (product(x, kernel, (((2,), (0,)), ((), ()))) ** 3).sum()

    def of_one(kernel, tangent):
      return jax.jvp(loss, (kernel,), (tangent,)), jax.grad(loss)(kernel), jax.hessian(loss)(kernel)

    return jax.jit(jax.vmap(of_one))(kernel, tangent)

  for ours, theirs in zip(
    jax.tree.leaves(derivatives(kernel_product)), jax.tree.leaves(derivatives(lax.dot_general)), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
