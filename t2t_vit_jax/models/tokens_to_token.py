"""The tokens-to-token module (paper section 3.1): soft splits with a small attention between them."""

from typing import Literal

from flax import linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp

from t2t_vit_jax.models.layers import (
  Dense,
  DenseParameters,
  Dtype,
  LayerNorm,
  LayerNormParameters,
  Mlp,
  torch_conv_init,
)
from t2t_vit_jax.models.soft_split import SPLITS, SoftSplitForm, Split, patch_dense, patch_norm_dense

Array = jax.Array
TokensType = Literal['performer', 'transformer', 'convolution']


class TokenAttention(nn.Module):
  """What both attentions of the module share: their fields, and LayerNorm and three projections of every patch."""

  split: Split
  token_dim: int
  soft_split_form: SoftSplitForm = 'conv'
  dtype: Dtype = jnp.float32

  def projections(self, x: Array, dense_name: str, *, use_bias: bool) -> list[Array]:
    """Three projections of the patches of (B, H, W, C), each (B, H', W', token_dim)."""
    patch_dim = self.split.kernel**2 * x.shape[-1]
    norm = LayerNormParameters(patch_dim, name='norm1')()
    dense = DenseParameters(patch_dim, 3 * self.token_dim, use_bias, name=dense_name)()
    y = patch_norm_dense(x, self.split, norm, dense, form=self.soft_split_form, dtype=self.dtype)
    return jnp.split(y, 3, axis=-1)


class TokenTransformer(TokenAttention):
  """One-head softmax attention over patches: (B, H, W, C) -> (B, H', W', token_dim).

  Two quirks of the reference are kept because trained weights depend on them: scores are scaled by
  the width of a *patch* ** -0.5, and the residual around the attention starts from the values, since
  the input has another width.
  """

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    scale = (self.split.kernel**2 * x.shape[-1]) ** -0.5
    q, k, v = self.projections(x, 'qkv', use_bias=False)
    grid_shape = v.shape
    q, k, v = (y.reshape(y.shape[0], -1, self.token_dim) for y in (q * scale, k, v))
    y = jnp.einsum('bts,bsd->btd', nn.softmax(jnp.einsum('btd,bsd->bts', q, k), axis=-1), v)
    x = (v + Dense(self.token_dim, dtype=self.dtype, name='proj')(y)).reshape(grid_shape)
    mlp = Mlp(self.token_dim, self.token_dim, dtype=self.dtype, name='mlp')
    return x + mlp(LayerNorm(dtype=self.dtype, name='norm2')(x), train=train)


def positive_random_features(x: Array, random_projection: Array) -> Array:
  """exp(x wᵀ - |x|²/2) / sqrt(m): features whose inner products estimate the softmax kernel, without bias.

  Always float32. With m orthogonal rows of length sqrt(m) in w the exponent is at most m/2, so
  float32 cannot overflow for the m = 32 of every published model; half precision does.

  Args:
    x: (B, H, W, D).
    random_projection: w, (m, D).

  Returns:
    (B, H, W, m), float32.
  """
  x = x.astype(jnp.float32)
  num_random_features = random_projection.shape[0]
  squared_norm = jnp.sum(x * x, axis=-1, keepdims=True)
  projected = jnp.einsum('bhwd,md->bhwm', x, random_projection)
  return jnp.exp(projected - squared_norm / 2) * num_random_features**-0.5


class TokenPerformer(TokenAttention):
  """Linear attention over patches by positive random features (FAVOR+): (B, H, W, C) -> (B, H', W', token_dim).

  The random projection is drawn once and never trained: it lives in the collection `frozen`. The
  reference packs key, query, value in this order and hard-wires its dropout rate to 0.1.
  """

  random_feature_ratio: float = 0.5
  dropout_rate: float = 0.1

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    num_random_features = int(self.token_dim * self.random_feature_ratio)
    orthogonal_rows = initializers.orthogonal(scale=num_random_features**0.5)
    random_projection = self.variable(
      'frozen',
      'random_projection',
      lambda: orthogonal_rows(self.make_rng('params'), (num_random_features, self.token_dim), jnp.float32),
    ).value

    k, q, v = self.projections(x, 'kqv', use_bias=True)
    k_features = positive_random_features(k, random_projection)
    q_features = positive_random_features(q, random_projection)
    normaliser = jnp.einsum('bhwm,bm->bhw', q_features, k_features.sum(axis=(1, 2)))
    keys_values = jnp.einsum('bhwm,bhwd->bmd', k_features, v.astype(jnp.float32))
    y = jnp.einsum('bhwm,bmd->bhwd', q_features, keys_values) / (normaliser[..., None] + 1e-8)

    y = Dense(self.token_dim, dtype=self.dtype, name='proj')(y.astype(v.dtype))
    x = v + nn.Dropout(self.dropout_rate, deterministic=not train)(y)
    # Here the reference's MLP drops its output only, not its hidden layer.
    y = Mlp(self.token_dim, self.token_dim, dtype=self.dtype, name='mlp')(
      LayerNorm(dtype=self.dtype, name='norm2')(x), train=train
    )
    return x + nn.Dropout(self.dropout_rate, deterministic=not train)(y)


class TokensToToken(nn.Module):
  """Image to token grid: (B, H, W, C) -> (B, H', W', embed_dim), with (H', W') = `token_grid((H, W))`.

  `tokens_type` names the attention between the splits: 'performer', 'transformer', or 'convolution',
  the paper's ablation with three plain convolutions.
  """

  tokens_type: TokensType
  embed_dim: int
  token_dim: int = 64
  performer_dropout_rate: float = 0.1
  soft_split_form: SoftSplitForm = 'conv'
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    if self.tokens_type == 'convolution':
      return self._convolutions(images)
    x = images
    for number, split in enumerate(SPLITS[:-1], start=1):
      x = self._attention(split, f'attention{number}')(x, train=train)
    dense = DenseParameters(SPLITS[-1].kernel ** 2 * self.token_dim, self.embed_dim, name='project')()
    return patch_dense(x, SPLITS[-1], dense, form=self.soft_split_form, dtype=self.dtype)

  def _attention(self, split: Split, name: str) -> nn.Module:
    common = dict(soft_split_form=self.soft_split_form, dtype=self.dtype, name=name)
    if self.tokens_type == 'transformer':
      return TokenTransformer(split, self.token_dim, **common)
    return TokenPerformer(split, self.token_dim, dropout_rate=self.performer_dropout_rate, **common)

  def _convolutions(self, x: Array) -> Array:
    widths = (self.token_dim, self.token_dim, self.embed_dim)
    names = ('soft_split0', 'soft_split1', 'project')
    for split, width, name in zip(SPLITS, widths, names, strict=True):
      init = torch_conv_init(fan_in=split.kernel**2 * x.shape[-1])
      x = nn.Conv(
        width,
        (split.kernel, split.kernel),
        split.stride,
        padding=split.padding,
        kernel_init=init,
        bias_init=init,
        dtype=self.dtype,
        name=name,
      )(x)
    return x
