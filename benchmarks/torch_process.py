"""PyTorch's side of `benchmarks.model`: the model of `tests/torch_reference.py`. This module loads no JAX backend."""

import contextlib
import os
import time
from typing import Any
import warnings

from benchmarks.processes import Computations, resident_growth


class TorchComputations(Computations):
  """See `processes.Computations`."""

  def __init__(self) -> None:
    # Compilation is to be seen: nothing may come from an earlier run.
    os.environ.setdefault('TORCHINDUCTOR_FORCE_DISABLE_CACHES', '1')
    warnings.filterwarnings('ignore', message='dynamo_pgo force disabled')  # which says just that
    import torch

    self._torch: Any = torch
    self._device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if self._device.type == 'cpu' and hasattr(os, 'sched_getaffinity'):
      torch.set_num_threads(len(os.sched_getaffinity(0)))
    self._calls: dict[str, Any] = {}
    self._blocking: dict[str, bool] = {}

  def device(self) -> dict[str, Any]:
    torch = self._torch
    kind = torch.cuda.get_device_name() if self._device.type == 'cuda' else 'cpu'
    return {'platform': self._device.type, 'kind': kind, 'threads': torch.get_num_threads()}

  def prepare(self, key: str, computation: str, **details: Any) -> dict[str, Any]:
    """See `processes.Computations`; 'training_step' is not known.

    The details are `arguments` of the reference model, `batch_size`, `image_size`, `dtype` ('float32', or what
    `torch.autocast` computes in), and `compiled`: by `torch.compile`. Where that fails, the result is {'failed': why}.
    """
    arguments, size, dtype = details['arguments'], details['image_size'], details['dtype']
    batch_size, compiled = details['batch_size'], details['compiled']
    torch = self._torch
    from tests import torch_reference

    torch.manual_seed(0)
    model = torch_reference.create(arguments).to(self._device)
    model.train(computation == 'adamw_step')
    images = torch.randn(batch_size, 3, size, size, device=self._device)
    labels = torch.randint(arguments['num_classes'], (batch_size,), device=self._device)
    called = torch.compile(model) if compiled else model
    step = self._training if computation == 'adamw_step' else self._inference
    call = step(called, model, images, labels, dtype)
    times = []
    try:
      for _ in range(2):
        start = time.perf_counter()
        call()
        self._synchronise()
        times.append(time.perf_counter() - start)
    except Exception as error:  # whatever a compiler may run into
      if not compiled:
        raise
      return {'failed': f'{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}'}
    self._calls[key], self._blocking[key] = call, computation == 'latency'
    return {'first_s': times[0], 'warm_s': times[1], 'peak_growth': self._growth(call)}

  def _growth(self, call: Any) -> int | None:
    """Bytes that a call takes beside what is there anyway."""
    if self._device.type == 'cpu':
      return resident_growth(call)
    cuda = self._torch.cuda
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    call()
    return cuda.max_memory_allocated() - before

  def seconds(self, key: str, calls: int) -> float:
    """See `processes.Computations`; only single images are waited for one by one."""
    call, blocking = self._calls[key], self._blocking[key]
    start = time.perf_counter()
    for _ in range(calls):
      call()
      if blocking:
        self._synchronise()
    self._synchronise()
    return (time.perf_counter() - start) / calls

  def _synchronise(self) -> None:
    if self._device.type == 'cuda':
      self._torch.cuda.synchronize()

  def _autocast(self, dtype: str) -> Any:
    if dtype == 'float32':
      return contextlib.nullcontext()
    return self._torch.autocast(self._device.type, dtype=getattr(self._torch, dtype))

  def _inference(self, called: Any, model: Any, images: Any, labels: Any, dtype: str) -> Any:
    del model, labels

    def forward() -> Any:
      with self._torch.inference_mode(), self._autocast(dtype):
        return called(images)

    return forward

  def _training(self, called: Any, model: Any, images: Any, labels: Any, dtype: str) -> Any:
    torch = self._torch
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.05, fused=True)  # its fastest form

    def adamw_step() -> Any:
      optimizer.zero_grad(set_to_none=True)
      with self._autocast(dtype):
        loss = torch.nn.functional.cross_entropy(called(images), labels)
      loss.backward()
      optimizer.step()
      return loss

    return adamw_step
