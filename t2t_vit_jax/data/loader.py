"""Batches: a sample order that is a pure function of (seed, epoch), and its share for each process.

Nothing is carried from step to step: the seed and the step number alone decide which example stands where in a batch,
and what its augmentation draws. So a run that starts again at step s reads nothing of the steps before.
"""

import collections
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import dataclasses
import errno
import functools
import gc
import itertools
import math
import multiprocessing
from multiprocessing import resource_tracker
import os
import resource
import signal
import sys
import threading
from typing import Any, Self

from absl import flags
import numpy as np
from PIL import Image

from t2t_vit_jax.data import shared_memory
from t2t_vit_jax.data.decoding import BadImage, Remark
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.data.transforms import EvalTransform, TrainTransform, pixels_of
from t2t_vit_jax.errors import DataError, UserError, require, show_warnings_as_lines

# image: uint8 (H, W, C); label: int32, or (K,) if the source has K labels for an image; mask: float32, 0 for padding;
# index: int64, number of the record;
# bad: bool, whether that record could not be read; remarks: uint8, see `Remark`. `faults.Faults` takes out three:
# index, bad and remarks.
Example = dict[str, Any]
Batch = dict[str, np.ndarray]  # the same with a leading axis
UNREADABLE = -1  # the label of an evaluated image that cannot be read: no guess is right
MAX_BAD_IN_A_ROW = 100
# Images that a worker hands over at a time. One by one, each would cost the receiving process half a millisecond, and
# two open files until its batch is complete; whole batches would take much memory in each worker.
GROUP_SIZE = 16
FEW_IMAGES = 1000  # that threads read in the time that workers take to start; see docs/data.md


@dataclasses.dataclass(frozen=True)
class Share:
  """The part of each global batch that this process reads: one contiguous block."""

  batch_size: int  # images in all processes together
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self) -> None:
    if self.batch_size < 1 or self.batch_size % self.process_count:
      raise UserError(f'a batch of {self.batch_size} images cannot be divided among {self.process_count} processes')

  @property
  def local_batch_size(self) -> int:
    return self.batch_size // self.process_count

  def global_position(self, local_number: int) -> int:
    """Position in the sequence of all batches of the `local_number`-th example that this process reads."""
    step, offset = divmod(local_number, self.local_batch_size)
    return step * self.batch_size + self.process_index * self.local_batch_size + offset


@dataclasses.dataclass(frozen=True)
class TrainOrder:
  """Order of the training examples: a new permutation each epoch, without its incomplete last batch."""

  num_records: int
  batch_size: int
  seed: int

  def __post_init__(self) -> None:
    if self.num_records < self.batch_size:
      raise UserError(
        f'data.batch_size={self.batch_size} is more than the {self.num_records} training images: set a smaller one'
      )

  @property
  def steps_per_epoch(self) -> int:
    return self.num_records // self.batch_size

  def __call__(self, global_position: int) -> tuple[int, int]:
    """(epoch, record index) at a position in the sequence of all batches."""
    epoch, position = divmod(global_position, self.steps_per_epoch * self.batch_size)
    return epoch, int(_permutation(self.num_records, self.seed, epoch)[position])


@functools.lru_cache(maxsize=2)  # two epochs meet in a worker's buffer
def _permutation(num_records: int, seed: int, epoch: int) -> np.ndarray:
  # The generators of examples have a record's index as third number, which is smaller: none of them equals this one.
  return np.random.default_rng((seed, epoch, num_records)).permutation(num_records)


@dataclasses.dataclass(frozen=True)
class _TrainExample:
  """Maps an example's number in this process's sequence to the augmented example; pickles, for worker processes.

  A record that cannot be read is replaced by the next one that can.
  """

  source: Source
  order: TrainOrder
  share: Share
  transform: TrainTransform

  def __call__(self, number: int) -> Example:
    epoch, index = self.order(self.share.global_position(number))
    for tries in range(MAX_BAD_IN_A_ROW):
      rng = np.random.default_rng((self.order.seed, epoch, index))
      try:
        record = self.source[(index + tries) % len(self.source)]
        file = self.source.image_of(record)
        image = self.transform(file, rng)
      except BadImage:
        continue
      return _example(image, record.label, index, bad=tries > 0, remarks=Remark.NONE if tries else file.remarks)
    raise DataError(
      f'{MAX_BAD_IN_A_ROW} images in a row cannot be read in {self.source.description}; t2t-vit shrink names them'
    )


