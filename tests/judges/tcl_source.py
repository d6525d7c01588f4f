"""Redis's own Tcl suite, brought by package name.

The suite is in the source package `redis` of Debian. It is taken through apt as this machine has it
configured, with lists and cache of our own, so that the machine's package sources stay as they are.
What is unpacked is not changed; only redis-cli and redis-benchmark are put where the suite looks
for them.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGE = "redis"
# The newest of the series that the list of direct passes was made with.
SERIES = "7.0."
PROGRAMS = ("redis-cli", "redis-benchmark")
# A list of a whole distribution and three megabytes; slower is a broken line.
FETCH_LIMIT = 600


class Missing(Exception):
    """Something that must be on the machine is not; says how to get it."""


def ensure(cache: Path) -> Path:
    """The unpacked source with the programs in place; fetched once into `cache`."""
    for program in ("tclsh", *PROGRAMS):
        if shutil.which(program) is None:
            package = {"tclsh": "tcl"}.get(program, "redis-tools")
            raise Missing(f"{program} is missing: apt-get install {package}")
    tree = find(cache) or fetch(cache)
    for program in PROGRAMS:
        place = tree / "src" / program
        if not place.exists():
            place.symlink_to(shutil.which(program))
    return tree


def private_copy(tree: Path, place: Path) -> Path:
    """A tree for one run: the suite writes beside its tests, and two runs would delete each other's."""
    shutil.copytree(tree / "tests", place / "tests", symlinks=True)
    (place / "src").symlink_to(tree.resolve() / "src")
    return place


def find(cache: Path):
    trees = [t for t in cache.glob(f"{PACKAGE}-{SERIES}*") if (t / "tests/test_helper.tcl").is_file()]
    return max(trees, default=None)


def fetch(cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    # Unpacked beside the result: the last step is one rename, and a half-done one is never found.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as work:
        work = Path(work)
        options = own_lists(work)
        run(["apt-get", "-q", *options, "update"], work)
        run(["apt-get", "-q", *options, "source", newest(options)], work)
        found = find(work)
        if found is None:
            raise Missing(f"the package source {PACKAGE} has no tests of series {SERIES}x")
        place = cache / found.name
        os.rename(found, place)
        return place


def own_lists(work: Path) -> list:
    """apt options for lists of sources only, made of the machine's own entries."""
    parts, lists = work / "parts", work / "lists/partial"
    for directory in (parts, lists, work / "cache/archives/partial"):
        directory.mkdir(parents=True)
    etc = Path("/etc/apt")
    for file in sorted(etc.glob("sources.list.d/*.sources")):
        text = re.sub(r"(?m)^Types:.*$", "Types: deb-src", file.read_text())
        (parts / file.name).write_text(text)
    for file in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        if file.is_file():
            lines = [line for line in file.read_text().splitlines() if line.startswith("deb ")]
            text = "".join(re.sub(r"^deb ", "deb-src ", line) + "\n" for line in lines)
            (parts / f"{file.stem}.list").write_text(text)
    settings = {
        "Dir::Etc::sourcelist": "/nonexistent",
        "Dir::Etc::sourceparts": parts,
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        # The directory belongs to us, not to apt's own user.
        "APT::Sandbox::User": "root",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def newest(options: list) -> str:
    """`redis=VERSION` of the series; other suites may offer newer ones."""
    shown = subprocess.run(
        ["apt-cache", *options, "showsrc", PACKAGE], capture_output=True, text=True, check=False
    )
    versions = [v for v in re.findall(r"(?m)^Version: (\S+)$", shown.stdout) if f":{SERIES}" in v]
    if not versions:
        raise Missing(f"no source package {PACKAGE} of series {SERIES}x in this machine's apt sources")
    best = versions[0]
    for version in versions[1:]:
        newer = subprocess.run(["dpkg", "--compare-versions", version, "gt", best], check=False)
        best = version if newer.returncode == 0 else best
    return f"{PACKAGE}={best}"


def run(command: list, directory: Path):
    done = subprocess.run(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=FETCH_LIMIT,
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-6:])
        raise Missing(f"{' '.join(command[:1] + command[-2:])}:\n{tail}")
