"""Child process of test_resume.py: train until the given step, then die without a word."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from callback_toys import train_with_checkpoints

if __name__ == "__main__":
    torch.set_num_threads(1)
    train_with_checkpoints(Path(sys.argv[1]), kill_at=int(sys.argv[2]))
