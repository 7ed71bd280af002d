"""Keeps compiled programs on disk, so that the next start of a run need not compile them."""

import os

from etils import epath
import jax

from t2t_vit_jax.console import warn
from t2t_vit_jax.conversion.pretrained import cache_folder
from t2t_vit_jax.errors import UserError, writing_problem

OFF = 'none'


def keep_programs(folder: str) -> list[str]:
  """Tells JAX where to keep programs that it compiles from now on, small ones too.

  What the user has told JAX itself counts more: `JAX_COMPILATION_CACHE_DIR` and its other settings of the cache.

  Args:
    folder: on a disk or in a bucket; empty for one in the cache folder of this package, but none on a CPU, where
      programs compile fast; 'none' for none.

  Returns:
    A line that names the folder, if there is one.

  Raises:
    UserError: `folder` cannot be made or written to.
  """
  settings = jax.config.values
  if not settings['jax_enable_compilation_cache']:
    return []
  chosen = settings['jax_compilation_cache_dir']
  if not chosen:
    if folder == OFF or (not folder and jax.default_backend() == 'cpu'):
      return []
    chosen = os.path.expanduser(folder) or str(cache_folder() / 'programs')
    try:
      _check_writable(epath.Path(chosen))
    except Exception as error:  # of a disk, or of a bucket's client, whichever that is
      problem = f'compiled programs cannot be kept in {chosen}: {writing_problem(error, chosen)}'
      if folder:
        raise UserError(f'compilation_cache_dir: {problem}') from error
      warn(f'{problem}; the run goes on without')
      return []
    jax.config.update('jax_compilation_cache_dir', chosen)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  return [f'compiled programs: kept in {chosen} for the next start']


def _check_writable(folder: epath.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / f'.{os.getpid()}'
  file.write_text('')
  file.unlink(missing_ok=True)  # processes of other hosts may have the same number
