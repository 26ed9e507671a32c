"""``cmd-plugin points``: train a point network, compare its defences, see what it looks at."""
