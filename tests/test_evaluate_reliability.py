"""Calibration, coverage and confused classes: by hand, by scikit-learn, and as the mean over all orders of ties."""

import itertools
import json

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from t2t_vit_jax.evaluate.reliability import summary
from t2t_vit_jax.recipe.evaluation import Guesses


def guesses_of(index, label, guess, right, confidence):
  """Guesses about images of which all count; the five likeliest classes and the loss are of no matter here."""
  return Guesses(index, label, guess, right, right, confidence, np.zeros_like(confidence), left_out=0)


def guesses(*rows):
  """Guesses from rows of number, label, guess, right and confidence."""
  columns = zip(*rows, strict=True) if rows else [()] * 5
  types = (np.int64, np.int32, np.int32, bool, np.float32)
  return guesses_of(*(np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)))


def with_confidence(confidence, right):
  """Guesses of class 0 for images of class 0, or of class 1 where they are wrong."""
  return guesses(*((i, 0, int(not r), r, c) for i, (c, r) in enumerate(zip(confidence, right, strict=True))))


def random_guesses(count, num_classes, *, levels=None, seed=0):
  """Guesses, some of several labels and some of unreadable images, with `levels` confidences if that is set."""
  rng = np.random.default_rng(seed)
  confidence = rng.uniform(0.05, 1, count)
  if levels:
    confidence = np.ceil(confidence * levels) / levels
  label = rng.integers(0, num_classes, count)
  right = rng.uniform(size=count) < confidence
  guess = np.where(right, label, (label + rng.geometric(0.5, count)) % num_classes)
  label[rng.uniform(size=count) < 0.1] = -2
  label[rng.uniform(size=count) < 0.1] = -1
  right &= label != -1
  right |= (label >= 0) & (label == guess)
  return guesses_of(
    np.sort(rng.choice(10 * count, count, replace=False)),
    label.astype(np.int32),
    guess.astype(np.int32),
    right,
    confidence.astype(np.float32),
  )


def test_by_hand():
  found = summary(
    guesses(
      (10, 3, 3, True, 0.5),
      (11, 3, 4, False, 0.75),
      (12, -1, 0, False, 0.0625),  # unreadable
      (13, -2, 5, True, 0.5),  # any of several labels
      (14, 4, 3, False, 0.25),
    )
  )
  assert (found['images'], found['unreadable']) == (5, 1)
  assert (found['accuracy'], found['confidence']) == (0.5, 0.5)
  # Bins of 1/15: 0.25 is in the 4th, 0.5 in the 8th, 0.75 in the 12th. (2 * 0.5 + 0.75 + 0.25) / 4 = 0.5
  assert found['calibration_error'] == 0.5
  counts = [row['count'] for row in found['bins']]
  assert counts == [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]
  eighth = found['bins'][7]
  assert (eighth['confidence'], eighth['accuracy'], eighth['count']) == (0.5, 1, 2)
  assert (eighth['lower'], eighth['upper']) == pytest.approx((7 / 15, 8 / 15))
  assert found['bins'][0]['accuracy'] is found['bins'][0]['confidence'] is None
  # 0, 1, 2 and 2 of the 1, 2, 3 and 4 most confident ones are right.
  assert found['risk_coverage_area'] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
  curve = {row['share']: (row['kept'], row['least_confidence'], row['accuracy']) for row in found['coverage']}
  assert list(curve) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
  assert curve[0.01] == curve[0.2] == (1, 0.75, 0)
  assert curve[0.3] == curve[0.5] == (2, 0.5, 0.5)
  assert curve[0.7] == (3, 0.5, pytest.approx(2 / 3))
  assert curve[0.8] == curve[1] == (4, 0.25, 0.5)
  assert found['confused'] == [
    {'label': 3, 'guess': 4, 'count': 1, 'of': 2, 'examples': [11]},
    {'label': 4, 'guess': 3, 'count': 1, 'of': 1, 'examples': [14]},
  ]


def test_calibration_is_that_of_scikit_learn():
  given = random_guesses(3000, 10)
  read = given.label != -1
  right, confidence = given.right[read], given.confidence[read]
  found = summary(given)
  accuracies, means = calibration_curve(right, confidence, n_bins=15, strategy='uniform')
  full = [row for row in found['bins'] if row['count']]
  np.testing.assert_allclose([row['accuracy'] for row in full], accuracies, rtol=1e-12)
  np.testing.assert_allclose([row['confidence'] for row in full], means, rtol=1e-6)
  counts = np.histogram(confidence, 15, (0, 1))[0]
  assert [row['count'] for row in found['bins']] == counts.tolist()
  error = np.sum(counts[counts > 0] * np.abs(accuracies - means)) / len(right)
  assert found['calibration_error'] == pytest.approx(error, rel=1e-6)
  assert error > 0.005
  assert found['unreadable'] == (~read).sum() > 200
  assert found['accuracy'] == pytest.approx(np.mean(right))


def test_a_confidence_on_a_bound_is_in_the_lower_bin():
  bounds = (np.arange(1, 16) / 15).astype(np.float32)
  on_bounds = summary(with_confidence(bounds, [True] * 15))
  assert [row['count'] for row in on_bounds['bins']] == [1] * 15
  above = summary(with_confidence(np.nextafter(bounds[:-1], np.float32(1)), [True] * 14))
  assert [row['count'] for row in above['bins']] == [0] + [1] * 14
  certain = summary(with_confidence([1.0, 1.0, 0.0], [True, True, False]))
  assert [row['count'] for row in certain['bins']] == [1, *[0] * 13, 2]
  assert certain['calibration_error'] == 0


