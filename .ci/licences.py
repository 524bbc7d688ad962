"""docs/licences.md: the licence of every package in requirements-lock.txt, in its publisher's own words.

make licences
"""

import email.message
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK, TABLE = ROOT / "requirements-lock.txt", ROOT / "docs/licences.md"
COPYLEFT = re.compile(r"\b[AL]?GPL|General Public|MPL|Mozilla|EPL|EUPL|CDDL|CC-BY-SA", re.I)
UNKNOWN = "not stated"


def locked() -> dict[str, list[str]]:
    """name -> its versions; which of them a Python or a system gets, the lock says."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(), re.M):
        found.setdefault(name, []).append(version)
    return found


def licence_of(metadata: dict[str, list[str]]) -> str:
    """SPDX where the publisher gives it, otherwise the classifiers, otherwise the first line of the free text."""
    expression, text = (metadata.get(key, [""])[0].strip() for key in ("license_expression", "license"))
    classifiers = [line for line in metadata.get("classifier", []) if line.startswith("License :: ")]
    named = [line.rpartition(" :: ")[2] for line in classifiers if not line.endswith("OSI Approved")]
    first = text.splitlines()[0][:60] if text and text.upper() != "UNKNOWN" else ""
    return expression or ", ".join(sorted(named)) or first or UNKNOWN


def installed(name: str) -> dict[str, list[str]] | None:
    """What the package says of itself in this environment; None where it is not for this Python or system."""
    try:
        message: email.message.Message = importlib.metadata.metadata(name)  # type: ignore[assignment]
    except importlib.metadata.PackageNotFoundError:
        return None
    found: dict[str, list[str]] = {}
    for key, value in message.items():
        found.setdefault(key.lower().replace("-", "_"), []).append(str(value))
    return found


def published(requirements: list[str]) -> dict[str, dict[str, list[str]]]:
    """The same of packages that are not installed, as their index has it."""
    if not requirements:
        return {}
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps",
        "--ignore-requires-python", "--report", "-", *requirements,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = {}
    for package in json.loads(done.stdout)["install"]:
        metadata = package["metadata"]
        lists = {key: value if isinstance(value, list) else [str(value)] for key, value in metadata.items()}
        found[canonicalize_name(metadata["name"])] = lists
    return found


def main() -> None:
    packages = locked()
    known = {name: installed(name) for name in packages}
    others = published([f"{name}=={packages[name][-1]}" for name, metadata in known.items() if metadata is None])
    licences = {name: licence_of(metadata or others[name]) for name, metadata in known.items()}
    lines = [f"| {name} | {', '.join(packages[name])} | {licences[name]} |" for name in sorted(packages)]
    page = TABLE.read_text()
    head = page[: page.index("| package |")]
    TABLE.write_text(head + "\n".join(["| package | versions | licence |", "|---|---|---|", *lines]) + "\n")
    for name in sorted(packages):
        if COPYLEFT.search(licences[name]) or licences[name] == UNKNOWN:
            print(f"{name}: {licences[name]}" + ("" if f"**{name}**" in head else f"; say in {TABLE.name} what of it"))


if __name__ == "__main__":
    main()
