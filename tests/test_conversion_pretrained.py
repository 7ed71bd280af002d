"""Weights by name: fetched once from a server on this machine, continued, checked, kept and found again."""

import hashlib
import json
import subprocess
import sys

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

import t2t_vit_jax
from t2t_vit_jax import UserError, create_model, list_models, load_pretrained
from t2t_vit_jax.conversion import Options, convert, find_weights, names, pretrained
from t2t_vit_jax.models.published import PUBLISHED, Published
from t2t_vit_jax.models.variants import VARIANTS, DataDefaults, Variant
from tests import golden
from tests.file_server import file_server
from tests.processes import finish, start_command
from tests.small_disk import fill, small_disk

FILE = 'official_tiny_performer.pth.tar'
PIECE = 2**16  # bytes that are written at a time
CONTENT = (golden.DATA / FILE).read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache folder; pauses between attempts take no time."""
  monkeypatch.setenv('T2T_VIT_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(pretrained, '_PAUSES', (0, 0))
  return tmp_path / 'cache'


@pytest.fixture
def server(monkeypatch, cache):
  """A mirror with the reference's small model, which has a name among models and among published weights."""
  tiny = {name: value for name, value in golden.TINY_MODELS['performer'].items() if name != 'image_size'}
  monkeypatch.setitem(VARIANTS, 'tiny', Variant(tiny, DataDefaults(image_size=64)))
  with file_server() as running:
    running.files[FILE] = CONTENT
    monkeypatch.setenv('T2T_VIT_JAX_MIRROR', f'{running.url}/folder/')
    publish(monkeypatch)
    yield running


def publish(monkeypatch, **facts):
  row = dict(url=f'https://example.com/releases/{FILE}', model='tiny', top1=0.0, parameters=0, num_classes=10)
  monkeypatch.setitem(PUBLISHED, 'tiny', Published(**{**row, 'image_size': 64, **facts}))


def logits(source):
  model, variables = load_pretrained(source)
  return model.apply(variables, golden.load_numbers('tiny_performer')['images_nhwc'])


def test_a_name_is_fetched_once_converted_and_gives_the_references_logits(server, cache, capsys):
  for _ in range(2):
    np.testing.assert_allclose(logits('tiny'), golden.load_numbers('tiny_performer')['logits'], atol=1e-5)
  assert server.requests == [('GET', FILE, '')]
  assert sorted(path.name for path in cache.iterdir()) == [
    'tiny.lock',
    'tiny.safetensors',
    'tiny.safetensors.sha256',
  ]
  file = cache / 'tiny.safetensors'
  assert (
    cache / 'tiny.safetensors.sha256'
  ).read_text() == f'{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n'
  assert capsys.readouterr().err == f'fetching {server.url}/folder/{FILE} (about 0 bytes) into {cache}\n'


@pytest.mark.needs('torch')
def test_the_older_pytorch_format_is_fetched_as_well(server, tmp_path):
  import torch

  torch.save(golden.load_state_dict('performer'), tmp_path / 'old', _use_new_zipfile_serialization=False)
  server.files[FILE] = (tmp_path / 'old').read_bytes()
  np.testing.assert_allclose(logits('tiny'), golden.load_numbers('tiny_performer')['logits'], atol=1e-5)


@pytest.mark.parametrize('ranges', [True, False])
def test_a_download_that_broke_off_goes_on(server, cache, ranges, capsys):
  server.ranges, server.breaks = ranges, [PIECE, PIECE]
  find_weights('tiny')
  starts = ['', f'{PIECE}', f'{2 * PIECE if ranges else PIECE}']
  assert server.requests == [('GET', FILE, start) for start in starts]
  assert capsys.readouterr().err.count('the download broke off (IncompleteRead') == 2
  assert (cache / 'tiny.safetensors').is_file()


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server, cache):
  server.breaks = [PIECE, PIECE, PIECE]
  with pytest.raises(UserError, match=rf'{FILE} cannot be fetched .*fetch it elsewhere and put it into {cache}$'):
    find_weights('tiny')
  assert (cache / f'{FILE}.part').read_bytes() == CONTENT[: 3 * PIECE]
  find_weights('tiny')
  assert [start for _, _, start in server.requests] == ['', *(str(count * PIECE) for count in (1, 2, 3))]
  assert not list(cache.glob('*.part*'))