@pytest.mark.parametrize('right', [(1, 0, 0, 1, 0, 1), (0, 1, 1, 1, 0, 0)])
@pytest.mark.parametrize('confidence', [(0.5,) * 6, (0.9, 0.5, 0.5, 0.5, 0.5, 0.1), (0.9, 0.9, 0.5, 0.5, 0.5, 0.2)])
def test_ties_count_as_in_the_mean_over_their_orders(confidence, right):
  orders = [order for order in itertools.permutations(range(6)) if all(np.diff([confidence[i] for i in order]) <= 0)]
  assert len(orders) >= 12
  mean = np.mean([np.cumsum([right[i] for i in order]) / np.arange(1, 7) for order in orders], axis=0)
  found = summary(with_confidence(confidence, [bool(x) for x in right]))
  for row in found['coverage']:
    assert row['accuracy'] == pytest.approx(mean[row['kept'] - 1]), row
  assert {row['kept'] for row in found['coverage']} == {1, 2, 3, 4, 5, 6}
  assert found['risk_coverage_area'] == pytest.approx(np.mean(1 - mean))


def test_coverage_without_ties_is_a_sorted_mean():
  given = random_guesses(997, 5)
  read = given.label != -1
  right = given.right[read][np.argsort(-given.confidence[read])]
  found = summary(given)
  for row in found['coverage']:
    kept = int(np.ceil(round(row['share'] * len(right), 6)))
    assert (row['kept'], row['accuracy']) == (kept, pytest.approx(right[:kept].mean()))
    assert (given.confidence[read] >= np.float32(row['least_confidence'])).sum() == kept
  assert found['coverage'][0]['accuracy'] > 0.9 > 0.6 > found['coverage'][-1]['accuracy']


@pytest.mark.parametrize('levels', [None, 3])
def test_the_order_of_the_images_does_not_matter(levels):
  given = random_guesses(500, 4, levels=levels)
  order = np.random.default_rng(1).permutation(500)
  assert summary(given.take(order)) == summary(given)


def test_no_image_and_none_that_could_be_read():
  nothing = summary(guesses())
  assert (nothing['images'], nothing['coverage'], nothing['confused']) == (0, [], [])
  figures = ('accuracy', 'confidence', 'calibration_error', 'risk_coverage_area')
  assert [nothing[name] for name in figures] == [None] * 4
  unreadable = summary(guesses((0, -1, 3, False, float('nan')), (1, -1, 0, False, 0.5)))
  assert unreadable == nothing | {'images': 2, 'unreadable': 2}


@pytest.mark.parametrize(('right', 'accuracy'), [(True, 1), (False, 0)])
@pytest.mark.parametrize('count', [1, 7])
def test_all_right_and_all_wrong(count, right, accuracy):
  found = summary(with_confidence([0.75] * count, [right] * count))
  assert found['accuracy'] == accuracy
  assert found['calibration_error'] == (0.25 if right else 0.75)
  assert found['risk_coverage_area'] == 1 - accuracy
  assert {row['accuracy'] for row in found['coverage']} == {accuracy}
  assert found['coverage'][-1]['kept'] == count
  pair = {'label': 0, 'guess': 1, 'count': count, 'of': count, 'examples': list(range(count))[:4]}
  assert found['confused'] == ([] if right else [pair])


def test_confused_pairs_and_their_examples():
  rows = [(i, 7, 2, False, c) for i, c in [(5, 0.5), (6, 0.9), (7, 0.5), (8, 0.6), (9, 0.95)]]
  rows += [(i, 1, guess, False, 0.3) for i, guess in [(20, 9), (21, 4), (22, 9), (23, 4)]]
  rows += [(30, 1, 1, True, 0.3), (31, -2, 4, False, 0.9), (32, -1, 4, False, 0.9), (33, 0, 4, False, 0.1)]
  rows += [(34, 2, 2, True, 0.9)]
  assert summary(guesses(*rows))['confused'] == [
    {'label': 7, 'guess': 2, 'count': 5, 'of': 5, 'examples': [9, 6, 8, 5]},
    {'label': 1, 'guess': 4, 'count': 2, 'of': 5, 'examples': [21, 23]},
    {'label': 1, 'guess': 9, 'count': 2, 'of': 5, 'examples': [20, 22]},
    {'label': 0, 'guess': 4, 'count': 1, 'of': 1, 'examples': [33]},
  ]


def test_a_guess_that_counts_as_right_is_not_confused():
  assert summary(guesses((0, 3, 8, True, 0.5)))['confused'] == []


def test_a_summary_of_imagenet_is_small_and_survives_json():
  given = random_guesses(50_000, 1000, levels=200)
  found = summary(given)
  text = json.dumps(found, allow_nan=False)
  assert json.loads(text) == found
  assert len(text) < 10_000
  assert len(found['confused']) == 20
  wrong = ~given.right & (given.label >= 0)
  pairs, counts = np.unique(np.stack([given.label, given.guess])[:, wrong], axis=1, return_counts=True)
  assert [row['count'] for row in found['confused']] == sorted(counts.tolist(), reverse=True)[:20]
  for row in found['confused']:
    assert row['count'] == counts[(pairs[0] == row['label']) & (pairs[1] == row['guess'])].item()
    assert row['of'] == (given.label == row['label']).sum()
    places = np.searchsorted(given.index, row['examples'])
    assert (given.label[places] == row['label']).all()
    assert (given.guess[places] == row['guess']).all()


@pytest.mark.parametrize('confidence', [float('nan'), float('inf'), -0.1, 1.1])
def test_what_is_no_probability_is_refused(confidence):
  with pytest.raises(ValueError, match='no number from 0 to 1'):
    summary(with_confidence([0.5, confidence], [True, True]))


def test_a_probability_may_be_rounded_above_1():
  found = summary(with_confidence([np.nextafter(np.float32(1), np.float32(2))], [True]))
  assert found['bins'][-1]['count'] == 1
