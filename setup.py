"""The one thing that pyproject.toml can't say: kernels/ is installed as fastlora.kernels, never as
a top-level name."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastlora", "fastlora.*"]), "fastlora.kernels"],
    package_dir={"fastlora.kernels": "kernels"},
)
