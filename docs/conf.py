"""Sphinx configuration."""

from importlib.util import find_spec

from cmd_plugin import __version__

project = "cmd-plugin"
author = "The cmd-plugin maintainers"
copyright = "The cmd-plugin maintainers, Apache-2.0"
release = __version__
version = ".".join(release.split(".")[:2])

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"cmd-plugin {version}"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The federated room's adapters are described without Flower as well.
autodoc_mock_imports = [] if find_spec("flwr") else ["flwr"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
