"""The PyTorch oracle of the other tests, against numbers of the published code."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests import golden, torch_reference

HALF_CONSTANT = ('performer', 'transformer', 'se', 'ghost', 'dense')
WITH_GRADIENTS = ('performer', 'transformer')


def golden_model(name):
  """The golden model of that name, in evaluation mode."""
  model = torch_reference.create(golden.TINY_MODELS[name])
  model.load_state_dict(golden.load_state_dict(name))
  return model.eval()


def to_torch(images_nhwc):
  return torch.from_numpy(images_nhwc).permute(0, 3, 1, 2).contiguous()


def assert_near(actual, expected):
  np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', golden.TINY_MODELS)
def test_golden_numbers(name):
  model = golden_model(name)
  numbers = golden.load_numbers(f'tiny_{name}')
  images = to_torch(numbers['images_nhwc'])
  with torch.no_grad():
    assert_near(model(images), numbers['logits'])
    if 'tokens' in numbers:
      assert_near(model.tokens_to_token(images), numbers['tokens'])
      assert_near(model.forward_features(images), numbers['features'])


@pytest.mark.parametrize('name', HALF_CONSTANT)
def test_images_with_a_constant_half(name):
  model = golden_model(name)
  numbers = golden.load_numbers('tiny_half_constant')
  with torch.no_grad():
    assert_near(model(to_torch(numbers['images_nhwc'])), numbers[f'logits_{name}'])


@pytest.mark.parametrize('name', WITH_GRADIENTS)
def test_golden_gradients(name):
  model = golden_model(name)
  numbers = golden.load_numbers(f'tiny_{name}')
  loss = functional.cross_entropy(model(to_torch(numbers['images_nhwc'])), torch.from_numpy(numbers['labels']).long())
  loss.backward()
  np.testing.assert_allclose(loss.item(), numbers['loss'], rtol=1e-5)
  gradients = {key: parameter.grad.numpy() for key, parameter in model.named_parameters() if parameter.requires_grad}
  assert gradients.keys() == {key.removeprefix('grad/') for key in numbers if key.startswith('grad/')}
  for key, gradient in gradients.items():
    expected = numbers[f'grad/{key}']
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=key)


@pytest.mark.parametrize('name', golden.PARAMETERS)
def test_number_of_parameters(name):
  with torch.device('meta'):
    parameters = list(torch_reference.create(name).parameters())
  counts = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
  assert counts == golden.PARAMETERS[name]


def test_table_of_models():
  assert torch_reference.MODELS.keys() == golden.PARAMETERS.keys()


def test_convolution_tokens():
  model = torch_reference.create('t2t_vit_7', tokens_type='convolution', image_size=48).eval()
  names = {f'{layer}.{leaf}' for layer in ('soft_split0', 'soft_split1', 'project') for leaf in ('weight', 'bias')}
  assert set(model.tokens_to_token.state_dict()) == names
  assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 1000)


def test_without_a_head_features():
  model = torch_reference.create('t2t_vit_7', num_classes=0, image_size=32).eval()
  assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 256)


@pytest.mark.parametrize('block_type', ['standard', 'se', 'ghost', 'dense'])
def test_training_mode_drops_and_gives_every_trained_parameter_a_gradient(block_type):
  torch.manual_seed(0)
  arguments = dict(golden.TINY_MODELS['performer' if block_type == 'standard' else block_type], num_classes=3)
  model = torch_reference.create(
    arguments, dropout_rate=0.1, attention_dropout_rate=0.1, stochastic_depth_rate=0.1
  ).train()
  images = torch.randn(2, 3, 64, 64)
  logits = model(images)
  assert not torch.equal(logits, model(images))
  logits.sum().backward()
  trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
  frozen = {'pos_embed', 'tokens_to_token.attention1.w', 'tokens_to_token.attention2.w'}
  assert set(model.state_dict()) - trained == frozen
  assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
  torch.manual_seed(0)
  branch = torch.ones(4000, 2, 3)
  dropped = torch_reference.drop_samples(branch, 0.25, training=True)
  assert set(np.unique(dropped.numpy().round(5))) == {np.float32(0), np.float32(1.33333)}
  assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
  assert abs(dropped.mean().item() - 1) < 0.05
  assert torch_reference.drop_samples(branch, 0.25, training=False) is branch
