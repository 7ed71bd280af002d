"""The tokens-to-token module (paper section 3.1): soft splits with a small attention between them."""

from typing import Any, Literal, NamedTuple

from flax import linen as nn
import jax
from jax import lax
from jax.nn import initializers
import jax.numpy as jnp

from t2t_vit_jax.models.attention import cudnn_attention, takes_cudnn
from t2t_vit_jax.models.layers import (
  Dense,
  DenseParameters,
  Dtype,
  LayerNorm,
  LayerNormParameters,
  Mlp,
  torch_conv_init,
)
from t2t_vit_jax.models.patch_layers import SoftSplitForm, patch_dense, patch_norm_dense
from t2t_vit_jax.models.products import einsum, product_precision
from t2t_vit_jax.models.soft_split import SPLITS, Split

Array = jax.Array
TokenAttentionForm = Literal['auto', 'full', 'chunked', 'cudnn']

QUERY_CHUNK = 256
FULL_ATTENTION_TOKENS = 1024  # with more tokens 'auto' means 'chunked'


class TokenLayer(nn.Module):
  """A step from the image or tokens on a grid to fewer, wider tokens: (B, H, W, C) -> (B, H', W', token_dim).

  Attributes:
    split: the patches that become tokens.
    token_dim: width of the new tokens.
    soft_split_form: how layers over patches are computed; see `patch_layers`.
    dtype: of computation and result.
  """

  split: Split
  token_dim: int
  soft_split_form: SoftSplitForm = 'conv'
  dtype: Dtype = jnp.float32


class Projection(TokenLayer):
  """A Dense layer of every patch, the module's last step."""

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    del train
    dense = DenseParameters(self.split.kernel**2 * x.shape[-1], self.token_dim)
    nn.share_scope(self, dense)
    return patch_dense(x, self.split, dense(), form=self.soft_split_form, dtype=self.dtype)


class Convolution(TokenLayer):
  """The paper's ablation: a plain convolution in place of a soft split and the attention after it."""

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    del train
    init = torch_conv_init(fan_in=self.split.kernel**2 * x.shape[-1])
    convolution = nn.Conv(
      self.token_dim,
      (self.split.kernel, self.split.kernel),
      self.split.stride,
      padding=self.split.padding,
      kernel_init=init,
      bias_init=init,
      dtype=self.dtype,
      precision=product_precision(self.dtype),
    )
    nn.share_scope(self, convolution)
    return convolution(x)


class TokenAttention(TokenLayer):
  """Base of both attentions: LayerNorm and three projections of every patch.

  Both sow their weights, (B, T, T) for T patches row by row, as `attention`.
  """

  def projections(self, x: Array, dense_name: str, *, use_bias: bool) -> list[Array]:
    """Three projections of the patches of (B, H, W, C), each (B, H', W', token_dim)."""
    patch_dim = self.split.kernel**2 * x.shape[-1]
    norm = LayerNormParameters(patch_dim, name='norm1')()
    dense = DenseParameters(patch_dim, 3 * self.token_dim, use_bias, name=dense_name)()
    return patch_norm_dense(x, self.split, norm, dense, 3, form=self.soft_split_form, dtype=self.dtype)


def attention_weights(q: Array, k: Array) -> Array:
  """softmax(q kᵀ), (B, T, T), of q and k (B, T, D); q is scaled already."""
  return nn.softmax(einsum('btd,bsd->bts', q, k), axis=-1)


def full_attention(q: Array, k: Array, v: Array) -> Array:
  """Softmax attention with one head: softmax(q kᵀ) v, of q, k and v (B, T, D); q is scaled already."""
  return einsum('bts,bsd->btd', attention_weights(q, k), v)


def chunked_attention(q: Array, k: Array, v: Array) -> Array:
  """Computes `full_attention` for `QUERY_CHUNK` queries at a time, and again in the backward pass.

  Queries do not depend on each other, so no more than QUERY_CHUNK x T scores are ever in memory. The full form keeps
  T x T of them for the backward pass: 9.8 million an image at 224 px, and 85 million at 384 px.
  """

  @jax.checkpoint
  def attend(query: Array) -> Array:
    """Attention of one query of each image, (B, D); `lax.map` makes chunks of queries."""
    return full_attention(query[:, None], k, v)[:, 0]

  return lax.map(attend, q.swapaxes(0, 1), batch_size=QUERY_CHUNK).swapaxes(0, 1)


class TokenTransformer(TokenAttention):
  """One-head softmax attention over patches: (B, H, W, C) -> (B, H', W', token_dim).

  Two quirks of the reference are kept because trained weights depend on them: scores are scaled by (width of a
  *patch*) ** -0.5, and the residual around the attention starts from the values, since the input has another width.
  """

  attention_form: TokenAttentionForm = 'auto'

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    scale = (self.split.kernel**2 * x.shape[-1]) ** -0.5
    q, k, v = self.projections(x, 'qkv', use_bias=False)
    grid_shape = v.shape
    q, k, v = (y.reshape(y.shape[0], -1, self.token_dim) for y in (q * scale, k, v))
    y = self.attend(q, k, v)
    if self.is_mutable_collection('intermediates'):
      # Computed apart from y, so that the compiler drops it where nobody reads it.
      self.sow('intermediates', 'attention', attention_weights(q, k))
    x = (v + Dense(self.token_dim, dtype=self.dtype, name='proj')(y)).reshape(grid_shape)
    mlp = Mlp(self.token_dim, self.token_dim, dtype=self.dtype, name='mlp')
    return x + mlp(LayerNorm(dtype=self.dtype, name='norm2')(x), train=train)

  def attend(self, q: Array, k: Array, v: Array) -> Array:
    """Attention in the form that `attention_form` names: (B, T, D), as q, k and v."""
    long = q.shape[1] > FULL_ATTENTION_TOKENS
    chunked = long if self.attention_form in ('auto', 'cudnn') else self.attention_form == 'chunked'
    attention = chunked_attention if chunked else full_attention
    if self.attention_form != 'cudnn' or not takes_cudnn(q):
      return attention(q, k, v)

    def otherwise(*heads: Array) -> Array:
      return attention(*(x[:, :, 0] for x in heads))[:, :, None]

    q, k, v = (x[:, :, None] for x in (q, k, v))
    return cudnn_attention(q, k, v, otherwise)[:, :, 0]


