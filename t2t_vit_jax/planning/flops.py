"""Counts the arithmetic of matrix products and convolutions, loops as often as they run.

XLA's own count has the body of a loop once, and depends on what the compiler makes of a program. This one reads what
JAX hands to the compiler: a multiplication and an addition of each product are two operations. Everything else
(exponentials, normalisation, augmentation, the optimizer) is a few per cent of a vision transformer and left out.
"""

from collections.abc import Iterator
import math
from typing import Any

import numpy as np


def count_flops(function: Any, *arguments: Any) -> int:
  """Operations of one call of a jitted function; all branches count, and loops of unknown length once."""
  return _count(function.trace(*arguments).jaxpr.jaxpr)


def _count(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      total += _dot_flops(equation)
    elif name == 'conv_general_dilated':
      total += _convolution_flops(equation)
    else:
      times = params['length'] if name == 'scan' else 1
      inner = [_count(program) for program in _inner_programs(params)]
      # Of the forms that a product has on several platforms (`lax.platform_dependent`) one runs.
      total += times * (max(inner) if params.get('branches_platforms') else sum(inner))
  return total


def _inner_programs(params: dict[str, Any]) -> Iterator[Any]:
  """Yields the programs inside an operation such as a loop or a jitted call."""
  for value in params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      part = getattr(part, 'jaxpr', part)  # a ClosedJaxpr holds one
      if hasattr(part, 'eqns'):
        yield part


def _dot_flops(equation: Any) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(equation: Any) -> int:
  """Counts no products with padding, nor with the zeros between the values of a dilated input."""
  params, (left, right) = equation.params, (x.aval.shape for x in equation.invars)
  numbers, out = params['dimension_numbers'], equation.outvars[0].aval.shape
  num_pairs = 1  # of an output and an input position
  for i, (low, _) in enumerate(params['padding']):
    kernel, size = right[numbers.rhs_spec[2 + i]], left[numbers.lhs_spec[2 + i]]
    starts = np.arange(out[numbers.out_spec[2 + i]])[:, None] * params['window_strides'][i] - low
    places = starts + np.arange(kernel) * params['rhs_dilation'][i]
    dilation = params['lhs_dilation'][i]
    num_pairs *= int(((places >= 0) & (places <= (size - 1) * dilation) & (places % dilation == 0)).sum())
  batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
  return 2 * batch * features * right[numbers.rhs_spec[1]] * num_pairs
