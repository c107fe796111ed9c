"""What each of two processes does in a test of pretraining with FSDP2: is stopped in step 5.

torchrun --nproc-per-node 2 two_pretraining.py ARGUMENTS OF fastbert pretrain
"""

import os
import sys

import fastbert.pretrain
from fastbert.cli import main
from fastbert.scored import loss_of

calls = 0


def stopping(*args):
    global calls
    calls += 1
    if calls == 5:
        os._exit(0)  # as if killed, but so that torchrun is content
    return loss_of(*args)


fastbert.pretrain.loss_of = stopping
main(["pretrain", *sys.argv[1:]])
