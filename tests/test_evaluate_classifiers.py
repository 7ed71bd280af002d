"""Classifiers of features, against plain loops and what is known of the data."""

import json
import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import Normalizer

from t2t_vit_jax.data.sources import open_folder
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.evaluate import classifiers
from t2t_vit_jax.evaluate.features import Features
from tests.image_folder import write_image_folder

CLASSES = ('ant', 'bee', 'cat')


def gaussians(count, classes, distance, seed, width=8):
  """Features of clouds around `classes` points, `count` of each; `cls` has the distance, `mean` is noise."""
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(classes, dtype=np.int32), count)
  noise, other = rng.normal(size=(2, len(labels), width)).astype(np.float32)
  centers = distance * np.eye(classes, width, dtype=np.float32)
  return Features(centers[labels] + noise, other, labels)


def votes_one_by_one(train, test, k):
  """Accuracy of weighted nearest neighbours, by plain loops."""
  correct = 0
  for x, label in zip(test.cls.astype(float), test.label, strict=True):
    similarities = [
      (float(x @ y / math.sqrt(x @ x) / math.sqrt(y @ y)), int(own))
      for y, own in zip(train.cls.astype(float), train.label, strict=True)
    ]
    votes = {}
    for similarity, own in sorted(similarities, reverse=True)[:k]:
      votes[own] = votes.get(own, 0) + math.exp(similarity / 0.07)
    correct += max(votes, key=votes.get) == label
  return correct / len(test.label)


@pytest.mark.parametrize('seed', range(3))
def test_neighbours_vote_as_in_a_plain_loop(seed):
  train, test = gaussians(20, 4, 2, seed), gaussians(30, 4, 2, seed + 10)
  rows = classifiers.knn(train, test, 'cls', (1, 5, 10, 20))
  assert [row.method for row in rows] == ['1-NN', '5-NN', '10-NN', '20-NN']
  accuracies = [votes_one_by_one(train, test, k) for k in (1, 5, 10, 20)]
  assert len(set(accuracies)) > 1
  assert [row.accuracy for row in rows] == pytest.approx(accuracies)


@pytest.mark.parametrize(
  ('near', 'far', 'winner'),
  [(1.0, 0.9, 0), (0.99, 0.97, 1)],  # exp(0.1 / 0.07) = 4.2 is more than two votes, exp(0.02 / 0.07) = 1.3 is less
)
def test_near_neighbours_weigh_more(near, far, winner):
  angles = np.arccos([near, far, far])
  train = Features(5 * np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32), None, np.array([0, 1, 1]))
  test = Features(np.array([[0.1, 0]], np.float32), None, np.array([winner]))
  (row,) = classifiers.knn(train, test, 'cls', (3,))
  assert row.accuracy == 1


def test_fewer_images_than_neighbours():
  train, test = gaussians(3, 4, 9, 0), gaussians(5, 4, 9, 1)
  ten, twenty = classifiers.knn(train, test, 'cls')
  assert (ten.note, twenty.note) == ('', 'there are only 12 training images: all vote')
  assert twenty.accuracy == votes_one_by_one(train, test, 12)


def test_a_linear_probe_finds_what_is_there_and_no_more():
  train, test = gaussians(60, 4, 12, 0), gaussians(100, 4, 12, 1)
  row = classifiers.linear_probe(train, test, 'cls')
  assert (row.method, row.features, row.accuracy, row.spread) == ('linear', 'class token', 1, None)
  assert row.note == 'C = 10, chosen on a held-out fifth of the training images'  # the clouds do not touch
  noise = classifiers.linear_probe(train, test, 'mean')
  assert abs(noise.accuracy - 0.25) < 0.09  # four standard deviations of 400 guesses
  assert noise.note.startswith('C = 0.001, ')
  assert noise.features == 'mean of tokens'


def test_features_of_any_scale_are_standardised():
  train, test = gaussians(60, 4, 3, 0), gaussians(100, 4, 3, 1)
  scales, offset = np.float32([1e-3, 1, 1e3, 1, 1, 1e-3, 1, 1e3]), np.float32(7)
  scaled = [x._replace(cls=x.cls * scales + offset) for x in (train, test)]
  assert classifiers.linear_probe(*scaled, 'cls').accuracy == pytest.approx(
    classifiers.linear_probe(train, test, 'cls').accuracy, abs=0.01
  )


def test_fits_to_many_classes_end_at_the_minimum():
  train = gaussians(2, 50, 1, 0, width=50)
  classifier, problem = classifiers._fit(Normalizer(), train.cls, train.label, 10.0)
  unit = train.cls.astype(float) / np.linalg.norm(train.cls.astype(float), axis=1, keepdims=True)
  exact = LogisticRegression(C=10, solver='newton-cg', tol=1e-8).fit(unit, train.label)
  assert problem == ''
  error = np.linalg.norm(classifier[-1].coef_ - exact.coef_) / np.linalg.norm(exact.coef_)
  assert error < 0.001


def test_a_fit_that_does_not_converge_is_said(monkeypatch):
  train, test = gaussians(10, 3, 2, 0), gaussians(10, 3, 2, 1)
  assert 'converge' not in classifiers.linear_probe(train, test, 'cls').note
  monkeypatch.setattr(classifiers, 'MAX_ITERATIONS', 1)
  assert classifiers.linear_probe(train, test, 'cls').note.endswith('; a fit did not converge')
  assert [row.note for row in classifiers.few_shot(train, test, 'cls', (1, 5))] == ['a fit did not converge'] * 2


def test_classes_too_small_to_hold_images_out():
  train, test = gaussians(4, 3, 12, 0), gaussians(10, 3, 12, 1)
  row = classifiers.linear_probe(train, test, 'cls')
  assert row.accuracy == 1
  assert row.note == 'C = 1, no class has five images, of which one could be held out to choose it'


LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5, dtype=np.int32), [3, 4, 5, 14, 30]))


def test_a_fifth_of_each_class_is_held_out():
  held_out = classifiers.hold_out(LABELS, 0)
  assert np.bincount(LABELS[held_out], minlength=5).tolist() == [0, 0, 1, 2, 6]
  assert np.array_equal(held_out, classifiers.hold_out(LABELS, 0))
  assert not np.array_equal(held_out, classifiers.hold_out(LABELS, 1))


def test_draws_have_as_many_images_of_each_class_as_asked_for():
  for count, sizes in ((1, [1] * 5), (5, [3, 4, 5, 5, 5]), (20, [3, 4, 5, 14, 20])):
    drawn = classifiers.draw(LABELS, count, 3)
    assert len(set(drawn.tolist())) == len(drawn)
    assert np.bincount(LABELS[drawn]).tolist() == sizes
    assert np.array_equal(drawn, classifiers.draw(LABELS, count, 3))
    assert not np.array_equal(drawn, classifiers.draw(LABELS, count, 4))
  assert set(classifiers.draw(LABELS, 1, 3)) < set(classifiers.draw(LABELS, 5, 3))
  # Each image of a class is drawn about equally often: of 30, in 600 draws of 3, each 60 times.
  times = sum(np.bincount(classifiers.draw(LABELS, 3, seed), minlength=len(LABELS)) for seed in range(600))
  assert abs(times[LABELS == 4] - 60).max() < 35


def test_few_images_of_each_class():
  train, test = gaussians(8, 4, 4, 0), gaussians(50, 4, 4, 1)
  rows = classifiers.few_shot(train, test, 'cls', (1, 5, 8, 10), seeds=3)
  assert [row.method for row in rows] == ['1-shot', '5-shot', '8-shot', '10-shot']
  unit = [x.cls / np.linalg.norm(x.cls, axis=1, keepdims=True) for x in (train, test)]
  for row, count in zip(rows[:2], (1, 5), strict=True):
    accuracies = []
    for seed in range(3):
      drawn = classifiers.draw(train.label, count, seed)
      fitted = LogisticRegression(C=10, max_iter=500).fit(unit[0][drawn], train.label[drawn])
      accuracies.append(np.mean(fitted.predict(unit[1]) == test.label))
    mean = sum(accuracies) / 3
    assert row.accuracy == pytest.approx(mean)
    assert row.spread == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in accuracies) / 2))
    assert row.note == ''
  assert rows[0].spread > 0
  # All eight images are drawn each time.
  assert rows[2].spread == rows[3].spread == 0
  assert rows[2].accuracy == rows[3].accuracy > rows[0].accuracy
  assert (rows[2].note, rows[3].note) == ('', '4 of 4 classes have fewer images: all of theirs are used')
  assert classifiers.few_shot(train, test, 'cls', (1,), seeds=1)[0].spread is None


def test_all_methods_in_a_table():
  train, test, lines = gaussians(20, 3, 12, 0), gaussians(10, 3, 12, 1), []
  rows = classifiers.probe(train, test, CLASSES, seeds=2, note=lines.append)
  methods = ['10-NN', '20-NN', 'linear', '1-shot', '5-shot', '10-shot']
  assert [row.method for row in rows] == methods * 2
  assert [row.features for row in rows] == ['class token'] * 6 + ['mean of tokens'] * 6
  assert [row.accuracy for row in rows[:3]] == [1, 1, 1]
  assert max(row.accuracy for row in rows[6:]) < 0.7  # noise
  assert [row.spread is None for row in rows] == [True, True, True, False, False, False] * 2
  stored = json.loads(json.dumps([row._asdict() for row in rows]))
  assert [classifiers.Row(**row) for row in stored] == rows
  assert lines[:2] == ['knn on the class token', 'linear on the class token']
  assert classifiers.probe(train, test, CLASSES, methods=['knn']) == [*rows[:2], *rows[6:8]]


def test_classes_that_cannot_be_told_apart_get_one_line():
  train, test = gaussians(5, 3, 12, 0), gaussians(5, 3, 12, 1)
  first = [x[train.label == 0] for x in train]
  with pytest.raises(UserError, match='the training images are of 1 class, but to tell'):
    classifiers.probe(Features(*first), test, CLASSES)
  some = Features(*(x[train.label != 1] for x in train))
  with pytest.raises(UserError, match=r'^of 1 class of the test images, no training image can be read: bee$'):
    classifiers.probe(some, test, CLASSES)
  with pytest.raises(
    UserError, match=r'^of 1 class of the training images, no test image can be read: bee; --allow_mis'
  ):
    classifiers.probe(train, some, CLASSES)
  assert len(classifiers.probe(train, some, CLASSES, methods=['knn'], allow_missing_classes=True)) == 4
  with pytest.raises(UserError, match="method must be 'knn' or 'linear' or 'few_shot', not 'kmeans'"):
    classifiers.probe(train, test, CLASSES, methods=['kmeans'])


def test_both_splits_must_have_the_same_classes(tmp_path):
  folder = write_image_folder(tmp_path / 'own', CLASSES, train=1, val=1)
  train, test = open_folder(folder, 'train'), open_folder(folder, 'val')
  classifiers.check_same_classes(train, test)
  other = open_folder(write_image_folder(tmp_path / 'other', ('ant', 'bee', 'dog'), val=1), 'val')
  with pytest.raises(UserError, match='do not have the same classes, such as cat, dog: give two splits'):
    classifiers.check_same_classes(train, other)
  with pytest.raises(UserError, match='have the same classes in another order'):
    classifiers.check_same_classes(train, test.with_classes(CLASSES[::-1]))
