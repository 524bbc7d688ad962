"""docs/licences.md: the licence of every package in requirements-lock.txt, in its publisher's own words. What the page
says above its table is written by hand, and kept.

make licences
"""

import email
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from email.message import Message
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK, TABLE = ROOT / "requirements-lock.txt", ROOT / "docs/licences.md"
COPYLEFT = re.compile(r"\b[AL]?GPL|General Public|MPL|Mozilla|EPL|EUPL|CDDL|CC-BY-SA", re.IGNORECASE)
UNKNOWN = "not stated"


def locked() -> dict[str, list[str]]:
    """name -> its versions; the lock says which Python gets which."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(), re.MULTILINE):
        found.setdefault(name, []).append(version)
    return found


def licence_of(metadata: Message, licence_file: str) -> str:
    """SPDX where the publisher gives it, otherwise the classifiers, otherwise the first line of the free text or of the
    file that comes along."""
    classifiers = [line for line in metadata.get_all("Classifier", []) if line.startswith("License :: ")]
    named = sorted(line.rpartition(" :: ")[2] for line in classifiers if not line.endswith("OSI Approved"))
    texts = [(metadata["License"] or "").replace("UNKNOWN", ""), licence_file]
    first_lines = [text.strip().splitlines()[0].strip() for text in texts if text.strip()]
    return metadata["License-Expression"] or ", ".join(named) or [*first_lines, UNKNOWN][0]


def installed(name: str) -> str | None:
    """The licence of a package of this environment; None where it is not for this Python or system."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    files = [file for file in package.files or [] if re.search(r"info/.*LICEN[CS]E", str(file))]
    return licence_of(package.metadata, files[0].read_text() if files else "")  # type: ignore[arg-type]


def published(requirements: list[str]) -> dict[str, str]:
    """The licences of packages that are not installed, out of their wheels."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        command = ["download", "--quiet", "--no-deps", "--ignore-requires-python", "--only-binary", ":all:"]
        if requirements:
            subprocess.run([sys.executable, "-m", "pip", *command, "--dest", folder, *requirements], check=True)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
                metadata = email.message_from_bytes(archive.read(name))
            found[canonicalize_name(metadata["Name"])] = licence_of(metadata, "")
    return found


def main() -> None:
    packages = locked()
    here = {name: installed(name) for name in packages}
    others = published([f"{name}=={packages[name][-1]}" for name, licence in here.items() if licence is None])
    licences = {name: licence or others[name] for name, licence in here.items()}
    rows = [f"| {name} | {', '.join(packages[name])} | {licences[name]} |" for name in sorted(packages)]
    said = TABLE.read_text().partition("| package |")[0]
    TABLE.write_text(said + "\n".join(["| package | version | licence |", "|---|---|---|", *rows]) + "\n")
    for name, licence in sorted(licences.items()):
        if (COPYLEFT.search(licence) or licence == UNKNOWN) and f"**{name}**" not in said:
            print(f"{name}: {licence}; {TABLE.relative_to(ROOT)} should say above its table what that means")


if __name__ == "__main__":
    main()
