"""JAX's side of `benchmarks.model`."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import computations
from benchmarks.computations import Workload
from benchmarks.processes import Computations, resident_growth
from t2t_vit_jax.planning.flops import count_flops
from t2t_vit_jax.planning.peaks import peak_flops


class JaxComputations(Computations):
  """See `processes.Computations`."""

  def __init__(self) -> None:
    jax.config.update('jax_enable_compilation_cache', False)  # times are to be seen
    self._device = jax.devices()[0]
    self._calls: dict[str, Any] = {}
    self._blocking: dict[str, bool] = {}

  def device(self) -> dict[str, Any]:
    kind = self._device.device_kind
    return {'platform': self._device.platform, 'kind': kind, 'peak_flops': peak_flops(kind)}

  def prepare(self, key: str, computation: str, **details: Any) -> dict[str, Any]:
    """See `processes.Computations`; `computation` is one of `model.COMPUTATIONS`, `workload` a `Workload`."""
    workload: Workload = details['workload']
    function, step, arguments = getattr(self, f'_{computation}')(workload)
    start = time.perf_counter()
    compiled = function.lower(*computations.describe(arguments)).compile()
    compile_s = time.perf_counter() - start
    call = step(compiled, arguments)
    before = self._device.memory_stats()
    times = []
    for _ in range(2):
      start = time.perf_counter()
      jax.block_until_ready(call())
      times.append(time.perf_counter() - start)
    self._calls[key], self._blocking[key] = call, computation == 'latency'
    memory = compiled.memory_analysis()
    return {
      'compile_s': compile_s,
      'half_precision': workload.jax_dtype.itemsize == 2,
      'first_s': times[0],
      'warm_s': times[1],
      'product_flops': count_flops(function, *arguments),
      'temporaries': memory.temp_size_in_bytes if memory else None,
      'arguments': memory.argument_size_in_bytes if memory else None,
      'peak_growth': self._growth(before, call),
    }

  def _growth(self, before: dict[str, int] | None, call: Any) -> int | None:
    """Bytes that a call takes beside what is there anyway, as measured; None if a bigger program has hidden it."""
    if self._device.platform == 'cpu':
      return resident_growth(lambda: jax.block_until_ready(call()))
    after = self._device.memory_stats()
    if not before or not after or after['peak_bytes_in_use'] <= before['peak_bytes_in_use']:
      return None
    return after['peak_bytes_in_use'] - before['bytes_in_use']

  def seconds(self, key: str, calls: int) -> float:
    """See `processes.Computations`; only single images are waited for one by one."""
    call, blocking = self._calls[key], self._blocking[key]
    result = None
    start = time.perf_counter()
    for _ in range(calls):
      result = call()
      if blocking:
        jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls

  def _forward(self, workload: Workload) -> Any:
    model, variables = self._model(workload)
    arguments = variables, self._batch(workload)[0]
    return computations.jitted(computations.forward, model), _repeat, arguments

  _latency = _forward

  def _adamw_step(self, workload: Workload) -> Any:
    model, variables = self._model(workload)
    tx = optax.adamw(1e-4, weight_decay=0.05)

    def adamw_step(state: Any, frozen: Any, images: Any, labels: Any, rng: Any) -> Any:
      params, opt_state, number = state

      def loss_of(params: Any) -> Any:
        rngs = {'dropout': jax.random.fold_in(rng, number)}
        logits = model.apply({**frozen, 'params': params}, images, train=True, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

      loss, gradients = jax.value_and_grad(loss_of)(params)
      updates, opt_state = tx.update(gradients, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state, number + 1), loss

    params = variables.pop('params')
    state = params, jax.jit(tx.init)(params), jnp.zeros((), jnp.int32)
    arguments = state, variables, *self._batch(workload), jax.random.key(0)
    return jax.jit(adamw_step, donate_argnums=0), _training, arguments

  def _training_step(self, workload: Workload) -> Any:
    recipe = computations.training_recipe(workload, computations.one_device_mesh(self._device))
    shapes = recipe.abstract_train_arguments[1]
    rng = np.random.default_rng(0)
    batch = {
      'image': rng.integers(256, size=shapes['image'].shape, dtype=np.uint8),
      'label': rng.integers(1000, size=workload.batch_size, dtype=np.int32),
      'mask': np.ones(workload.batch_size, np.float32),
    }
    batch = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), batch, shapes)
    return recipe.train_step, _training, (recipe.make_state(jax.random.key(0)), batch, jax.random.key(0))

  def _model(self, workload: Workload) -> Any:
    model = computations.build_model(workload)
    images = jnp.zeros((1, workload.image_size, workload.image_size, 3))
    return model, jax.jit(model.init)(jax.random.key(0), images)

  def _batch(self, workload: Workload) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    size = workload.image_size
    images = rng.normal(size=(workload.batch_size, size, size, 3)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(1000, size=workload.batch_size, dtype=np.int32))


def _repeat(compiled: Any, arguments: Any) -> Any:
  return lambda: compiled(*arguments)


def _training(compiled: Any, arguments: Any) -> Any:
  """Steps that follow each other: each gives its state, whose memory is used again, to the next."""
  state, *rest = arguments

  def step() -> Any:
    nonlocal state
    state, rest_of_result = compiled(state, *rest)
    return state, rest_of_result

  return step
