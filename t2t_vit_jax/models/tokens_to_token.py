"""The tokens-to-token module (paper section 3.1): soft splits with a small attention between them."""

from typing import Literal

from flax import linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp

from t2t_vit_jax.models.layers import Dense, Dtype, LayerNorm, Mlp, torch_conv_init
from t2t_vit_jax.models.soft_split import SPLITS, soft_split

Array = jax.Array
TokensType = Literal['performer', 'transformer', 'convolution']


def centred(x: Array) -> Array:
  """Subtracts the mean over the last axis, in float32: for a LayerNorm over patches, which it does not change.

  Where the image is constant a patch has no variance and LayerNorm multiplies what its own mean left
  by rounding with epsilon ** -0.5 = 316: enough to move logits by 7e-5. A second mean over
  values that are already centred leaves nothing.
  """
  x = x.astype(jnp.float32)
  return x - x.mean(axis=-1, keepdims=True)


class TokenTransformer(nn.Module):
  """One-head softmax attention that narrows tokens: (B, T, C) -> (B, T, token_dim).

  Two quirks of the reference are kept because trained weights depend on them: scores are scaled by
  the *input* width C ** -0.5, and the residual around the attention starts from the values, since
  the input has another width.
  """

  token_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    scale = x.shape[-1] ** -0.5
    qkv = Dense(3 * self.token_dim, use_bias=False, dtype=self.dtype, name='qkv')(
      LayerNorm(dtype=self.dtype, name='norm1')(centred(x))
    )
    q, k, v = jnp.split(qkv, 3, axis=-1)  # each (B, T, token_dim)
    scores = jnp.einsum('btd,bsd->bts', q * scale, k)
    y = jnp.einsum('bts,bsd->btd', nn.softmax(scores, axis=-1), v)
    x = v + Dense(self.token_dim, dtype=self.dtype, name='proj')(y)
    mlp = Mlp(self.token_dim, self.token_dim, dtype=self.dtype, name='mlp')
    return x + mlp(LayerNorm(dtype=self.dtype, name='norm2')(x), train=train)


def positive_random_features(x: Array, random_projection: Array) -> Array:
  """exp(x wᵀ - |x|²/2) / sqrt(m): features whose inner products estimate the softmax kernel, without bias.

  Always float32. With m orthogonal rows of length sqrt(m) in w the exponent is at most m/2, so
  float32 cannot overflow for the m = 32 of every published model; half precision does.

  Args:
    x: (B, T, D).
    random_projection: w, (m, D).

  Returns:
    (B, T, m), float32.
  """
  x = x.astype(jnp.float32)
  num_random_features = random_projection.shape[0]
  squared_norm = jnp.sum(x * x, axis=-1, keepdims=True)
  projected = jnp.einsum('btd,md->btm', x, random_projection)
  return jnp.exp(projected - squared_norm / 2) * num_random_features**-0.5


class TokenPerformer(nn.Module):
  """Linear attention by positive random features (FAVOR+): (B, T, C) -> (B, T, token_dim).

  The random projection is drawn once and never trained: it lives in the collection `frozen`. The
  reference packs key, query, value in this order and hard-wires its dropout rate to 0.1.
  """

  token_dim: int
  random_feature_ratio: float = 0.5
  dropout_rate: float = 0.1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    num_random_features = int(self.token_dim * self.random_feature_ratio)
    orthogonal_rows = initializers.orthogonal(scale=num_random_features**0.5)
    random_projection = self.variable(
      'frozen',
      'random_projection',
      lambda: orthogonal_rows(self.make_rng('params'), (num_random_features, self.token_dim), jnp.float32),
    ).value

    kqv = Dense(3 * self.token_dim, dtype=self.dtype, name='kqv')(LayerNorm(dtype=self.dtype, name='norm1')(centred(x)))
    k, q, v = jnp.split(kqv, 3, axis=-1)  # each (B, T, token_dim)
    k_features = positive_random_features(k, random_projection)
    q_features = positive_random_features(q, random_projection)
    normaliser = jnp.einsum('btm,bm->bt', q_features, k_features.sum(axis=1))
    keys_values = jnp.einsum('bsm,bsd->bmd', k_features, v.astype(jnp.float32))
    y = jnp.einsum('btm,bmd->btd', q_features, keys_values) / (normaliser[..., None] + 1e-8)

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
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    if self.tokens_type == 'convolution':
      return self._convolutions(images)
    x = images
    for number, split in enumerate(SPLITS[:-1], start=1):
      x = soft_split(x, split)
      batch, height, width, channels = x.shape
      x = self._attention(f'attention{number}')(x.reshape(batch, height * width, channels), train=train)
      x = x.reshape(batch, height, width, self.token_dim)
    return Dense(self.embed_dim, dtype=self.dtype, name='project')(soft_split(x, SPLITS[-1]))

  def _attention(self, name: str) -> nn.Module:
    if self.tokens_type == 'transformer':
      return TokenTransformer(self.token_dim, dtype=self.dtype, name=name)
    return TokenPerformer(self.token_dim, dropout_rate=self.performer_dropout_rate, dtype=self.dtype, name=name)

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
