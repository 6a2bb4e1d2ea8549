"""The package map, and the C++ operators, compiled where the installing Python has torch and a compiler.

kernels/ is installed as cxgrad_fast.kernels and csrc/ as cxgrad_fast.csrc, so that a wheel owns one top-level name.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

own = find_packages(include=["cxgrad_fast", "cxgrad_fast.*"])
kernels = ["cxgrad_fast.kernels", *(f"cxgrad_fast.kernels.{name}" for name in find_packages("kernels"))]

INSTALL = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from cxgrad_fast.kernels import building
building.install(Path(sys.argv[1]) / "cxgrad_fast")
"""


class BuildWithOperators(build_py):
    """Adds the compiled operators. Where they do not compile, the first use tries again and says why."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there the first use builds, and again after every edit
            # -I: with the packages of the environment that is installed into, which pip hides from a build
            command = [sys.executable, "-IB", "-c", INSTALL, str(Path(self.build_lib).resolve())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                self.announce(f"C++ operators: not now ({(done.stderr.splitlines() or ['?'])[-1]})", 2)


class PlatformDistribution(Distribution):
    """A wheel of one platform: it holds what was compiled there."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    packages=[*own, *kernels, "cxgrad_fast.csrc"],
    package_dir={"cxgrad_fast.kernels": "kernels", "cxgrad_fast.csrc": "csrc"},
    package_data={
        "cxgrad_fast": ["py.typed", "presets/*.toml"],
        "cxgrad_fast.csrc": ["*.cpp", "*.h"],
        "cxgrad_fast.kernels": ["launch_tables/*.json"],
    },
    cmdclass={"build_py": BuildWithOperators},
    distclass=PlatformDistribution,
)
