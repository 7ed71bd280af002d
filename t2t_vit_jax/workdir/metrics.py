"""Reports a run to its user: a live progress line, plain lines, `metrics.jsonl` and TensorBoard's event files."""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import errno
import json
import os
from pathlib import Path
import sys
import time
from typing import Any, Self

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from t2t_vit_jax.console import say, warn
from t2t_vit_jax.conversion.files import write_file
from t2t_vit_jax.data.loader import Batch
from t2t_vit_jax.errors import MissingExtraError, UserError, plural, readable_size, writing_problem
from t2t_vit_jax.recipe.evaluation import Accuracy
from t2t_vit_jax.workdir.folder import Workdir
from t2t_vit_jax.workdir.report_page import image_grid, read_rows, write_report
from t2t_vit_jax.workdir.trackers import Sender, close_trackers


class Reporter:
  """Progress of a training run, written by the first process only. Use as a context manager.

  Args:
    workdir: gets `metrics.jsonl`: one JSON object a line, with `step` and `kind` ('train' or an evaluated split).
    total_steps: steps of the whole run.
    first_step: steps done before; rows of later steps, from an interrupted run, are dropped.
    steps_per_epoch: to show epochs.
    batch_size: images a step.
    evaluated: whether the evaluation of `first_step` is done; if not, its rows are dropped.
    peak_images_per_second: images a second at the devices' peak, to show the share of it; None if it is not known.
    trackers: get all rows too.
  """

  def __init__(
    self,
    workdir: Workdir,
    *,
    total_steps: int,
    first_step: int,
    steps_per_epoch: int,
    batch_size: int,
    evaluated: bool = True,
    peak_images_per_second: float | None = None,
    trackers: Sequence[Sender] = (),
  ):
    self._silent = jax.process_index() != 0
    self._workdir = workdir
    self._file = workdir.logs / 'metrics.jsonl'
    self._total_steps = total_steps
    self._steps_per_epoch = steps_per_epoch
    self._batch_size = batch_size
    self._peak_images_per_second = peak_images_per_second
    self._trackers = trackers
    self._failed: set[str] = set()  # files that could not be written
    self._events: _Events | None = None
    if not self._silent:
      try:
        _drop_rows_after(self._file, first_step, evaluated=evaluated)
      except OSError as error:
        raise UserError(f'cannot write to workdir {workdir.root}: {writing_problem(error, self._file)}') from error
      with self._only_logging('tensorboard'):
        self._events = _Events(workdir.logs / 'tensorboard', first_step)
    self._bar = tqdm(
      total=total_steps,
      initial=first_step,
      unit='step',
      disable=self._silent or not sys.stderr.isatty(),
      dynamic_ncols=True,
      bar_format='{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]',
    )
    self._pending: list[dict[str, jax.Array]] = []
    self.waited = 0.0, 0.0  # share of the time and seconds that the run waited for images before the last report
    self.start_clock()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
    self._bar.close()
    close_trackers(self._trackers, completed=kind is None)
    if self._events:
      with self._only_logging('tensorboard'):
        self._events.close()

  @contextlib.contextmanager
  def _only_logging(self, name: str) -> Iterator[None]:
    """Goes on if a file that nothing depends on cannot be written, as on a full disk; warns of the first time."""
    try:
      yield
    except (OSError, UserError) as error:
      if name not in self._failed:
        self._failed.add(name)
        path = self._workdir.root / name
        reason = writing_problem(error.__cause__ or error, self._workdir.logs)
        warn(f'{path} could not be written ({reason}); the run goes on without')

  def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Passes `batches` on and measures the time that the caller waits for them."""
    iterator = iter(batches)
    while True:
      started = time.perf_counter()
      try:
        with jax.profiler.TraceAnnotation('wait for images'):
          batch = next(iterator)
      except StopIteration:
        return
      self._seconds_waited += time.perf_counter() - started
      yield batch

  def collect(self, metrics: dict[str, jax.Array]) -> None:
    """Takes a step's metrics without waiting for the device."""
    self._pending.append(metrics)
    self._steps_timed += 1

  def images(self, images: np.ndarray) -> None:
    """Writes images, (N, H, W, C) uint8, as one picture, and says where."""
    if not self._silent:
      name = 'augmented_images.png'
      with self._only_logging(name):
        picture = Image.fromarray(image_grid(images))
        write_file(self._workdir.logs / name, lambda temporary: picture.save(temporary, 'PNG'))
        say(f'{self._workdir.root / name} shows {len(images)} training images as the network sees them')

  def page(self, images: np.ndarray, title: str) -> None:
    """Writes `report.png`; without matplotlib says how to get it."""
    if self._silent:
      return
    with self._only_logging('report.png'):
      try:
        page = write_report(self._workdir.logs, images, title)
      except MissingExtraError as error:
        say(f'no report.png: {error}')
        return
      say(f'curves and sample images: {self._workdir.root / page.name}')

  def report(self, step: int, num_bad: int = 0) -> list[int]:
    """Averages the metrics that were collected since the last call, shows and writes them.

    `data_wait`, the share of the time that the run waited for images, and images per second are left out if no step was
    timed, as after the first, which compiles.

    Args:
      step: the number of steps done.
      num_bad: unreadable images so far.

    Returns:
      The numbers of the steps that were not applied.
    """
    if not self._pending:
      return []
    collected = jax.device_get(self._pending)
    seconds = time.perf_counter() - self._clock_started
    images_per_second = self._steps_timed * self._batch_size / seconds
    data_wait = self._seconds_waited / seconds
    self.waited = (data_wait, self._seconds_waited) if self._steps_timed else (0.0, 0.0)
    applied = [metrics for metrics in collected if metrics['applied']]
    row: dict[str, Any] = {
      name: float(np.mean([metrics[name] for metrics in applied])) if applied else None
      for name in ('loss', 'gradient_norm')
    }
    row['learning_rate'] = float(collected[-1]['learning_rate'])
    row['skipped_steps'] = len(collected) - len(applied)
    if self._steps_timed:
      row['images_per_second'] = round(images_per_second, 2)
      row['data_wait'] = round(data_wait, 4)
      if self._peak_images_per_second:
        row['mfu'] = round(images_per_second / self._peak_images_per_second, 4)
    row['bad_images'] = num_bad
    if memory := jax.local_devices()[0].memory_stats():  # a CPU has none
      row['device_memory_gb'] = round(memory['peak_bytes_in_use'] / 1e9, 3)
    epoch = step / self._steps_per_epoch
    self._write(step, 'train', epoch=round(epoch, 4), **row)

    loss = f'{row["loss"]:.4f}' if applied else 'not finite'
    summary = f'epoch {epoch:.1f} loss {loss} lr {row["learning_rate"]:.2e}'
    if self._steps_timed:
      summary += f' {images_per_second:,.0f} images/s data wait {data_wait:.0%}'
    if 'mfu' in row:
      summary += f' MFU {row["mfu"]:.0%}'
    if 'device_memory_gb' in row:
      summary += f' {readable_size(1e9 * row["device_memory_gb"])}'
    if self._bar.disable:
      if self._steps_timed:
        seconds_left = (self._total_steps - step) * self._batch_size / images_per_second
        summary += f' {tqdm.format_interval(seconds_left)} left'
      say(f'step {step}/{self._total_steps} {summary}')
    else:
      self._bar.set_postfix_str(summary, refresh=False)
      self._bar.update(step - self._bar.n)
    self._pending.clear()
    self.start_clock()
    return [step - len(collected) + 1 + i for i, metrics in enumerate(collected) if not metrics['applied']]

  def evaluation(self, step: int, split: str, accuracies: dict[str, Accuracy]) -> None:
    """Shows and writes the accuracy on a split of each set of weights ('raw', 'ema')."""
    for weights, accuracy in accuracies.items():
      say(f'step {step} {split} {weights}: {accuracy}')
      self._write(step, split, weights=weights, **accuracy.as_dict())

  def classes(self, accuracy: Accuracy, *, show: bool) -> None:
    """Writes the accuracy of each class to `per_class.csv`; with `show` also prints a short table and the path."""
    if self._silent:
      return
    file = self._workdir.logs / 'per_class.csv'
    with self._only_logging(file.name):
      write_file(file, lambda temporary: temporary.write_text(accuracy.class_csv(), 'utf-8'))
    if show:
      for line in accuracy.class_table():
        say(line)
      say(f'accuracy of each class: {self._workdir.root / file.name}')

  def publish(self) -> None:
    """Copies the written files to a workdir in a bucket."""
    self._workdir.publish()

  def start_clock(self) -> None:
    """Times steps from now on: call it after a compilation, an evaluation or a save, which should not count."""
    self._steps_timed = 0
    self._seconds_waited = 0.0
    self._clock_started = time.perf_counter()

  def _write(self, step: int, kind: str, **values: Any) -> None:
    if self._silent:
      return
    with self._only_logging(self._file.name):
      if not self._file.exists():
        self._file.touch()
        warn(f'{self._workdir.root / self._file.name} was deleted while the run wrote it: its earlier rows are lost')
      _append_line(self._file, json.dumps({'step': step, 'kind': kind, **values}))
    group = '/'.join(filter(None, (kind, values.get('weights'))))
    numbers = {f'{group}/{name}': x for name, x in values.items() if isinstance(x, int | float)}
    for tracker in self._trackers:
      tracker.write(step, numbers)
    if not self._events or 'tensorboard' in self._failed:
      return  # what follows half an event cannot be read
    with self._only_logging('tensorboard'):
      self._events.write(step, numbers)