def test_a_file_that_changes_on_the_server_is_fetched_anew(server, cache):
  server.breaks = [PIECE, PIECE, PIECE]
  with pytest.raises(UserError, match='cannot be fetched'):
    find_weights('tiny')
  other = (golden.DATA / 'official_tiny_performer_own_pos_embed.pth.tar').read_bytes()
  server.files[FILE] = other
  np.testing.assert_allclose(logits('tiny'), golden.load_numbers('tiny_performer_own_pos_embed')['logits'], atol=1e-5)


@pytest.mark.parametrize(
  ('facts', 'content', 'message'),
  [
    (dict(size=len(CONTENT) + 1), CONTENT, f'is of {len(CONTENT):,} bytes instead of {len(CONTENT) + 1:,}'),
    (dict(sha256='01234567'), CONTENT, 'has the SHA-256 .* which does not begin with 01234567'),
    (dict(num_classes=100), CONTENT, 'has num_classes=10 instead of 100'),
    (dict(image_size=96), CONTENT, 'has image_size=64 instead of 96'),
    (
      {},
      (golden.DATA / 'official_tiny_transformer.pth.tar').read_bytes(),
      'is not tiny: it has tokens_type=transformer',
    ),
    ({}, b'<html>Log in to this network</html>', 'is neither a PyTorch checkpoint nor'),
    ({}, CONTENT[:-1000], 'damaged or not a weight file'),
  ],
  ids=['size', 'checksum', 'classes', 'image size', 'model', 'page', 'cut'],
)
def test_what_is_not_the_published_file_is_refused_and_fetched_again(
  server, cache, monkeypatch, facts, content, message
):
  server.files[FILE] = content
  publish(monkeypatch, **facts)
  for _ in range(2):
    with pytest.raises(UserError, match=f'{message}.*: this is not the published file; the same command'):
      find_weights('tiny')
  assert len(server.requests) == 2
  assert [path.name for path in cache.iterdir()] == ['tiny.lock']


def test_a_damaged_file_in_the_cache_is_replaced(server, cache, capsys):
  file = find_weights('tiny')
  whole = file.read_bytes()
  file.write_bytes(whole[:-4] + bytes(4))  # a number of the weights
  assert find_weights('tiny').read_bytes() == whole
  assert f'warning: {file} was damaged or changed' in capsys.readouterr().err


def test_without_a_network_a_file_that_was_put_there_is_taken_and_kept(cache, server, monkeypatch):
  monkeypatch.delenv('T2T_VIT_JAX_MIRROR')
  monkeypatch.setenv('HTTPS_PROXY', 'http://localhost:9')
  with pytest.raises(
    UserError,
    match=rf'^https://example.com/releases/{FILE} cannot be fetched \(ConnectionRefusedError: .*put it into {cache}$',
  ):
    find_weights('tiny')
  (cache / FILE).write_bytes(b'not this')
  with pytest.raises(
    UserError, match=r'this is not the published file; delete it, or put the file of https://example.com'
  ):
    find_weights('tiny')
  (cache / FILE).write_bytes(CONTENT)
  find_weights('tiny')
  assert (cache / FILE).read_bytes() == CONTENT


def test_a_server_that_has_no_such_file_is_asked_once(server):
  server.files.clear()
  with pytest.raises(UserError, match='404'):
    find_weights('tiny')
  assert len(server.requests) == 1


def test_a_server_that_is_overloaded_is_asked_again(server):
  server.status = 503
  with pytest.raises(UserError, match='503'):
    find_weights('tiny')
  assert len(server.requests) == 3


def test_a_read_only_cache_serves_what_it_has(server, cache, monkeypatch):
  cache.mkdir()
  with small_disk(cache):
    file = find_weights('tiny')
    subprocess.run(['mount', '-o', 'remount,ro', cache], check=True)
    assert find_weights('tiny') == file
    monkeypatch.setitem(PUBLISHED, 'other', PUBLISHED['tiny'])
    with pytest.raises(UserError, match=rf'^other: {cache} cannot be written \(Read-only file system\): set T2T'):
      find_weights('other')


