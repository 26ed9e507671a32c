"""One script per claim: each prints a table and writes what it measured, with the machine it ran on."""
