"""The `cmd-plugin` command: one file per sub-command, no logic of its own."""
