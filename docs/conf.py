"""Sphinx's configuration of the site: python -m sphinx -W --keep-going docs OUT."""

import os
import posixpath
import re

from sphinx.application import Sphinx

import t2t_vit_jax

project = 't2t_vit_jax'
version = release = t2t_vit_jax.__version__
extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
  'sphinx_design',
]
exclude_patterns = ['_build']

# Pages are Markdown that GitHub shows too. Links within and between them are checked, also those to headings.
myst_enable_extensions = ['colon_fence', 'html_image']
myst_heading_anchors = 4

# Notebooks are shown with the outputs that are stored in them: `python -m tests.notebooks` renews those.
nb_execution_mode = 'off'

# Docstrings are in Google's style, with Markdown's single backticks around code.
default_role = 'code'
smartquotes_action = 'De'  # dashes, and no quotes: 'se' is typed so
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the text says what is expected, with shapes; the signature has the defaults
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = 'furo'
pygments_dark_style = 'github-dark'
html_show_copyright = False
html_title = 't2t_vit_jax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
copybutton_exclude = '.linenos, .gp, .go'
# What GitHub's workflow builds has links to the repository: of each page to its source, and to files outside docs/.
REPOSITORY = os.environ.get('GITHUB_REPOSITORY')
if REPOSITORY:
  html_theme_options = {
    'source_repository': f'https://github.com/{REPOSITORY}/',
    'source_branch': 'main',
    'source_directory': 'docs/',
  }


def adapt_links(app: Sphinx, docname: str, source: list[str]) -> None:
  """Turns a page's links to files outside docs/ into links of the site; without a repository they are downloads.

  Links whose text is the name of a page's file, as suits a repository, get the page's title as their text.
  """

  def replacement(link: re.Match[str]) -> str:
    path = posixpath.normpath(posixpath.join(posixpath.dirname(docname), link[1]))
    if path == '../CONTRIBUTING.md':
      return '](contributing.md)'
    if path.startswith('../') and REPOSITORY:
      return f'](https://github.com/{REPOSITORY}/blob/main/{path[3:]})'
    return link[0]

  text = re.sub(r'\]\((\.\./[^)]*)\)', replacement, source[0])
  source[0] = re.sub(r'\[\w+\.md\](?=\(\w+\.md)', '[]', text)


def shorten_signature(
  app: Sphinx, what: str, name: str, object_: object, options: object, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
  """Classes by their names, as defaults; and without what Flax adds to the fields of each module."""
  if signature is not None:
    signature = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r'\1', signature)
    signature = re.sub(r', parent=<.*?>, name=None', '', signature)
  return signature, returned


def setup(app: Sphinx) -> None:
  app.connect('source-read', adapt_links)
  app.connect('autodoc-process-signature', shorten_signature)
