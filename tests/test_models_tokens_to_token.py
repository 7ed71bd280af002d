"""The token transformer's attention by chunks against all of it at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t2t_vit_jax import T2TViT, UserError
from t2t_vit_jax.models import tokens_to_token
from tests import golden


@pytest.mark.parametrize('num_tokens', [512, 700])  # with and without a last chunk that is smaller
def test_chunked_attention_and_its_gradients_equal_torch(num_tokens, strict_dtypes):
  rng = np.random.default_rng(0)
  q, k, v, cotangent = rng.normal(size=(4, 2, num_tokens, 16)).astype(np.float32)
  wide = [torch.from_numpy(x).double().requires_grad_() for x in (q, k, v)]
  expected = torch.nn.functional.scaled_dot_product_attention(*wide, scale=1.0)
  expected.backward(torch.from_numpy(cotangent).double())

  actual, pull_back = jax.vjp(tokens_to_token.chunked_attention, q, k, v)
  np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-5)
  for gradient, tensor in zip(pull_back(cotangent), wide, strict=True):
    wanted = tensor.grad.numpy()
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_chunked_attention_never_holds_all_scores():
  num_tokens = 3136
  tokens = jax.ShapeDtypeStruct((2, num_tokens, 64), jnp.float32)

  def temporaries(attention):
    gradient = jax.grad(lambda q, k, v: attention(q, k, v).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(tokens, tokens, tokens).compile().memory_analysis().temp_size_in_bytes

  all_scores = 2 * num_tokens**2 * 4  # bytes
  assert temporaries(tokens_to_token.chunked_attention) < all_scores / 2
  assert temporaries(tokens_to_token.full_attention) > all_scores


@pytest.mark.parametrize(('form', 'loops'), [('full', 0), ('chunked', 2), ('auto', 1)])
def test_auto_is_chunked_where_tokens_are_many(form, loops):
  model = T2TViT(**{**golden.TINY_MODELS['transformer'], 'token_attention_form': form})
  images = jnp.zeros((1, 160, 160, 3))  # 1,600 tokens after the first split, 400 after the second
  variables = golden.shapes_of(model, images)
  assert str(jax.make_jaxpr(model.apply)(variables, images)).count('scan[') == loops


def test_unknown_forms_are_refused():
  with pytest.raises(UserError, match='token_attention_form must be one of auto, full, chunked, cudnn, not'):
    T2TViT(token_attention_form='flash')
  with pytest.raises(UserError, match='soft_split_form must be one of conv, patches, not'):
    T2TViT(soft_split_form='unfold')
