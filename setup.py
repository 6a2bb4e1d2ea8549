"""The package map: kernels/ is installed as cxgrad_fast.kernels, so that a wheel owns one top-level name."""

from setuptools import find_packages, setup

own = find_packages(include=["cxgrad_fast", "cxgrad_fast.*"])
kernels = ["cxgrad_fast.kernels", *(f"cxgrad_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=own + kernels,
    package_dir={"cxgrad_fast.kernels": "kernels"},
    package_data={"cxgrad_fast": ["py.typed"]},
)
