"""Commands on two ranks of torch.distributed, with gloo, as a user starts them."""

import subprocess
import sys


def on_two_ranks(*command):
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
