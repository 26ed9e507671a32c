"""One script per claim: each prints a table and writes what it measured and on what."""
