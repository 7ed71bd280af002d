"""The tables in docs/models.md are what the models say."""

from pathlib import Path
import runpy

import pytest
import torch

import t2t_vit_jax
from t2t_vit_jax.models.published import PUBLISHED
from tests import torch_reference
from tests.parameters import slow_but

DOCS = Path(__file__).parents[1] / 'docs'
model_table = runpy.run_path(str(DOCS / 'model_table.py'))


@pytest.mark.slow
def test_page_is_up_to_date():
  page = (DOCS / 'models.md').read_text()
  assert model_table['render'](page) == page, 'run `python docs/model_table.py`'


@pytest.mark.parametrize(
  ('name', 'total', 'layers'), [('t2t_vit_14', '4.78', '4.33'), ('t2t_vit_t_14', '6.09', '4.33')]
)
def test_multiply_adds_are_the_papers(name, total, layers):
  products = model_table['count_multiply_adds'](name)
  assert (f'{products.total / 1e9:.2f}', f'{products.layers / 1e9:.2f}') == (total, layers)


@pytest.mark.parametrize('name', slow_but(('t2t_vit_14',), t2t_vit_jax.list_models()))
def test_parameters_are_pytorchs(name):
  with torch.device('meta'):
    parameters = list(torch_reference.create(name).parameters())
  counts = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
  assert model_table['count_parameters'](name) == counts


def test_every_model_has_an_accuracy_and_every_file_a_model_and_a_name_of_its_own():
  models, unpublished = {row.model for row in PUBLISHED.values()}, set(model_table['PAPER_ONLY'])
  assert models | unpublished == set(t2t_vit_jax.list_models())
  assert not models & unpublished
  assert models <= PUBLISHED.keys()
  assert len({row.url for row in PUBLISHED.values()}) == len(PUBLISHED)