class _Events:
  """TensorBoard's file of a run. TensorBoard leaves out what an earlier, interrupted run wrote after `first_step`.

  tensorboardX's own SummaryWriter writes in a thread: when that fails, the run would wait for it forever.
  """

  def __init__(self, folder: Path, first_step: int):
    self._writer = _events_writer(folder)
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    started = SessionLog(status=SessionLog.START)
    self._writer.write_event(Event(wall_time=time.time(), step=first_step + 1, session_log=started))

  def write(self, step: int, values: dict[str, float]) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def _events_writer(folder: Path) -> Any:
  # tensorboardX imports these where they are installed, which takes seconds: it gets no tensors and writes to the disk.
  hidden = {'torch', 'google.cloud.storage', 'boto3'} - sys.modules.keys()
  sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
  try:
    from tensorboardX.event_file_writer import EventsWriter
  finally:
    for name in hidden:
      del sys.modules[name]
  folder.mkdir(exist_ok=True)
  return EventsWriter(os.fspath(folder / 'events'), f'.{os.getpid()}')


def _append_line(file: Path, line: str) -> None:
  """Appends a line: the whole of it or nothing."""
  with file.open('ab', buffering=0) as stream:
    size = stream.tell()
    encoded = f'{line}\n'.encode()
    try:
      if stream.write(encoded) != len(encoded):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
      stream.truncate(size)
      raise


def _drop_rows_after(file: Path, step: int, *, evaluated: bool) -> None:
  """Drops the rows of what is about to be done again: of steps after `step`, and its evaluation unless `evaluated`."""
  file.touch()
  rows = read_rows(file)
  last = step if evaluated else step - 1  # the last step whose evaluation is kept
  kept = [line for line, row in rows if row and row['step'] <= (last if 'weights' in row else step)]
  text = ''.join(f'{line}\n' for line in kept)
  write_file(file, lambda temporary: temporary.write_text(text, 'utf-8', 'surrogateescape'))
  if broken := sum(row is None for _, row in rows):
    warn(f'{file}: dropped {plural(broken, "line")} without a row of metrics, such as the last one of a killed process')
