"""Make torchvision importable next to a torch of another build; run once with the python of the test environment.

The CPU build of vLLM pins a CPU build of torch, and the package index has torchvision for CUDA only, whose operators
do not load there. Its transforms, all that is needed, are Python. A module that Python runs at every start waits for
the import of torchvision and declares the operators that it registers shapes for.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

STANDIN = '''"""Declares the operators of a torchvision whose binary part does not load."""

import importlib.abc
import sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global library  # the declarations end with it
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, Finder())
'''


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    (site / "torchvision_operators.py").write_text(STANDIN)
    (site / "torchvision_operators.pth").write_text("import torchvision_operators\n")


if __name__ == "__main__":
    main()
