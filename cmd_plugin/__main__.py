"""``python -m cmd_plugin`` is ``cmd-plugin``."""

from cmd_plugin.cli.main import run

run()