@dataclasses.dataclass(frozen=True)
class _EvalExample:
  """Maps an example's number in this process's sequence to the example, or to padding after the last record."""

  source: Source
  share: Share
  transform: EvalTransform

  def __call__(self, number: int) -> Example:
    index = self.share.global_position(number)
    if index >= len(self.source):
      return _example(self._black, self._labels(0), index, mask=0)
    try:
      record = self.source[index]
      file = self.source.image_of(record)
      return _example(self.transform(file.decode()), record.label, index, remarks=file.remarks)
    except BadImage:
      return _example(self._black, self._labels(UNREADABLE), index, bad=True)

  def _labels(self, label: int) -> int | tuple[int, ...]:
    return label if self.source.num_labels == 1 else (label,) * self.source.num_labels

  @functools.cached_property
  def _black(self) -> Image.Image:
    return self.transform(Image.new('RGB', (1, 1)))


def _example(
  image: Image.Image,
  label: int | tuple[int, ...],
  index: int,
  *,
  mask: int = 1,
  bad: bool = False,
  remarks: Remark = Remark.NONE,
) -> Example:
  return {
    'image': pixels_of(image),
    'label': np.array(label, np.int32),
    'mask': np.float32(mask),
    'index': np.int64(index),
    'bad': np.bool_(bad),
    'remarks': np.uint8(remarks),
  }


