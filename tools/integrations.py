"""Trains a tiny model in real trainers, with fastlora and without: ``make integrations``.

    make integrations ARGS="--list"
    make integrations ARGS="-s axolotl"

Each trainer has an environment of its own, and its tests in tests/integrations run there.  axolotl
and verl are installed without their dependencies for GPUs and for reports.
"""

from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parents[1]
nox.options.envdir = str(ROOT / ".cache" / "nox")
nox.options.default_venv_backend = "uv"
# A trainer: its packages without their dependencies, and the packages that its CPU run imports.
TRAINERS = {
    "trl": ("", "trl==1.16.0 transformers==5.24.0 peft==0.21.2 datasets"),
    "swift": ("", "ms-swift==4.6.0"),
    "llamafactory": ("", "llamafactory==0.9.5"),
    "axolotl": (  # from Python 3.12 on
        "axolotl==0.21.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6",
        "torch<2.15.0 transformers==5.20.1 peft==0.21.2 trl==1.14.1 accelerate==1.15.0 "
        "datasets==5.0.1 kernels<0.18 pydantic==2.13.5 addict fire wandb evaluate==0.4.1 numba art "
        "python-dotenv posthog==6.7.11 schedulefree==1.4.1 opentelemetry-sdk PyYAML requests "
        "colorama einops scipy typer==0.25.1 pillow bitsandbytes fastcore",
    ),
    "verl": (
        "verl==0.9.1",
        "transformers==5.10.4 peft tensordict==0.10.0 ray[default]==2.60.0 codetiming "
        "hydra-core datasets pylatexenc torchdata accelerate pillow",
    ),
}


def run(session: nox.Session, name: str) -> None:
    bare, packages = TRAINERS[name]
    session.install(f"{ROOT}[trainer,peft]", "pytest", "hypothesis", *packages.split())
    if bare:
        session.install("--no-deps", *bare.split())
    own = {"FASTLORA_INTEGRATION": "1", "PYTHONPATH": ""}
    session.chdir(ROOT)
    session.run("pytest", "-q", "tests/integrations", "-k", name, env=own)


for name in TRAINERS:
    python = "3.12" if name == "axolotl" else "3.11"
    nox.session(name=name, python=python)(lambda session, name=name: run(session, name))
