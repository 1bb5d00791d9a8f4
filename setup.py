"""Finds the sub-packages of the four mapped folders; everything else is declared in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {
    "graphwright": "compiler",
    "graphwright.passes": "passes",
    "graphwright.backends": "backends",
    "graphwright.kernels": "kernels",
}

setup(
    package_dir=FOLDERS,
    packages=[
        *FOLDERS,
        *(f"{name}.{package}" for name, folder in FOLDERS.items() for package in find_packages(folder)),
    ],
)
