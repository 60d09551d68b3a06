"""Builds ``expertmesh-client``: the client alone, from the files of the whole package.

    pip install ./deploy/client

It needs neither Ray nor torch. It has files of the whole package, so it is not for an environment
that has ``expertmesh``.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path("..", "..")
PACKAGES = ["expertmesh", "router.client", "router.protos"]
MODULES = [
    *("cluster.__init__", "cluster.errors", "cluster.private_file", "cluster.reports"),
    *("cluster.spec", "cluster.tls"),
    *("router.__init__", "router.retry", "router.messages.__init__", "router.messages.request"),
    *("router.messages.routed", "router.messages.rules"),
]
NEEDED = {"grpcio", "protobuf", "googleapis-common-protos"}

whole = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
setup(
    name="expertmesh-client",
    version=whole["version"],
    description="Client of ExpertMesh, an expert-serving cluster for Mixture-of-Experts models",
    license=whole["license"],
    python_requires=whole["requires-python"],
    install_requires=[
        need for need in whole["dependencies"] if re.split(r"[^\w-]", need)[0] in NEEDED
    ],
    extras_require={"predict": [n for n in whole["dependencies"] if n.startswith("numpy")]},
    package_dir={"": str(ROOT)},
    packages=PACKAGES,
    py_modules=MODULES,
)
