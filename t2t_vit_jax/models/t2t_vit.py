"""T2T-ViT (Yuan et al., ICCV 2021, arXiv 2101.11986): tokens-to-token module, transformer encoder, linear head."""

from collections.abc import Collection, Iterator
import itertools
import math
from typing import Any, Literal, NamedTuple, cast, get_args

from flax import linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp
import numpy as np

from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.attention import AttentionForm
from t2t_vit_jax.models.block_variants import BLOCK_TYPES, Transition
from t2t_vit_jax.models.blocks import (
  STACK,
  RematPolicy,
  rematerialised,
  run_as_loop,
  stack_blocks,
  with_stored_gradient,
)
from t2t_vit_jax.models.encoder import EncoderBlock
from t2t_vit_jax.models.layers import Dense, Dtype, LayerNorm
from t2t_vit_jax.models.patch_layers import SoftSplitForm
from t2t_vit_jax.models.positions import resize_position_embedding, sinusoidal_position_embedding
from t2t_vit_jax.models.soft_split import token_grid
from t2t_vit_jax.models.tokens_to_token import TOKEN_ATTENTIONS, TokenAttentionForm, TokensToToken

Array = jax.Array
ResidualDtype = Literal['float32', 'bfloat16']
CHOICES: dict[str, Collection[str]] = {  # allowed values of fields of `T2TViT`
  'tokens_type': TOKEN_ATTENTIONS.keys(),
  'block_type': BLOCK_TYPES.keys(),
  'soft_split_form': get_args(SoftSplitForm),
  'attention_form': get_args(AttentionForm),
  'token_attention_form': get_args(TokenAttentionForm),
  'remat': get_args(RematPolicy),
  'residual_dtype': get_args(ResidualDtype),
}
# Fields of `T2TViT` that two models must share for the weights of one to mean the same in the other, but for those of
# the heads, `num_classes` and `token_labeling`: heads are dropped and replaced.
ARCHITECTURE = (
  'tokens_type',
  'embed_dim',
  'depth',
  'num_heads',
  'mlp_ratio',
  'qkv_bias',
  'qk_scale',
  'token_dim',
  'block_type',
  'dense_stages',
  'growth_rate',
)


class Features(NamedTuple):
  """Outputs of the encoder for a batch, after its last LayerNorm."""

  cls: Array  #: (B, D), the class token
  tokens: Array  #: (B, H, W, D), the other tokens on their grid


class HeadLogits(NamedTuple):
  """Outputs of the two heads of a model with token labeling for a batch, float32."""

  cls: Array  #: (B, num_classes), the class token's, of `head`
  tokens: Array  #: (B, T, num_classes), the other tokens' row by row, of `aux_head`

  def joined(self) -> Array:
    """Logits (B, num_classes) of an evaluation: half the largest of all tokens is added, class by class."""
    return self.cls + 0.5 * self.tokens.max(axis=1)


