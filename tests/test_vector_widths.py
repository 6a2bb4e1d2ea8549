"""Vectors of every width, by every compiler: what csrc's headers do where a vector has few elements."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from cxgrad_fast.kernels import building

PROGRAM = """
#include <cstdio>
#include "first_layer.h"

template <class T>
int wrong() {
  using namespace cxgrad;
  T pixels[64];
  for (int i = 0; i < 64; ++i) pixels[i] = T(10 + i);
  int count = 0;
  for (int start = 0; start < 4; ++start) {
    Vec<Integer<T>> corners{};
    for (int lane = 0; lane < kWidth<T>; ++lane) corners[lane] = (start + lane) % 4;
    const Vec<T> found = at_corners(pixels, corners);
    for (int lane = 0; lane < kWidth<T>; ++lane) count += found[lane] != pixels[(start + lane) % 4];
  }
  return count;
}

int main() { std::printf("%d %d %d", cxgrad::kVectorBytes, wrong<float>(), wrong<double>()); }
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the widths are those of x86-64")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize(("target", "width"), [("x86-64", 16), ("x86-64-v3", 32), ("x86-64-v4", 64)])
def test_every_channel_gets_its_own_corner(target: str, width: int, compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    if missing := building._LEVELS.get(target, set()) - set(building._abilities()):
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    source, program = tmp_path / "corners.cpp", tmp_path / "corners"
    source.write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-Wno-psabi", f"-march={target}", f"-I{building.SOURCES}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert done.stdout == f"{width} 0 0"
