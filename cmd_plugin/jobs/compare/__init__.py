"""``cmd-plugin train``: raw weights, EMA, SWA and CMD in the same training runs."""
