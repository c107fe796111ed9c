"""The one extension; everything else is in pyproject.toml."""

import os
from glob import glob

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension as Extension

    include_dirs = []
except ImportError:  # --no-build-isolation without pybind11: torch carries its headers
    import torch
    from setuptools import Extension

    include_dirs = [os.path.join(os.path.dirname(torch.__file__), "include")]

flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
if os.environ.get("CI"):  # not for users: a newer compiler may warn of more
    flags.append("-Werror")

setup(
    ext_modules=[
        Extension(
            "fastbert._tokenizer",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            include_dirs=["csrc", *include_dirs],
            extra_compile_args=flags,
            extra_link_args=["-pthread"],
            language="c++",
        )
    ]
)
