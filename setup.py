"""What pyproject.toml can't say: kernels/ is installed as fastlora.kernels, not as kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastlora", "fastlora.*"]), "fastlora.kernels"],
    package_dir={"fastlora.kernels": "kernels"},
)
