"""The table of named models against the published sizes."""

import jax
import jax.numpy as jnp
import pytest

import t2t_vit_jax
from t2t_vit_jax import UserError
from tests import golden


def test_every_named_model_has_a_golden_row():
  assert t2t_vit_jax.list_models() == list(golden.PARAMETERS)


@pytest.mark.parametrize('name', golden.PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
  model = t2t_vit_jax.create_model(name)
  variables = golden.shapes_of(model, jnp.zeros((1, 224, 224, 3)))
  everything, trained = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (variables, variables['params']))
  assert (everything, trained) == golden.PARAMETERS[name]


def test_a_second_head_adds_a_linear_layer_of_the_heads_shape():
  model = t2t_vit_jax.create_model('t2t_vit_24', token_labeling=True)
  variables = golden.shapes_of(model, jnp.zeros((1, 224, 224, 3)))
  everything = sum(x.size for x in jax.tree.leaves(variables))
  assert everything == golden.PARAMETERS['t2t_vit_24'][0] + 512 * 1000 + 1000


def test_overrides_replace_the_variants_arguments():
  model = t2t_vit_jax.create_model('t2t_vit_14', num_classes=5, depth=2, image_size=96)
  assert (model.num_classes, model.depth, model.image_size, model.embed_dim) == (5, 2, 96, 384)


def test_the_small_model_is_known_but_not_listed():
  assert 't2t_vit_tiny' not in t2t_vit_jax.list_models()
  assert t2t_vit_jax.create_model('t2t_vit_tiny').embed_dim < 384


def test_unknown_names_are_answered_with_the_nearest():
  with pytest.raises(UserError, match=r"unknown model 't2t_vit_t14': did you mean .*'t2t_vit_t_14'"):
    t2t_vit_jax.create_model('t2t_vit_t14')
  with pytest.raises(UserError, match="no argument 'num_class': did you mean 'num_classes'"):
    t2t_vit_jax.create_model('t2t_vit_14', num_class=3)
