"""Commands on two ranks of torch.distributed, with gloo, as a user starts them."""

import os
import subprocess
import sys


def on_two_ranks(*command):
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # torchrun's own choice where none is made
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
