"""What importing costs and brings along, each in a fresh process."""

import subprocess
import sys


def run(code):
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_import_brings_neither_torch_nor_triton_nor_transformers():
    out = run(
        "import fastbert, sys; print(sorted({'torch','triton','transformers'} & {*sys.modules}))"
    )
    assert (out.stdout, out.stderr) == ("[]\n", "")


def test_the_model_brings_neither_triton_nor_transformers():
    code = "from fastbert import BertModel, BertTokenizer, pack; import sys;"
    out = run(code + "print(sorted({'triton', 'transformers'} & {*sys.modules}))")
    assert (out.stdout, out.stderr) == ("[]\n", "")


def test_every_public_name_is_there():
    out = run("import fastbert; print([n for n in fastbert.__all__ if not hasattr(fastbert, n)])")
    assert out.stdout == "[]\n"
    assert set(run("import fastbert; print(*dir(fastbert))").stdout.split()) >= {
        "BertModel",
        "pack",
    }
