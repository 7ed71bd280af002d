"""What the pictures show, against the model's own numbers, and that their parts do not overlap."""

import itertools

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax import load_pretrained
from t2t_vit_jax.conversion import Options, convert
from t2t_vit_jax.data.transforms import ResizeCenterCrop
from t2t_vit_jax.models.layer_outputs import layer_outputs
from t2t_vit_jax.models.variants import create_model
from t2t_vit_jax.predict import open_classifier, predict
from t2t_vit_jax.visualize import (
  MEAN,
  Inside,
  attention_blocks,
  draw,
  look_inside,
  main,
  prepare_whole,
  principal_colors,
  stage_layers,
)
from tests import golden
from tests.image_folder import picture


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """The golden performer, 64 px, two blocks with four heads."""
  return golden.converted('performer', tmp_path_factory.mktemp('weights'))


@pytest.fixture(scope='module')
def photo(tmp_path_factory):
  """A picture that is wider than it is high."""
  path = tmp_path_factory.mktemp('photo') / 'photo $x$.png'
  picture(np.random.default_rng(0)).resize((150, 100)).save(path)
  return path


def test_it_shows_what_predict_predicts_and_the_layers_compute(weights, photo):
  classifier = open_classifier(weights)
  inside = look_inside(classifier, classifier.prepare(Image.open(photo)))
  (prediction,) = predict(classifier, [str(photo)], top=1)
  assert inside.guess[0] == prediction.guesses[0].name
  assert inside.guess[1] == pytest.approx(prediction.guesses[0].probability, abs=1e-6)

  model, variables = load_pretrained(weights)
  crop = np.asarray(ResizeCenterCrop(64, 0.9)(Image.open(photo)))
  np.testing.assert_array_equal(inside.image, crop)
  stages = ['tokens_to_token/attention1', 'tokens_to_token/attention2', 'tokens_to_token']
  blocks = ['blocks_0', 'blocks_1']
  images = classifier.normalize(crop[None])
  _, found = layer_outputs(model, variables, images, [*stages, *(f'{block}/attn/attention' for block in blocks)])
  for stage, features in zip(stages, inside.stages.values(), strict=True):
    np.testing.assert_allclose(features, found[stage][0], atol=1e-5)
  assert list(inside.attention) == blocks
  for block in blocks:
    shares, rows = inside.attention[block], found[f'{block}/attn/attention'][0, :, 0]
    np.testing.assert_allclose(shares.sum(axis=(1, 2)) + rows[:, 0], 1, atol=1e-5)  # the rest is the class token's own
    np.testing.assert_allclose(shares[3, 2, 1], rows[3, 1 + 2 * 4 + 1], atol=1e-6)  # row 2, column 1 of a 4 x 4 grid


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'overrides', 'blocks'),
  [
    ('t2t_vit_dense', {}, [n for n in range(22) if n not in (3, 10, 17)]),  # stages of 3, 6, 6 and 4 blocks
    ('t2t_vit_14', {'tokens_type': 'convolution', 'scan_blocks': True}, range(14)),
    ('t2t_vit_t_14', {'depth': 11}, range(11)),
  ],
)
def test_stages_and_blocks_of_every_kind_of_model(name, overrides, blocks):
  model = create_model(name, **overrides)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  variables = golden.shapes_of(model, images)
  assert attention_blocks(model, variables, images) == [f'blocks_{number}' for number in blocks]
  layers = stage_layers(model).values()
  outputs = jax.eval_shape(lambda *arguments: layer_outputs(model, *arguments, list(layers))[1], variables, images)
  assert [outputs[layer].shape[1:3] for layer in layers] == [(16, 16), (8, 8), (4, 4)]


@pytest.mark.parametrize(('size', 'prepared'), [((150, 100), (96, 64)), ((100, 149), (64, 96)), ((64, 640), (64, 640))])
def test_the_whole_image_keeps_its_proportions_to_a_token(weights, size, prepared):
  assert prepare_whole(open_classifier(weights), Image.new('RGB', size)).size == prepared


def test_principal_components_become_colours_in_their_order():
  rows, columns = np.mgrid[:20, :30]
  directions = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 2)))[0].T
  features = columns[..., None] * directions[0] + 0.3 * rows[..., None] * directions[1] + 5
  colors = principal_colors(features)
  assert colors.shape == (20, 30, 3)
  assert (colors.min(), colors.max()) == (0, 1)
  for color, axis in ((colors[..., 0], 1), (colors[..., 1], 0)):  # the wider spread of the two is red
    np.testing.assert_allclose(
      color, color.take([0], axis=1 - axis).repeat(color.shape[1 - axis], axis=1 - axis), atol=1e-6
    )
    steps = np.diff(color, axis=axis)
    assert (steps >= -1e-6).all() or (steps <= 1e-6).all()
  np.testing.assert_allclose(principal_colors(10 * features - 3), colors, atol=1e-6)
  assert principal_colors(np.ones((1, 1, 8))).shape == (1, 1, 3)


