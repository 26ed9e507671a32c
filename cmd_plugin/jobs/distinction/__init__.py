"""``cmd-plugin distinction``: split images into class evidence and the rest; judge the split."""
