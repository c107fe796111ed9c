"""What each of two processes does in a test of pretraining with FSDP2: is stopped, and goes on.

torchrun --nproc-per-node 2 two_pretraining.py OPTIONS.json
"""

import json
import sys
from pathlib import Path

import fastbert.pretrain
from fastbert.scored import loss_of


class Stopped(Exception):
    pass


def stopped_after(n_steps):
    def stopping(*args):
        nonlocal n_steps
        n_steps -= 1
        if n_steps < 0:
            raise Stopped
        return loss_of(*args)

    return stopping


if __name__ == "__main__":
    options = json.loads(Path(sys.argv[1]).read_text())
    fastbert.pretrain.loss_of = stopped_after(4)
    try:
        fastbert.pretrain.pretrain(fsdp=True, **options)
    except Stopped:
        fastbert.pretrain.loss_of = loss_of
        fastbert.pretrain.pretrain(fsdp=True, resume=True, **options)
