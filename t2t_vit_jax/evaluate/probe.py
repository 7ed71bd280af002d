"""Probes the features of weights: opens the images, computes features once and keeps them, and shows the results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
import dataclasses
from typing import Any

from jax.sharding import Mesh

from t2t_vit_jax.console import note, warn
from t2t_vit_jax.conversion import pretrained
from t2t_vit_jax.data.sources import Source
from t2t_vit_jax.errors import UserError, printable
from t2t_vit_jax.evaluate import tables
from t2t_vit_jax.evaluate.accuracy import Candidate, Options, Row, build, prepared, share_and_workers
from t2t_vit_jax.evaluate.features import Features, cached_features, extract
from t2t_vit_jax.evaluate.sets import ImageSet
from t2t_vit_jax.evaluate.tables import Table, percent
from t2t_vit_jax.processes import code_digest

COLUMNS = ('weights', 'set', 'method', 'features', 'top-1 %', '±', 'remark')
FIELDS = ('weights', 'set', 'method', 'features', 'accuracy', 'spread', 'note', 'train_images', 'test_images', 'sha256')
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]  # (title, images) -> what moves the bar


@dataclasses.dataclass(frozen=True)
class Prober:
  """Weights on the devices of a mesh, whose features are computed.

  Attributes:
    candidate: the weights.
    options: of the computation.
    mesh: the devices.
    bar: shows progress.
  """

  candidate: Candidate
  options: Options
  mesh: Mesh
  bar: Bar

  def __call__(self, train: Source, test: ImageSet) -> list[Row]:
    """Results of all methods on a dataset.

    Raises:
      UserError: the two have different classes, several labels for an image, or too few images.
    """
    from t2t_vit_jax.evaluate.classifiers import check_same_classes, probe  # late: nothing else needs scikit-learn

    check_same_classes(train, test.source)
    if train.fingerprint() == test.source.fingerprint():
      raise UserError(f'{test.name}: these are the training images themselves: name another split')
    if train.num_labels > 1 or test.source.num_labels > 1:
      raise UserError(f'{test.name} has several labels for an image: features are probed with a single one')
    upright = test.upright(self.candidate.weights.data)
    ours, theirs = (
      self.features(dataclasses.replace(source, upright=upright), title)
      for source, title in ((train, f'{test.name}, training images'), (test.source, test.name))
    )
    facts = {
      'weights': self.candidate.name,
      'sha256': self.candidate.sha256,
      'model': self.candidate.weights.model,
      'set': test.name,
      'version': test.version,
      'train_images': len(ours.label),
      'test_images': len(theirs.label),
    }
    rows = probe(ours, theirs, train.class_names, allow_missing_classes=self.options.allow_missing_classes, note=note)
    return [{**facts, **row._asdict()} for row in rows]

  def features(self, source: Source, title: str) -> Features:
    """Features of a split, computed or from the cache folder."""
    weights, fingerprint = self.candidate.weights, source.fingerprint()
    key = {
      'weights': self.candidate.sha256,
      'images': fingerprint,
      'image_size': weights.arguments['image_size'],
      'preparation': [weights.data['crop_fraction'], weights.data['interpolation'], source.upright],
      'dtype': self.options.dtype,
      'code': code_digest(),
    }

    def compute() -> Features:
      model, variables, normalization = build(self.candidate, self.options)
      share, workers = share_and_workers(self.options, model.image_size, self.mesh.size, source)
      transform = prepared(self.candidate, weights.data['crop_fraction'])
      with self.bar(f'{self.candidate.name} {title}', len(source)) as progress:
        return extract(model, variables, transform, normalization, source, share, workers, self.mesh, warn, progress)

    file = pretrained.cache_folder() / 'features' / f'{self.candidate.sha256[:12]}-{fingerprint}.npz'
    return cached_features(file, key, compute, len(source), note, warn)


def render(rows: Sequence[Row], form: str) -> str:
  """The rows in one of the forms of `tables.render`."""
  cells = [
    (
      printable(row['weights']),
      printable(row['set']),
      row['method'],
      row['features'],
      percent(row['accuracy']),
      percent(row['spread']),
      row['note'],
    )
    for row in rows
  ]
  return tables.render(form, rows, [Table(COLUMNS, cells, ('top-1 %', '±'))], list(_notes(rows)), FIELDS)


def _notes(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
  """A line for each dataset."""
  yield from dict.fromkeys(
    f'{printable(row["set"])} ({printable(row["version"])}): {row["train_images"]:,} training images, '
    f'{row["test_images"]:,} that are classified'
    for row in rows
  )