class T2TViT(nn.Module):
  """Image classifier: normalised images (B, height, width, C) -> logits (B, num_classes).

  Variables: `params` are trained; `frozen` holds the position table and the performers' random
  projections, which are saved and restored but never trained. Dropout and stochastic depth draw from
  the rng `dropout` when `train=True`. Parameters are float32, whatever the computation `dtype`.

  Attributes:
    num_classes: width of the head; 0 for no head, which returns `Features`.
    token_labeling: whether there is a second head, `aux_head`, on every token but the class token (Jiang et al.,
      NeurIPS 2021, arXiv 2104.10858). Evaluation joins both, see `HeadLogits`; `train=True` uses the first alone.
    image_size: pixels, one side or (height, width): the size the position table is made for. Images
      of any other size work too: the table is then resized as the reference does.
    tokens_type: attention of the tokens-to-token module: 'performer', 'transformer' or 'convolution'.
    embed_dim: width D of the encoder.
    depth: number of encoder blocks.
    num_heads: attention heads of a block; divides `embed_dim`.
    mlp_ratio: hidden width of a block's MLP as a multiple of `embed_dim`.
    qkv_bias: whether the query, key and value projections have a bias.
    qk_scale: factor of the attention scores; None for head_width ** -0.5.
    dropout_rate: after the position embedding, attention output and both MLP layers of each block.
    attention_dropout_rate: on attention weights.
    stochastic_depth_rate: rate of the last block; it rises linearly from 0 in the first.
    performer_dropout_rate: inside the token performer, where the reference fixes 0.1.
    norm_layer: makes the encoder's normalisation layers; called with `dtype` and `name`.
    token_dim: width inside the tokens-to-token module.
    block_type: 'standard', 'se' (squeeze-and-excitation), 'ghost' or 'dense'; see `block_variants`.
    dense_stages: blocks of each stage of a dense encoder, in place of `depth`.
    growth_rate: channels that each block of a dense encoder adds; it starts with `embed_dim`.
    soft_split_form: how the soft splits are computed: 'conv' never forms the patches and is faster, 'patches' is
      the definition. Parameters and results are the same; see `patch_layers.patch_norm_dense`.
    attention_form: how encoder blocks compute their attention: 'xla' by two products, 'cudnn' by cuDNN's kernel in
      programs for CUDA, where `dtype` is of half precision, no attention weight is dropped and no intermediates are
      asked for, and as 'xla' elsewhere. 'auto' means 'xla': the kernel was not tried on a GPU yet.
    token_attention_form: how the token transformer computes its attention: 'full' keeps all scores in memory,
      'chunked' the scores of some queries at a time; 'auto' chooses 'chunked' for many tokens. 'cudnn' takes the
      kernel as `attention_form` does, and is 'auto' elsewhere. Results are the same.
    scan_blocks: run all blocks but the last as a loop. The program then has two blocks instead of all: it compiles
      several times faster. Parameters are the same, and may be stacked (see `stack_blocks`); random draws (dropout,
      stochastic depth) differ.
    remat: 'none', or the name in `jax.checkpoint_policies` of what a block keeps for its backward pass; it computes
      the rest again, which costs time and saves memory. 'nothing_saveable' keeps the least.
    dtype: computation dtype; the logits are always float32. With float32, products are float32 on TPUs and GPUs too,
      which is slow there, unless `jax_default_matmul_precision` is set: see `products.product_precision`.
    residual_dtype: dtype of the sum that all blocks add to, or `dtype` if that is wider. 'bfloat16' saves memory and
      time in training, and costs accuracy beyond what `dtype` costs, since every sum is rounded.

  Raises:
    UserError: a field of `CHOICES` has an unknown value; ghost blocks have other widths than the reference's; or
      `scan_blocks` is set for dense blocks, which differ in width.
  """

  num_classes: int = 1000
  token_labeling: bool = False
  image_size: int | tuple[int, int] = 224
  tokens_type: str = 'performer'
  embed_dim: int = 768
  depth: int = 12
  num_heads: int = 12
  mlp_ratio: float = 4.0
  qkv_bias: bool = False
  qk_scale: float | None = None
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth_rate: float = 0.0
  performer_dropout_rate: float = 0.1
  norm_layer: Any = LayerNorm
  token_dim: int = 64
  block_type: str = 'standard'
  dense_stages: tuple[int, ...] = (3, 6, 6, 4)
  growth_rate: int = 64
  soft_split_form: SoftSplitForm = 'conv'
  attention_form: AttentionForm = 'auto'
  token_attention_form: TokenAttentionForm = 'auto'
  scan_blocks: bool = False
  remat: RematPolicy = 'none'
  dtype: Dtype = jnp.float32
  residual_dtype: ResidualDtype = 'float32'

  def __post_init__(self) -> None:
    for field, known in CHOICES.items():
      if getattr(self, field) not in known:
        raise UserError(f'{field} must be one of {", ".join(known)}, not {getattr(self, field)!r}')
    self.block_class.check_widths(self.embed_dim, self.mlp_ratio)
    if self.block_class.grows and self.scan_blocks:
      raise UserError('scan_blocks needs blocks of one width, and dense blocks grow: set scan_blocks to False')
    super().__post_init__()

  @property
  def block_class(self) -> type[EncoderBlock]:
    """The class of the encoder's blocks."""
    return BLOCK_TYPES[self.block_type].block

  @nn.compact
  def __call__(
    self, images: Array, *, train: bool = False, features: bool = False, head_logits: bool = False
  ) -> Array | Features | HeadLogits:
    """Classifies images; returns `Features` with `features=True` or no head, `HeadLogits` with `head_logits=True`.

    Raises:
      UserError: `images` is not a batch of floating-point images or too small for the splits; `num_heads` does not
        divide a block's width; or `head_logits` is set for a model without a second head, or together with `features`.
    """
    _check_images(images)
    if head_logits and (features or not self.num_classes or not self.token_labeling):
      raise UserError('head_logits=True needs a model with classes and token_labeling=True, and features=False')
    grid = token_grid((images.shape[1], images.shape[2]))
    tokens = TokensToToken(
      self.tokens_type,
      self.embed_dim,
      token_dim=self.token_dim,
      performer_dropout_rate=self.performer_dropout_rate,
      soft_split_form=self.soft_split_form,
      token_attention_form=self.token_attention_form,
      dtype=self.dtype,
      name='tokens_to_token',
    )(images, train=train)

    batch = images.shape[0]
    # The residual stream is float32, as under PyTorch's autocast, unless asked otherwise: every block adds to it, and
    # bfloat16 would round each sum. The blocks' branches compute in `dtype`.
    residual_dtype = jnp.promote_types(jnp.dtype(self.residual_dtype), self.dtype)
    x = tokens.reshape(batch, math.prod(grid), self.embed_dim).astype(jnp.float32)
    cls_token = self.param('cls_token', initializers.normal(0.02), (1, 1, self.embed_dim), jnp.float32)
    x = jnp.concatenate([jnp.broadcast_to(cls_token, (batch, 1, self.embed_dim)), x], axis=1)
    x = (x + self._position_embedding(grid)).astype(residual_dtype)
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)

    norm = self.norm_layer(dtype=self.dtype, name='norm')
    if features or not self.num_classes:
      x = norm(self._encode(x, train))
      return Features(cls=x[:, 0], tokens=x[:, 1:].reshape(batch, *grid, x.shape[-1]))
    head = Dense(self.num_classes, name='head')
    if not self.token_labeling or (train and not head_logits and not self.is_initializing()):
      cls = norm(self._encode(x, train, num_outputs=1)[:, 0])  # the head needs the class token only
      return head(cls.astype(jnp.float32))
    x = norm(self._encode(x, train)).astype(jnp.float32)
    logits = HeadLogits(head(x[:, 0]), Dense(self.num_classes, name='aux_head')(x[:, 1:]))
    if head_logits:
      return logits
    return logits.cls if train else logits.joined()

  def _encode(self, x: Array, train: bool, num_outputs: int | None = None) -> Array:
    """Runs all blocks: (B, T, D) -> (B, T, D'), with `num_outputs` the first tokens only: (B, num_outputs, D')."""
    # Where layers make their parameters, or their outputs are asked for, each runs by itself and on all tokens.
    layer_by_layer = self.is_initializing() or self.is_mutable_collection('intermediates')
    *blocks, last = self._blocks()
    if self.scan_blocks and blocks and not layer_by_layer:
      x = self._loop_over_blocks(x, train)
    else:
      for block in blocks:
        x = block(with_stored_gradient(x), train, None)
    return last(with_stored_gradient(x), train, None if layer_by_layer else num_outputs)

  def _blocks(self) -> Iterator[nn.Module]:
    """The encoder's layers in order, named blocks_0, blocks_1 and so on."""
    block_class, names = rematerialised(self.block_class, self.remat), (f'blocks_{i}' for i in itertools.count())
    if not self.block_class.grows:
      for rate in np.linspace(0, self.stochastic_depth_rate, self.depth):
        yield self._block(block_class, float(rate), name=next(names))
      return
    # A quirk of the reference: rates rise over 12 blocks, its default depth, but all blocks of stage i take the i-th.
    stage_rates = np.linspace(0, self.stochastic_depth_rate, 12)
    for stage, num_blocks in enumerate(self.dense_stages):
      if stage:
        yield Transition(dtype=self.dtype, name=next(names))
      for _ in range(num_blocks):
        yield self._block(block_class, float(stage_rates[stage]), name=next(names))

  def _block(self, block_class: type[EncoderBlock], stochastic_depth_rate: Any, **more: Any) -> EncoderBlock:
    return block_class(
      self.num_heads,
      self.mlp_ratio,
      qkv_bias=self.qkv_bias,
      qk_scale=self.qk_scale,
      dropout_rate=self.dropout_rate,
      attention_dropout_rate=self.attention_dropout_rate,
      stochastic_depth_rate=stochastic_depth_rate,
      norm_layer=self.norm_layer,
      attention_form=self.attention_form,
      dtype=self.dtype,
      **{field: getattr(self, source) for field, source in BLOCK_TYPES[self.block_type].fields.items()},
      **more,
    )

  def _loop_over_blocks(self, x: Array, train: bool) -> Array:
    """Runs all blocks but the last."""
    return run_as_loop(
      x,
      lambda rate: self._block(self.block_class, rate, parent=None),
      stack_blocks(self.variables['params'])[STACK],
      train=train,
      rates=jnp.linspace(0, self.stochastic_depth_rate, self.depth)[:-1] if self.stochastic_depth_rate else None,
      keys=jax.random.split(self.make_rng('dropout'), self.depth - 1) if train and self.has_rng('dropout') else None,
      remat=self.remat,
    )

  def _position_embedding(self, grid: tuple[int, int]) -> Array:
    """The stored table, (1, 1 + H * W, D), resized if the images are not of `image_size`."""
    height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
    table_grid = token_grid((height, width))
    table = self.variable(
      'frozen',
      'pos_embed',
      lambda: jnp.asarray(sinusoidal_position_embedding(1 + math.prod(table_grid), self.embed_dim)),
    ).value
    return resize_position_embedding(table, table_grid, grid)


def classify(model: T2TViT, variables: Any, features: Features) -> Array:
  """Logits (B, num_classes) of a batch's features: those that the model returns for the images in evaluation."""

  def apply(head: str, x: Array) -> Array:
    logits = Dense(model.num_classes).apply({'params': variables['params'][head]}, x.astype(jnp.float32))
    return cast(Array, logits)

  cls = apply('head', features.cls)
  if not model.token_labeling:
    return cls
  batch, _, _, width = features.tokens.shape
  return HeadLogits(cls, apply('aux_head', features.tokens.reshape(batch, -1, width))).joined()


def _check_images(images: Array) -> None:
  if images.ndim != 4:
    raise UserError(f'images must have shape (batch, height, width, channels), got {images.shape}')
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f'images must be floating-point, scaled to [0, 1] and normalised by mean and std; got {images.dtype}'
    )
