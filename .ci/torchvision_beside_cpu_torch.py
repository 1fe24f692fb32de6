"""Lets CI load torchvision's CUDA build beside a CPU build of PyTorch, where no CPU build of torchvision is to be had.

    python .ci/torchvision_beside_cpu_torch.py FOLDER

prints a folder to put on LD_LIBRARY_PATH, or nothing where `import torchvision` works as it is. The build links to two
libraries that a CPU PyTorch lacks. Empty ones are made here, whose functions end the process with their name if
anything ever calls them: only torchvision's CPU kernels are used. Never meant for users, who install the torchvision
that belongs to their PyTorch; beside a CUDA PyTorch it refuses.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch

_LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so")
_CUDA = re.compile(r"4cuda|_cuda_|_cuda$|^torch_cuda")
"""What PyTorch's CUDA libraries define, in mangled C++ (`c10::cuda`, `at::cuda`) or in C; the runtime's own functions
begin with `cuda` and are there."""


def loads(libraries: str | None = None) -> bool:
    """Whether a fresh interpreter imports torchvision with its operators."""
    environment = None if libraries is None else {"LD_LIBRARY_PATH": libraries}
    command = [sys.executable, "-c", "import torchvision; torchvision.ops.nms"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def missing_symbols(library: Path) -> list[str]:
    """Undefined symbols of torchvision's library that PyTorch's CUDA libraries would define."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    names = (line.split()[-1] for line in listed.stdout.splitlines())
    return sorted(name for name in names if "@" not in name and _CUDA.search(name) and not name.startswith("cuda"))


def is_function(symbol: str) -> bool:
    """C functions have bare names; mangled C++ ones are followed by their arguments."""
    if not symbol.startswith("_Z"):
        return True
    readable = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout
    return "(" in readable


def source(symbols: list[str]) -> str:
    """C code that defines them all."""
    lines = ["#include <stdio.h>", "#include <stdlib.h>"]
    for number, symbol in enumerate(symbols):
        if is_function(symbol):
            message = f"{symbol} of CUDA was called, which is not there"
            lines.append(f'void f{number}(void) __asm__("{symbol}");')
            lines.append(f'void f{number}(void) {{ fputs("{message}\\n", stderr); abort(); }}')
        else:
            lines.append(f'void *v{number} __asm__("{symbol}") = 0;')
    return "\n".join(lines) + "\n"


def main() -> None:
    if loads():
        return
    if torch.version.cuda is not None:
        sys.exit("torchvision does not load beside this CUDA PyTorch: install the version that belongs to it.")
    package = importlib.util.find_spec("torchvision")
    libraries = sorted(Path(package.origin).parent.glob("_C*.so")) if package else []
    if not libraries:
        sys.exit("torchvision is not installed.")
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        _LIBRARIES[0]: source(sorted({name for library in libraries for name in missing_symbols(library)})),
        _LIBRARIES[1]: "int nothing_of_cuda;\n",
    }
    for name, text in contents.items():
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(command, input=text, text=True, check=True)
    if not loads(str(folder)):
        sys.exit("torchvision does not load beside this PyTorch, not even with stand-ins for its CUDA libraries.")
    print(folder)


if __name__ == "__main__":
    main()