def test_a_full_disk_is_one_line(server, cache):
  cache.mkdir()
  with small_disk(cache):
    fill(cache, 100_000)
    with pytest.raises(UserError, match=rf'^tiny: {cache} cannot be written \(the disk is full: '):
      find_weights('tiny')


@pytest.fixture(scope='module')
def weights_of_7(tmp_path_factory):
  """Random weights of t2t_vit_7 under PyTorch's names."""
  folder = tmp_path_factory.mktemp('weights_of_7')
  variables = create_model('t2t_vit_7').init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  tensors = {}
  for path, array in flatten_dict(variables, sep='/').items():
    name, transform = names.to_torch(path, 'performer')
    tensors[name] = np.ascontiguousarray(transform.to_torch(np.asarray(array)))
  safetensors.numpy.save_file(tensors, folder / 'tensors')
  return folder / 'tensors'


@pytest.mark.slow
def test_two_processes_at_once_fetch_once(tmp_path, weights_of_7):
  with file_server() as running:
    # A file's format is recognised by its first bytes, not by its name.
    running.files['71.7_T2T_ViT_7.pth.tar'], running.pause = weights_of_7.read_bytes(), 1.5
    environment = dict(T2T_VIT_JAX_CACHE=str(tmp_path / 'cache'), T2T_VIT_JAX_MIRROR=running.url)
    command = (sys.executable, '-m', 't2t_vit_jax.weights', 't2t_vit_7')
    ended = finish([start_command(*command, **environment) for _ in range(2)])
    assert running.requests == [('GET', '71.7_T2T_ViT_7.pth.tar', '')]
  assert [(code, output) for code, output, _ in ended] == [(0, f'{tmp_path}/cache/t2t_vit_7.safetensors\n')] * 2
  assert sum('another process fetches t2t_vit_7' in errors for _, _, errors in ended) == 1


@pytest.mark.slow
@pytest.mark.needs('torch')
@pytest.mark.parametrize('zip_format', [True, False])
def test_a_prediction_takes_a_name_and_nothing_else(tmp_path, weights_of_7, zip_format):
  import torch

  state = {name: torch.from_numpy(array) for name, array in safetensors.numpy.load_file(weights_of_7).items()}
  torch.save({'state_dict_ema': state}, tmp_path / 'saved', _use_new_zipfile_serialization=zip_format)
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(tmp_path / 'cat.png')
  command = (sys.executable, '-m', 't2t_vit_jax.predict', 't2t_vit_7', tmp_path / 'cat.png', '--json')
  with file_server() as running:
    running.files['71.7_T2T_ViT_7.pth.tar'] = (tmp_path / 'saved').read_bytes()
    environment = dict(T2T_VIT_JAX_CACHE=str(tmp_path / 'cache'), T2T_VIT_JAX_MIRROR=running.url)
    (first,) = finish([start_command(*command, **environment)])
  (second,) = finish([start_command(*command, **environment)])  # the server is gone
  assert first[:2] == (0, second[1])
  assert second[2] == ''
  (guesses,) = json.loads(second[1])
  assert len(guesses['predictions']) == 5


