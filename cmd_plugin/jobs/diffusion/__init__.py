"""Jobs on diffusion models: train a small one, and ask what it has memorised."""
