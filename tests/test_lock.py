"""requirements-lock.txt says what the requirements files ask for, with hashes, and is what `make install` installs."""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from demos.language import OFFLINE, embed
from errors import BadInput
from published.hub import downloaded

LOCK = ROOT / "requirements-lock.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCH = re.search(r"TORCH := (torch==[\d.]+)", (ROOT / "Makefile").read_text())[1]
TORCHS_OWN = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # depends on the machine, or comes with what does


def asked_by(name: str) -> list[tuple[str, Requirement]]:
    """(file, requirement) of a requirements file and of those that it includes."""
    found = []
    for line in (ROOT / name).read_text().splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("-r "):
            found += asked_by(line[3:])
        elif line:
            found.append((name, Requirement(line)))
    return found


def locked() -> list[tuple[Requirement, list[str], list[str]]]:
    """(requirement, hashes, who asks for it) of each package and version."""
    text = re.sub(r"^#.*\n", "", LOCK.read_text(), flags=re.M)
    found = []
    for entry in re.split(r"\n(?=[a-z])", text.strip()):
        entry, _, via = entry.partition("# via ")
        requirement, *hashes = entry.replace("\\\n", " ").split("--hash=")
        found.append((Requirement(requirement), [word.strip() for word in hashes], via.strip().split(", ")))
    return found


def environment(python: str) -> dict[str, str]:
    linux = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
    return default_environment() | linux | {"python_version": python, "python_full_version": f"{python}.1", "extra": ""}


ASKED = [*asked_by("requirements.txt"), *asked_by("requirements-dev.txt")]
LOCKED = locked()


def versions(python: str) -> dict[str, str]:
    """What the lock gives one Python: name -> version, one of each."""
    found: dict[str, str] = {}
    for requirement, _, _ in LOCKED:
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            assert requirement.name not in found, f"two versions of {requirement.name} for Python {python}"
            (found[requirement.name],) = (pin.version for pin in requirement.specifier)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_gets_what_the_requirements_files_ask_for(python):
    found = versions(python)
    assert len(found) > 100
    for file, requirement in ASKED:
        name = canonicalize_name(requirement.name)
        if name == "torch" or (requirement.marker and not requirement.marker.evaluate(environment(python))):
            continue
        version = found.get(name)
        assert version and requirement.specifier.contains(version, prereleases=True), (
            f"{file} asks for {requirement}, {LOCK.name} has {version} for Python {python}; run `make lock`"
        )


def test_what_the_lock_says_of_the_requirements_files_is_still_so():
    """A package that a file no longer names would otherwise stay."""
    asked = {(f"-r {file}", canonicalize_name(requirement.name)) for file, requirement in ASKED}
    said = {(via, entry.name) for entry, _, vias in LOCKED for via in vias if via.startswith("-r ")}
    assert said == {pair for pair in asked if pair[1] != "torch"}, f"{LOCK.name} is of other files; run `make lock`"


def test_what_a_locked_package_needs_is_locked_as_well():
    """By the packages' own word, as far as this environment has them at the lock's versions."""
    found = versions(f"{sys.version_info[0]}.{sys.version_info[1]}")
    looked_at = 0
    for name, version in [*found.items(), ("torch", None)]:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version not in (None, package.version):
            continue
        looked_at += 1
        for line in package.requires or []:
            needed = Requirement(line)
            if TORCHS_OWN.fullmatch(needed.name) or (needed.marker and not needed.marker.evaluate({"extra": ""})):
                continue
            if name == "torch" and f"torch=={package.version.partition('+')[0]}" != TORCH:
                continue
            has = found.get(canonicalize_name(needed.name))
            assert has, f"{name} needs {needed}, which the lock lacks"
            assert needed.specifier.contains(has, prereleases=True), f"{name} needs {needed}, the lock has {has}"
    assert looked_at > 50


