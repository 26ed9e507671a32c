"""``cmd-plugin clip``: the geometry of embeddings, fitted, scored, shown, compared and aligned."""