@dataclasses.dataclass(frozen=True)
class Workers:
  """Processes and threads that prepare the images of this process."""

  num_workers: int = 0  # processes; 0 for threads of this one
  num_threads: int = 1  # in each process

  def for_images(self, number: int) -> Self:
    """These workers, or as many threads of this process if there are so few images that starting takes longer."""
    if not self.num_workers or number > FEW_IMAGES:
      return self
    return dataclasses.replace(self, num_workers=0, num_threads=self.num_workers * max(1, self.num_threads))

  def shared_bytes(self, batch_size: int, image_bytes: int) -> int:
    """Bytes of shared memory for the images that workers have ready: of a batch and of some groups."""
    return (batch_size + 3 * self.num_workers * math.gcd(batch_size, GROUP_SIZE)) * image_bytes

  def batches(self, numbers: range, example: Callable[[int], Example], batch_size: int) -> Generator[Batch]:
    """Maps each number to an example and batches the results in order; ends its workers when closed."""
    group_size = math.gcd(batch_size, GROUP_SIZE)
    # Counted in groups: about four batches in all workers.
    ahead = max(4 * batch_size // (group_size * max(self.num_workers, 1)), self.num_threads)
    groups: Any = None
    batches: Any = None
    try:
      with _hiding_interrupts() if self.num_workers else contextlib.nullcontext():
        # Numbers are grouped before workers share them out, so groups don't depend on the number of workers.
        read = self._in_processes if self.num_workers else self._in_threads
        groups = read(numbers, example, group_size, ahead)
        batches = map(_concatenate, zip(*[groups] * (batch_size // group_size), strict=True))
        first = list(itertools.islice(batches, 1))  # all workers have started when it comes
      yield from first
      yield from batches
    except (RuntimeError, OSError) as error:
      _close(groups)
      shared_memory.free_what_the_dead_left()

      def num_bytes() -> int:
        return self.shared_bytes(batch_size, example(numbers.start)['image'].nbytes)

      if problem := self._problem(error, num_bytes):
        raise DataError(problem) from error
      raise
    finally:
      _close(groups)
      batches = None  # zip keeps the last groups that it has put together
      if self.num_workers and 'grain' in sys.modules:
        _free_shared_memory()

  def _in_processes(
    self, numbers: range, example: Callable[[int], Example], group_size: int, ahead: int
  ) -> Iterator[Batch]:
    """Groups of examples from worker processes, each of which has up to `ahead` of them ready."""
    require('data.num_workers', 'grain', advice=', or read images in threads: --config.data.num_workers=0')
    import grain  # late: threads need none of it

    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which a program without flags has not parsed
    owner = shared_memory.owner()
    if not _allow_open_files(64 + 16 * self.num_workers):  # measured: about 40, and 12 for each worker
      raise DataError(self._too_few_open_files())
    groups = grain.MapDataset.range(numbers.start, numbers.stop).map(example).batch(group_size)
    # Shared memory for the images, but not for labels and the like: each array there takes two open files.
    dataset = grain.experimental.WithOptionsIterDataset(
      groups.to_iter_dataset(grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=ahead)),
      grain.experimental.DatasetOptions(min_shm_size=1024 * group_size),
    )
    options = grain.MultiprocessingOptions(num_workers=self.num_workers)
    start = functools.partial(_start_worker, owner and owner.name)
    return iter(dataset.mp_prefetch(options, worker_init_fn=start))

  def _in_threads(
    self, numbers: range, example: Callable[[int], Example], group_size: int, ahead: int
  ) -> Generator[Batch]:
    """Groups of examples from threads, which have up to `ahead` of them ready; from the caller's if there are none."""

    def read(start: int) -> Batch:
      examples = [example(number) for number in range(start, start + group_size)]
      return {name: np.stack([x[name] for x in examples]) for name in examples[0]}

    starts = numbers[::group_size]
    if not self.num_threads:
      yield from map(read, starts)
      return
    pool, pending = ThreadPoolExecutor(self.num_threads), collections.deque[Future[Batch]]()
    try:
      for start in starts:
        pending.append(pool.submit(read, start))
        if len(pending) == ahead:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)

  def _problem(self, error: Exception, num_bytes: Callable[[], int]) -> str:
    """A line about a worker that died, or what its processes lack; empty for other errors.

    Args:
      error: of grain.
      num_bytes: computes those of the images that are in shared memory at a time; reads an image.
    """
    number = getattr(error, 'errno', None)
    died = 'terminated unexpectedly' in str(error)  # grain has no class of its own for this
    if number == errno.ENOSPC or (died and f'exit code {-signal.SIGBUS}.' in str(error)):
      return shared_memory.shortage(num_bytes())
    if number == errno.EMFILE:
      return self._too_few_open_files()
    if died:
      return (
        f'a data worker died ({str(error).split(".")[0]}); if it was killed for lack of memory, set a smaller '
        '--config.data.num_workers'
      )
    return ''

  def _too_few_open_files(self) -> str:
    return (
      f'{self.num_workers} data workers need more open files than this process may have: raise the limit, such as '
      '`ulimit -n 4096`, or set a smaller --config.data.num_workers'
    )


@contextlib.contextmanager
def _hiding_interrupts() -> Iterator[None]:
  """Blocks SIGINT in this thread and so, for good, in the processes that it starts.

  Ctrl-C in a terminal reaches these too while they import, and each would end with a traceback.
  """
  resource_tracker.ensure_running()  # which would unblock it when it starts, with the first process
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _close(groups: Any) -> None:
  with contextlib.suppress(AssertionError):  # grain waits for the end of workers that it could not start
    if groups is not None:
      groups.close()


def _allow_open_files(needed: int) -> bool:
  """Raises the limit of open files, which some systems set to 256, as far as this process may; says if it suffices."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft = wanted
  return soft == resource.RLIM_INFINITY or soft >= needed


def _free_shared_memory() -> None:
  """Frees what workers handed over last, which Python would otherwise report as leaked at exit."""
  import grain

  gc.collect()  # grain leaves the last groups in a reference cycle
  # grain frees memory in a background thread, which may not finish before exit. There is no public way to wait for it.
  if thread := getattr(grain.multiprocessing.SharedMemoryArray, '_del_thread_pool', None):
    thread.apply(int)


def _concatenate(groups: Sequence[Batch]) -> Batch:
  return {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}


def _start_worker(owner: str | None, worker_index: int, worker_count: int) -> None:
  """Prepares a worker process: it names its shared memory after the file `owner`, and ends with the main process."""
  del worker_index, worker_count
  # Signals to a group of processes, such as a terminal's Ctrl-C, are left to the main process: it needs its workers
  # until it has saved, and ends them itself.
  os.setpgid(0, 0)
  shared_memory.name_after(owner)
  show_warnings_as_lines()

  def end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
      parent.join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()


def train_batches(
  source: Source,
  transform: TrainTransform,
  order: TrainOrder,
  share: Share,
  workers: Workers,
  *,
  first_step: int,
  last_step: int,
) -> Generator[Batch]:
  """This process's part of the training batches of steps `first_step` ... `last_step` - 1."""
  numbers = range(first_step * share.local_batch_size, last_step * share.local_batch_size)
  return workers.batches(numbers, _TrainExample(source, order, share, transform), share.local_batch_size)


def eval_batches(source: Source, transform: EvalTransform, share: Share, workers: Workers) -> Generator[Batch]:
  """This process's part of all images, each exactly once: padding with `mask` 0 fills up the last batch."""
  num_batches = math.ceil(len(source) / share.batch_size)
  numbers = range(num_batches * share.local_batch_size)
  return workers.batches(numbers, _EvalExample(source, share, transform), share.local_batch_size)
