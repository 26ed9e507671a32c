"""Child process of test_ddp.py: one rank of several gloo runs over loopback."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from callback_toys import CASES, distributed_run
from clip_toys import geometry_run

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    folder, rank, ports = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    runs = {name: partial(distributed_run, **case) for name, case in CASES.items()}
    runs["geometry"] = geometry_run
    for (name, run), port in zip(runs.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        result = run(rank=rank, world=2)
        torch.save(result, folder / f"{name}-{rank}.pt")
        torch.distributed.destroy_process_group()
