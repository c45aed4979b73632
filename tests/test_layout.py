# SPDX-License-Identifier: Apache-2.0
"""The shape of the repository: one stem finds everything, and README tells the truth about paths and variables."""

import re
from pathlib import Path

import pytest

import cupyattn

ROOT = Path(__file__).parent.parent
STEMS = sorted(p.stem for p in (ROOT / "cuda_src").glob("*.cu"))


@pytest.mark.parametrize("stem", STEMS)
def test_every_kernel_has_its_companions(stem):
    for companion in (f"cupyattn/ops/{stem}.py", f"cupyattn/reference/{stem}.py", f"tests/test_{stem}.py",
                      f"perf/bench_{stem}.py"):
        assert (ROOT / companion).is_file(), companion
    assert callable(getattr(cupyattn, stem)), f"cupyattn.{stem} is not exported"
    assert (ROOT / "cuda_src" / f"{stem}.cu").read_text().startswith("// SPDX-License-Identifier: Apache-2.0\n"
                                                                     f"// {stem}.cu - ")


def test_no_torch():
    for file in (ROOT / "cupyattn").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) torch", file.read_text(), re.MULTILINE), file


def test_public_names_are_documented():
    for name in cupyattn.__all__:
        doc = getattr(cupyattn, name).__doc__
        assert doc and len(doc.split()) > 5, name


def test_environment_variables_are_in_the_readme_table():
    readme = (ROOT / "README.md").read_text()
    text = "".join(file.read_text() for file in (ROOT / "cupyattn").rglob("*.py"))
    read = {name for name in re.findall(r"CUPYATTN_[A-Z_]+", text)}
    assert read == {f"CUPYATTN_{name}" for name in ("DEBUG", "CACHE_DIR", "CHECK", "CXX", "FORBID_COMPILE",
                                                   "TUNED")}
    for name in read:
        assert f"| `{name}` |" in readme, name


def test_readme_paths_exist():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:cuda_src|cupyattn|tests|perf|\.ci)/[\w./-]*)`", readme):
        assert (ROOT / path).exists(), path


def test_kernels_keep_their_house_rules():
    for file in (ROOT / "cuda_src").glob("*.cu"):
        text = file.read_text()
        assert not re.search(r"#\s*if.*(CA_CPU|__CUDACC__|_WIN32)", text), f"{file.name}: host #ifdef"
        assert "asm" not in text, f"{file.name}: PTX belongs in cuda_src/include"
        assert not re.search(r"#include\s*<(?!cuda_)", text), f"{file.name}: system include"


def test_readme_names_every_op_with_its_kernel():
    readme = (ROOT / "README.md").read_text()
    for stem in STEMS:
        assert re.search(rf"^\| `{stem}`.*\| `cuda_src/{stem}\.cu` \|$", readme, re.MULTILINE), stem


def test_readme_names_everything_public():
    """In its tables `FooCache`, `…CacheView` stands for `FooCacheView`, too."""
    words = set()
    for line in (ROOT / "README.md").read_text().splitlines():
        here = re.findall(r"\w+", line)
        for ending in re.findall(r"…(\w+)", line):
            here += [word.removesuffix("Cache") + ending for word in here if word.endswith("Cache")]
        words.update(here)
    assert set(cupyattn.__all__) <= words, sorted(set(cupyattn.__all__) - words)
