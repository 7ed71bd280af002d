"""Layers with the reference's constants.

Flax's defaults differ from PyTorch's in three places that change results, so every layer of the model comes from here.
LayerNorm's epsilon is 1e-5 (Flax: 1e-6), and its variance is computed in two passes for float32 (Flax's fast variance
loses all digits when the mean is large). GELU is the exact erf form (Flax: tanh approximation). Dense weights start
from N(0, 0.02) (Flax: LeCun normal).

`LayerNormParameters` and `DenseParameters` only hold a layer's parameters, under the names and with the start values of
the layer itself, for code that computes the layer's result in another way.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import lax
from jax.nn import initializers
import jax.numpy as jnp

from t2t_vit_jax.models.products import kernel_product

Array = jax.Array
Dtype = Any

EPSILON = 1e-5  # of LayerNorm


class LayerNorm(nn.LayerNorm):
  """Flax's LayerNorm with epsilon 1e-5 and a variance in two passes; in half precision `half_layer_norm`."""

  epsilon: float = EPSILON
  dtype: Dtype = jnp.float32
  use_fast_variance: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:  # type: ignore[override]  # no mask
    if jnp.finfo(self.dtype).bits >= 32:
      return super().__call__(x)
    scale = self.param('scale', self.scale_init, x.shape[-1:], jnp.float32)
    bias = self.param('bias', self.bias_init, x.shape[-1:], jnp.float32)
    return half_layer_norm(
      self.epsilon, self.dtype, x, *(y.reshape((1,) * (x.ndim - 1) + y.shape) for y in (scale, bias))
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def half_layer_norm(epsilon: float, dtype: Dtype, x: Array, scale: Array, bias: Array) -> Array:
  """LayerNorm over the last axis of x, computed in float32 and rounded to half precision, at less cost.

    x_hat  = (x - mean) / deviation,    deviation = sqrt(variance + epsilon)
    result = x_hat * scale + bias
    dx_hat = (dx - mean(dx) - x_hat * mean(dx * x_hat)) / deviation
    dresult = dx_hat * scale + x_hat * dscale + dbias

  The variance comes from one pass: mean of squares less square of the mean. That loses digits of float32 when the mean
  exceeds the standard deviation: at 100 times, as much as half precision rounds away. Gradients are computed from x_hat
  in half precision, which takes less memory and traffic to keep than x.
  """
  return (_normalise(x, epsilon)[0] * scale + bias).astype(dtype)


@half_layer_norm.defjvp
def _derivative_of_layer_norm(
  epsilon: float, dtype: Dtype, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
  (x, scale, bias), (dx, dscale, dbias) = primals, tangents
  exact_x_hat, inverse_deviation = _normalise(x, epsilon)
  x_hat = exact_x_hat.astype(dtype).astype(jnp.float32)  # what is kept for the backward pass
  dx = dx.astype(jnp.float32)
  along = (dx * x_hat).mean(axis=-1, keepdims=True)
  dx_hat = (dx - dx.mean(axis=-1, keepdims=True) - x_hat * along) * inverse_deviation
  return (exact_x_hat * scale + bias).astype(dtype), (dx_hat * scale + x_hat * dscale + dbias).astype(dtype)


def _normalise(x: Array, epsilon: float) -> tuple[Array, Array]:
  """Returns x_hat, x with mean 0 and variance 1 over the last axis, and 1 / deviation: both float32."""
  x = x.astype(jnp.float32)
  mean = x.mean(axis=-1, keepdims=True)
  variance = jnp.maximum((x * x).mean(axis=-1, keepdims=True) - mean * mean, 0)  # rounding may pass 0
  inverse_deviation = lax.rsqrt(variance + epsilon)
  return (x - mean) * inverse_deviation, inverse_deviation


def gelu(x: Array) -> Array:
  """Exact GELU, x * Phi(x), in float32: `jax.nn.gelu` computes it by erfc, which costs twice as much as erf."""
  y = x.astype(jnp.float32)
  return (y * (0.5 * lax.erf(y * 0.5**0.5) + 0.5)).astype(x.dtype)


def torch_conv_init(fan_in: int) -> Callable[..., Array]:
  """PyTorch's default for convolutions, U(-b, b) with b = fan_in ** -0.5, for kernels and biases alike."""
  bound = fan_in**-0.5

  def init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class LayerNormParameters(nn.Module):
  """The parameters of `LayerNorm` over `width` values."""

  width: int

  @nn.compact
  def __call__(self) -> dict[str, Array]:
    params = {
      'scale': self.param('scale', initializers.ones, (self.width,), jnp.float32),
      'bias': self.param('bias', initializers.zeros, (self.width,), jnp.float32),
    }
    return jax.tree.map(jnp.asarray, params)  # as Flax's layers do: variables may be NumPy's


class DenseParameters(nn.Module):
  """The parameters of `Dense`: a kernel (in_dim, out_dim) and perhaps a bias."""

  in_dim: int
  out_dim: int
  use_bias: bool = True

  @nn.compact
  def __call__(self) -> dict[str, Array]:
    return _dense_parameters(self, self.in_dim, self.out_dim, self.use_bias)


class Dense(nn.Module):
  """x @ kernel + bias on the last axis: (..., in_dim) -> (..., features)."""

  features: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    params = _dense_parameters(self, x.shape[-1], self.features, self.use_bias)
    y = kernel_product(x.astype(self.dtype), params['kernel'].astype(self.dtype), (((x.ndim - 1,), (0,)), ((), ())))
    return add_bias(y, params['bias']) if self.use_bias else y


def _dense_parameters(module: nn.Module, in_dim: int, out_dim: int, use_bias: bool) -> dict[str, Array]:
  # timm's "truncated" normal cuts at an absolute +-2, a hundred standard deviations out: it is a plain normal.
  params = {'kernel': module.param('kernel', initializers.normal(0.02), (in_dim, out_dim), jnp.float32)}
  if use_bias:
    params['bias'] = module.param('bias', initializers.zeros, (out_dim,), jnp.float32)
  return jax.tree.map(jnp.asarray, params)  # variables may be NumPy's


@jax.custom_jvp
def add_bias(y: Array, bias: Array) -> Array:
  """Adds a float32 bias (out,) to y (..., out), in the dtype of y.

  In programs for a CPU the gradient of the bias is summed in float32, since XLA:CPU takes many times as long for a sum
  in half precision. For a TPU such a sum is 2 % more traffic in all of a step.
  """
  return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


@add_bias.defjvp
def _derivative_of_sum(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
  (y, bias), (dy, dbias) = primals, tangents

  def wide(dbias: Array) -> Array:
    return jnp.broadcast_to(dbias, y.shape).astype(y.dtype)

  def narrow(dbias: Array) -> Array:
    return jnp.broadcast_to(dbias.astype(y.dtype), y.shape)

  is_half = jnp.finfo(y.dtype).bits < 32
  return add_bias(y, bias), dy + (lax.platform_dependent(dbias, cpu=wide, default=narrow) if is_half else narrow(dbias))


class Mlp(nn.Module):
  """Dense -> GELU -> dropout -> Dense -> dropout on the last axis."""

  hidden_dim: int
  out_dim: int
  dropout_rate: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    x = Dense(self.hidden_dim, dtype=self.dtype, name='fc1')(x)
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(gelu(x))
    x = Dense(self.out_dim, dtype=self.dtype, name='fc2')(x)
    return nn.Dropout(self.dropout_rate, deterministic=not train)(x)


class StochasticDepth(nn.Module):
  """Drops a residual branch of (B, T, D) for whole samples and divides the kept ones by the keep probability.

  `rate` may be an array, unlike in `nn.Dropout`: in a loop over blocks each has its own.
  """

  rate: float | Array

  @nn.compact
  def __call__(self, branch: Array, *, train: bool = False) -> Array:
    if not train or (isinstance(self.rate, float) and not self.rate):
      return branch
    keep = 1 - self.rate
    kept = jax.random.bernoulli(self.make_rng('dropout'), keep, (branch.shape[0], 1, 1))
    return jnp.where(kept, branch / jnp.asarray(keep, branch.dtype), 0)