def test_each_line_has_hashes_and_none_depends_on_the_machine():
    for requirement, hashes, _ in LOCKED:
        assert not TORCHS_OWN.fullmatch(requirement.name), f"{requirement} belongs to torch's build, not into the lock"
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", found) for found in hashes), requirement
    assert not re.search(r"://|^--|@", LOCK.read_text(), re.M), "the lock names an index, which is the machine's matter"


def test_torch_has_one_version_and_the_oldest_is_tested():
    for file in ("README.md", "requirements.txt"):
        assert set(re.findall(r"torch==[\d.]*\d", (ROOT / file).read_text())) == {TORCH}, file
    (oldest,) = (re.search(r">=([\d.]+)", str(asked))[1] for _, asked in ASKED if asked.name == "torch")
    assert f"torch: torch=={oldest}.0  #" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_the_licences_of_all_locked_packages_are_listed():
    rows = re.findall(r"^\| (\S+) \| (.+?) \| (.+) \|$", (ROOT / "docs/licences.md").read_text(), re.M)
    listed = {name: (version.split(", "), licence) for name, version, licence in rows}
    wanted: dict[str, list[str]] = {}
    for requirement, _, _ in LOCKED:
        wanted.setdefault(requirement.name, []).append(str(requirement.specifier).removeprefix("=="))
    for name, pins in wanted.items():
        assert listed.get(name, ("none", ""))[0] == pins, f"docs/licences.md lacks {name} {pins}; run `make licences`"
        assert listed[name][1] != "not stated" or f"**{name}**" in (ROOT / "docs/licences.md").read_text()


def test_a_vulnerability_that_is_accepted_has_its_reason():
    accepted = re.search(r"^ACCEPTED := (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    reasons = (ROOT / "docs/dependencies.md").read_text()
    assert accepted and [one for one in accepted if one not in reasons] == []


# ---------------------------------------------------------------------------------------------------- installed from


def install(tmp_path: Path, digest: str) -> subprocess.CompletedProcess:
    """Installs a package of one line from a lock with this hash, by pip, without a network, into tmp_path/there."""
    lock = tmp_path / "lock.txt"
    lock.write_text(f"tiny-example==1.0 \\\n    --hash=sha256:{digest}\n")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_TARGET": str(tmp_path / "there")}
    command = [ROOT / ".ci/install-lock", sys.executable, lock]
    return subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)


@pytest.mark.slow
def test_a_file_that_is_not_the_locked_one_is_not_installed(tmp_path):
    wheel = tmp_path / "tiny_example-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_example.py", "x = 1\n")
        archive.writestr(
            "tiny_example-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-example\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_example-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_example-1.0.dist-info/RECORD", "")
    done = install(tmp_path, "0" * 64)
    assert done.returncode == 2
    assert f"error: a file is not the one that {tmp_path}/lock.txt names" in done.stderr.splitlines()[-1]
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in done.stderr  # pip's own words stay
    assert not (tmp_path / "there").exists()
    done = install(tmp_path, hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there/tiny_example.py").exists()


# ------------------------------------------------------------------------------------------------------------ extras

GUIDE = ("train", "eval", "run_libero_eval", "collect_demos", "check_demos", "embed_language", "export_policy")
EXTRAS = ("transformers", "fast_simplification", "huggingface_hub", "websockets", "msgpack", "pyarrow")


@pytest.mark.slow
def test_the_scripts_start_without_any_extra():
    """requirements.txt alone is what the training guide's reader installs."""
    lines = [f"import sys; sys.modules |= dict.fromkeys({EXTRAS}); import {', '.join(GUIDE)}"]
    done = subprocess.run([sys.executable, "-c", *lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_transformers_clip_says_what_to_install_and_auto_does_without(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match=r"transformers.*; `pip install -r requirements-clip\.txt`$"):
        embed(["fly"], "clip")
    name, vectors = embed(["fly"], "auto")
    assert name.startswith(OFFLINE) and vectors.shape == (1, 512)
    assert "requirements-clip.txt" in capsys.readouterr().out


def test_without_the_hubs_client_its_addresses_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match=r"^hf://owner/name: .*`pip install -r requirements-interop\.txt`$"):
        downloaded("hf://owner/name")