def positive_random_features(x: Array, random_projection: Array) -> Array:
  """exp(x wᵀ - |x|²/2) / sqrt(m): features whose inner products estimate the softmax kernel, without bias.

  The exponent is computed in float32. With m orthogonal rows of length sqrt(m) in w it is at most m/2, so float32 and
  bfloat16 cannot overflow for the m = 32 of every published model; float16 does.

  Args:
    x: (B, T, D), float32 or bfloat16.
    random_projection: w, (m, D).

  Returns:
    (B, T, m), as x.
  """
  num_random_features = random_projection.shape[0]
  wide = x.astype(jnp.float32)
  squared_norm = jnp.sum(wide * wide, axis=-1, keepdims=True)
  projected = einsum('btd,md->btm', wide, random_projection, precision=product_precision(x.dtype))
  return (jnp.exp(projected - squared_norm / 2) * num_random_features**-0.5).astype(x.dtype)


class TokenPerformer(TokenAttention):
  """Linear attention over patches by positive random features (FAVOR+): (B, H, W, C) -> (B, H', W', token_dim).

  The random projection is drawn once and never trained: it lives in the collection `frozen`. The reference packs key,
  query and value in this order and fixes the dropout rate at 0.1.
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
    grid_shape = v.shape
    k, q, v = (y.reshape(y.shape[0], -1, self.token_dim) for y in (k, q, v))
    k_features = positive_random_features(k, random_projection)
    q_features = positive_random_features(q, random_projection)
    keys_sum = k_features.sum(axis=1, dtype=jnp.float32).astype(self.dtype)
    normaliser = einsum('btm,bm->bt', q_features, keys_sum, preferred_element_type=jnp.float32)
    keys_values = einsum('bsm,bsd->bmd', k_features, v, preferred_element_type=jnp.float32)
    if self.is_mutable_collection('intermediates'):
      # The other products give y = weights @ v without forming the weights.
      weights = einsum('btm,bsm->bts', q_features, k_features, preferred_element_type=jnp.float32)
      self.sow('intermediates', 'attention', weights / (normaliser[..., None] + 1e-8))

    # proj(q_features @ keys_values / normaliser); proj's kernel multiplies 32 rows an image instead of all tokens.
    proj = DenseParameters(self.token_dim, self.token_dim, name='proj')()
    precision = product_precision(self.dtype)
    projected = einsum('bmd,de->bme', keys_values, proj['kernel'], precision=precision).astype(self.dtype)
    y = einsum('btm,bme->bte', q_features, projected, preferred_element_type=jnp.float32)
    y = (y / (normaliser[..., None] + 1e-8) + proj['bias'].reshape(1, 1, -1)).astype(v.dtype)
    x = (v + nn.Dropout(self.dropout_rate, deterministic=not train)(y)).reshape(grid_shape)
    # Here the reference's MLP drops its output only, not its hidden layer.
    y = Mlp(self.token_dim, self.token_dim, dtype=self.dtype, name='mlp')(
      LayerNorm(dtype=self.dtype, name='norm2')(x), train=train
    )
    return x + nn.Dropout(self.dropout_rate, deterministic=not train)(y)


class TokensType(NamedTuple):
  """A row of `TOKEN_ATTENTIONS`.

  Attributes:
    layer: class of the layers at the first two soft splits.
    fields: the class's own fields -> the fields of `TokensToToken` that fill them.
    names: names of the two layers in the parameters.
    projection: class of the layer at the last soft split.
  """

  layer: type[TokenLayer]
  fields: dict[str, str] = {}
  names: tuple[str, str] = ('attention1', 'attention2')
  projection: type[TokenLayer] = Projection


# Layers that make tokens, by `tokens_type`. docs/extending.md shows how to add one.
TOKEN_ATTENTIONS = {
  'performer': TokensType(TokenPerformer, {'dropout_rate': 'performer_dropout_rate'}),
  'transformer': TokensType(TokenTransformer, {'attention_form': 'token_attention_form'}),
  'convolution': TokensType(Convolution, names=('soft_split0', 'soft_split1'), projection=Convolution),
}


class TokensToToken(nn.Module):
  """Image to token grid: (B, H, W, C) -> (B, H', W', embed_dim), with (H', W') = `token_grid((H, W))`.

  `tokens_type` names a row of `TOKEN_ATTENTIONS`: the attention between the splits, or 'convolution'.
  """

  tokens_type: str
  embed_dim: int
  token_dim: int = 64
  performer_dropout_rate: float = 0.1
  soft_split_form: SoftSplitForm = 'conv'
  token_attention_form: TokenAttentionForm = 'auto'
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    row = TOKEN_ATTENTIONS[self.tokens_type]
    fields = {field: getattr(self, source) for field, source in row.fields.items()}
    common: dict[str, Any] = dict(soft_split_form=self.soft_split_form, dtype=self.dtype)
    for split, name in zip(SPLITS[:-1], row.names, strict=True):
      x = row.layer(split, self.token_dim, **common, **fields, name=name)(x, train=train)
    return row.projection(SPLITS[-1], self.embed_dim, **common, name='project')(x, train=train)
