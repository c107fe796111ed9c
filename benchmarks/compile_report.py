"""What the compiler makes of every kernel, without a GPU: `make compile-report`.

Kernels are found by looking through fastbert.kernels. How they are launched is learnt from the
`launch_all` of the benchmarks beside this file, in which launches are written down and not done.
Each launch is then compiled ahead of time for each chip. Exits non-zero where a kernel is never
launched or cannot be compiled, spills more than SPILLS allows, takes more shared memory than the
chip has, or multiplies matrices without the chip's instructions for it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules

import torch

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fastbert.kernels
from fastbert.kernels import _triton

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.bool: "*i1",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
    torch.uint32: "*u32",
}  # fmt: skip


@dataclass(frozen=True)
class Chip:
    target: GPUTarget
    shared: int  # bytes a block may have
    products: tuple[str, ...]  # matrix instructions, the best first
    architecture: str  # what launches are chosen by

    @property
    def is_nvidia(self):
        return self.target.backend == "cuda"


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166_912, ("mma.sync",), "ampere"),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 101_376, ("mma.sync",), "ampere"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232_448, ("wgmma.mma_async", "mma.sync"), "hopper"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232_448, ("tcgen05.mma", "mma.sync"), "blackwell"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65_536, ("v_mfma",), "amd"),
}
# Bytes of a thread's registers that may go to memory. Where it is not 0, the kernel says why.
SPILLS = 0


@dataclass(frozen=True)
class Launch:
    """What the compiler has to know of one: all but the values of its arguments."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, object], ...]

    def fits(self, chip_name):
        """Whether it is made there: Hopper and newer have hardware that moves tiles."""
        moves_tiles = any(kind.startswith("tensordesc") for _, kind in self.signature)
        return not moves_tiles or chip_name in ("sm_90", "sm_100")

    def row(self):
        """The choices, as one reads them."""
        shown = [f"{k}={v}" for k, v in self.constants if k.isupper()]
        return " ".join([*shown, *(f"{k}={v}" for k, v in self.options)])


@dataclass
class Report:
    kernel: str
    row: str
    dtype: str
    chip: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    products: str = ""
    faults: list[str] = field(default_factory=list)


def kernels():
    """(module, name) of all that is compiled and launched."""
    found = set()
    for module in iter_modules(fastbert.kernels.__path__):
        names = vars(import_module(f"fastbert.kernels.{module.name}"))
        for name, value in names.items():
            function = getattr(value, "function", getattr(value, "fn", None))
            if isinstance(value, (_triton.Kernel, JITFunction)) and name.endswith("_kernel"):
                found.add((function.__module__, name))
    return found


def written_down(kernel, args, options):
    """The launch of a kernel of triton.jit with these arguments."""
    bound = kernel.signature.bind_partial(
        *args, **{k: v for k, v in options.items() if k in kernel.arg_names}
    )
    bound.apply_defaults()
    signature, constants, divisible = {}, {}, []
    for i, parameter in enumerate(kernel.params):
        value = bound.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        is_one = type(value) is int and value == 1 and specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            divisible.append(i)
        elif hasattr(value, "block_shape"):
            dtype = POINTERS[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{dtype}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                divisible.append(i)
        else:
            signature[parameter.name] = "fp32"
    return Launch(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple((k, v) for k, v in options.items() if k in ("num_warps", "num_stages")),
    )


def launches(dtype, only, chip_name):
    """All different launches that the benchmarks make on one chip."""
    found = {}

    def write_down(kernel, *args, grid, warmup, **options):
        launch = written_down(kernel, args, options)
        found[launch] = None

    sys.path.append(str(Path(__file__).parent))
    JITFunction.run = write_down
    patches = {
        "on_kernel_device": lambda x: x.dtype in _triton.DTYPES,
        "architecture": lambda device: CHIPS[chip_name].architecture,
    }
    vars(_triton).update(patches)
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if "def launch_all" in path.read_text("utf-8") and re.search(only, path.stem):
            for module in iter_modules(fastbert.kernels.__path__):
                names = vars(import_module(f"fastbert.kernels.{module.name}"))
                names.update((name, patches[name]) for name in patches if name in names)
            import_module(path.stem).launch_all(dtype)
    return list(found)


def compiled(launch, dtype, chip_name):
    """Compile one launch for one chip and read what came out."""
    chip = CHIPS[chip_name]
    report = Report(launch.kernel, launch.row(), dtype, chip_name)
    function = vars(import_module(launch.module))[launch.kernel]
    if isinstance(function, _triton.Kernel):
        function = function.jitted()
    source = ASTSource(
        fn=function,
        signature=dict(launch.signature),
        constexprs={(function.arg_names.index(name),): value for name, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    try:
        options = {**dict(launch.options), "enable_fp_fusion": True}  # as all are launched
        result = triton.compile(source, target=chip.target, options=options)
    except Exception as error:  # whatever the compiler throws is the finding
        report.faults.append(f"cannot be compiled: {type(error).__name__}: {str(error)[-300:]}")
        return report
    report.shared = result.metadata.shared
    assembly = result.asm["ptx" if chip.is_nvidia else "amdgcn"]
    report.products = next((name for name in chip.products if name in assembly), "")
    if chip.is_nvidia:
        report.registers, report.spills = usage(result.asm["cubin"])
    else:
        report.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        report.spills = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
    if report.spills > SPILLS:
        report.faults.append(f"spills {report.spills} bytes a thread, {SPILLS} are allowed")
    if report.shared > chip.shared:
        report.faults.append(f"{report.shared:,} bytes of shared memory, there are {chip.shared:,}")
    if "tt.dot" in result.asm["ttir"] and not report.products:
        report.faults.append("multiplies matrices without instructions for it")
    return report


def usage(cubin):
    """Registers and bytes of stack a thread, by cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True, stderr=-2)
    return [int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path(".benchmarks/compile-report.json"))
    parser.add_argument("--only", default="", help="benchmarks whose name has this (regex)")
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], choices=DTYPES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()

    work, launched = [], set()
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # what it patches stays there
        for dtype, chip in product(args.dtypes, args.chips):
            found = process.submit(launches, DTYPES[dtype], args.only, chip).result()
            launched |= {(launch.module, launch.kernel) for launch in found}
            work += [(launch, dtype, chip) for launch in found if launch.fits(chip)]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as processes:
        reports = list(processes.map(compiled, *zip(*work, strict=True), chunksize=4))

    faults = 0
    for report in reports:
        print(
            f"{report.kernel:36} {report.chip:7} {report.dtype:9} {report.registers:4} registers "
            f"{report.spills:4} spilled {report.shared:7,} shared  "
            f"{report.products:16} {report.row}"
        )
        for fault in report.faults:
            faults += 1
            print(f"    FAULT: {fault}")
    if not args.only:
        for module, name in sorted(kernels() - launched):
            faults += 1
            print(f"FAULT: {module}.{name} is launched by no benchmark's launch_all")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    facts = {"triton": triton.__version__, "kernels": [asdict(report) for report in reports]}
    args.json.write_text(json.dumps(facts, indent=1))
    print(f"{len(reports)} kernels compiled, {faults} faults, written to {args.json}")
    return faults > 0


if __name__ == "__main__":
    sys.exit(main())