@pytest.mark.parametrize(
  ('shape', 'blocks', 'heads'), [((64, 64), 3, 8), ((64, 256), 12, 1), ((256, 64), 2, 5), ((16, 16), 1, 1)]
)
def test_nothing_overlaps_or_leaves_the_page(shape, blocks, heads):
  rng = np.random.default_rng(0)
  grid = shape[0] // 16, shape[1] // 16
  inside = Inside(
    image=rng.integers(0, 256, (*shape, 3), dtype=np.uint8),
    stages={
      'stage 1': rng.normal(size=(*grid, 8)),
      'stage 2': rng.normal(size=(*grid, 8)),
      'tokens': np.ones((*grid, 8)),
    },
    attention={f'blocks_{10 + number}': rng.uniform(size=(heads, *grid)) / 500 for number in range(blocks)},
    guess=('', 0),
  )
  title = f'{"W" * 39}…\n100.00 % {"W" * 39}…'
  figure = draw(inside, title, list(inside.attention), [MEAN, *range(heads)])
  renderer = FigureCanvasAgg(figure).get_renderer()
  figure.draw(renderer)
  axes = [each.get_window_extent(renderer) for each in figure.axes]
  texts = [text for each in figure.axes for text in each.get_yticklabels()] + figure.texts
  boxes = axes + [text.get_window_extent(renderer) for text in texts if text.get_text()]
  assert len(axes) == 4 + blocks * (heads + 2)
  for first, second in itertools.combinations(boxes, 2):
    assert not first.overlaps(second), (first, second)
  page = figure.bbox
  for box in boxes:
    assert page.x0 <= box.x0 <= box.x1 <= page.x1
    assert page.y0 <= box.y0 <= box.y1 <= page.y1


def run(*arguments, capsys):
  """Exit code, standard output and standard error of the command."""
  code = main([str(argument) for argument in arguments])
  return code, *capsys.readouterr()


def test_the_command_writes_what_the_ending_says(weights, photo, tmp_path, capsys):
  code, printed, errors = run(weights, photo, '--output', tmp_path / 'a.png', capsys=capsys)
  assert (code, errors) == (0, '')
  assert printed.startswith(f'wrote {tmp_path / "a.png"}: ')
  assert printed.endswith('; blocks: 2, attention maps of each: 5\n')
  with Image.open(tmp_path / 'a.png') as image:
    assert image.format == 'PNG'
    everything = image.size
  options = ['--whole', '--blocks=1', '--heads=mean,3']
  assert run(weights, photo, '--output', tmp_path / 'b.jpg', *options, capsys=capsys)[0] == 0
  with Image.open(tmp_path / 'b.jpg') as image:
    assert image.format == 'JPEG'
    assert image.height < everything[1]
  assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'b.jpg']


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['{weights}', '{photo}'], '--output'),
    (['{weights}', '--output={folder}/out.png'], 'IMAGE'),
    (['{weights}', '{photo}', '--output={folder}/out'], 'the ending must say the format, one of '),
    (['{weights}', '{photo}', '--output={folder}/there.png'], '--force'),
    (['{weights}', '{photo}', '--output={folder}/no/out.png'], 'its folder does not exist'),
    (['{weights}', '{folder}/none.png', '--output={folder}/out.png'], 'none.png: cannot be read: No such file'),
    (['{weights}', '{folder}', '--output={folder}/out.png'], 'cannot be read: Is a directory'),
    (['{weights}', '/dev/zero', '--output={folder}/out.png'], '/dev/zero: is no regular file'),
    (['{weights}', '{folder}/there.png', '--output={folder}/out.png'], 'there.png: cannot be read: no image file'),
    (['{photo}', '{photo}', '--output={folder}/out.png'], 'is neither a PyTorch checkpoint'),
    (['{folder}/headless', '{photo}', '--output={folder}/out.png'], 'holds no model with a head'),
    (['{weights}', '{photo}', '--output={folder}/out.png', '--blocks=0,2'], '--blocks=0,2: choose from 0,1'),
    (['{weights}', '{photo}', '--output={folder}/out.png', '--heads=all'], 'choose from mean,0,1,2,3'),
  ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(arguments, says, weights, photo, tmp_path, capsys):
  (tmp_path / 'there.png').write_text('before')
  convert(weights, tmp_path / 'headless', Options(num_classes=0))
  before = sorted(tmp_path.iterdir())
  names = dict(weights=weights, photo=photo, folder=tmp_path)
  code, printed, errors = run(*(argument.format(**names) for argument in arguments), capsys=capsys)
  (line,) = errors.splitlines()
  assert (code, printed) == (2, '')
  assert line.startswith('error: ')
  assert says in line
  assert sorted(tmp_path.iterdir()) == before
  assert (tmp_path / 'there.png').read_text() == 'before'