@pytest.mark.slow
@pytest.mark.needs('huggingface_hub')
def test_a_repository_on_a_hub_is_fetched_by_the_hubs_client_and_found_again_offline(tmp_path):
  options = Options(settings={'num_heads': 4})
  convert(golden.DATA / FILE, tmp_path / 'model.safetensors', options)
  code = """
import sys
import numpy as np
from t2t_vit_jax import UserError, load_pretrained
try:
  model, variables = load_pretrained(sys.argv[1])
except UserError as error:
  sys.exit(f'error: {error}')
with np.load(sys.argv[2]) as expected:
  np.testing.assert_allclose(model.apply(variables, expected['images_nhwc']), expected['logits'], atol=1e-5)
"""
  numbers = golden.DATA / 'official_tiny_performer.npz'

  def ask(source, **environment):
    command = (sys.executable, '-c', code, source, numbers)
    return start_command(*command, HF_HOME=str(tmp_path / 'hub'), HF_ENDPOINT=server.url, **environment)

  with file_server() as server:
    server.files['model.safetensors'] = (tmp_path / 'model.safetensors').read_bytes()
    server.headers = {'X-Repo-Commit': 'a' * 40}
    (online,) = finish([ask('hf://user/repo@v1.0')])
    assert '/user/repo/resolve/v1.0/model.safetensors' in server.paths
    server.files.clear()
    (missing,) = finish([ask('hf://user/other')])
  offline, unknown = finish([ask('hf://user/repo@v1.0', HF_HUB_OFFLINE='1'), ask('hf://a/b', HF_HUB_OFFLINE='1')])
  assert (online[0], offline[0]) == (0, 0), (online, offline)
  for code, _, errors in (missing, unknown):
    assert code == 1
    assert 'model.safetensors cannot be fetched' in errors
    assert errors.count('\n') == 1, errors


def test_what_names_no_repository_is_refused(monkeypatch):
  for source in ('hf://repo', 'hf://user/repo/file', 'hf://user/repo@', 'hf://user/../repo'):
    with pytest.raises(UserError, match='must be hf://USER/REPO or hf://USER/REPO@REVISION'):
      find_weights(source)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match=r"^hf://user/repo needs huggingface_hub: pip .*\[hub\]'$"):
    find_weights('hf://user/repo')


def test_names_folders_and_files(tmp_path, cache, monkeypatch):
  (tmp_path / 'run' / 'weights').mkdir(parents=True)
  (tmp_path / 'run' / 'checkpoints').mkdir()
  with pytest.raises(UserError, match=r'is a run without weight files so far: python train.py --export='):
    find_weights(tmp_path / 'run')
  with pytest.raises(UserError, match=r'is a folder without model.safetensors'):
    find_weights(tmp_path / 'run' / 'weights')
  file = tmp_path / 'run' / 'weights' / 'model.safetensors'
  file.touch()
  assert find_weights(tmp_path / 'run') == find_weights(tmp_path / 'run' / 'weights') == find_weights(file) == file
  with pytest.raises(
    UserError, match=r"t2t_vit14: no such file .* weights of this name published: did you mean 't2t_vit_14'"
  ):
    find_weights('t2t_vit14')
  with pytest.raises(UserError, match='weights of t2t_vit_dense were never published'):
    find_weights('t2t_vit_dense')


def test_a_name_is_no_file_and_says_so_where_there_is_one(server, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tiny').mkdir()
  assert find_weights('tiny') == tmp_path / 'cache' / 'tiny.safetensors'
  assert 'write ./tiny' in capsys.readouterr().err
  with pytest.raises(UserError, match='is a folder without'):
    find_weights('./tiny')


def test_lists_and_create_model_tell_weights_from_models():
  assert 't2t_vit_14_384' in list_models(pretrained=True)
  assert 't2t_vit_14_384' not in list_models()
  with pytest.raises(UserError, match=r"load_pretrained\('t2t_vit_14'\)"):
    create_model('t2t_vit_14', pretrained=True)
  with pytest.raises(UserError, match=r't2t_vit_14_384 are weights of the model t2t_vit_14: load_pretrained'):
    create_model('t2t_vit_14_384')
  assert t2t_vit_jax.find_weights is find_weights


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_table_agrees_with_the_models(name):
  row = PUBLISHED[name]
  model = create_model(row.model)
  tokens = (row.image_size // 16) ** 2 - (224 // 16) ** 2
  head = (row.num_classes - 1000) * (model.embed_dim + 1)
  second = 1000 * (model.embed_dim + 1) if 'token labeling' in row.data else 0
  expected = golden.PARAMETERS[row.model][0] + tokens * model.embed_dim + head + second
  assert row.parameters == expected
  assert row.size is None or 0 <= row.size - 4 * expected < 100_000
  assert row.measured is None or abs(row.measured[0] - row.top1) < 0.06
