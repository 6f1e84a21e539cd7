"""usage: dependencies.py SUBSTVARS RELEASE, with the python of the environment.

Says on what the package depends: the Debian packages that have those requirements which are not in the environment, in
the versions that were asked for. And writes debian/vendored.txt, about those that are.
"""

import re
import subprocess
import sys
from importlib.metadata import Distribution, distribution


def requirements(dist: Distribution) -> list[tuple[str, str]]:
    """Name and least version ("" for any) of what a distribution requires here."""
    from pip._vendor.packaging.requirements import Requirement

    found = []
    for line in dist.requires or []:
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            found.append((need.name, next((str(spec.version) for spec in need.specifier if spec.operator == ">="), "")))
    return found


def licence(dist: Distribution) -> str:
    """As its authors say it."""
    said = dist.metadata.get("License-Expression") or dist.metadata.get("License") or ""
    classified = [line.rpartition(":: ")[2] for line in dist.metadata.get_all("Classifier") or [] if "License" in line]
    return said if said and "\n" not in said else " or ".join(classified) or "see its directory"


def debian_package(dist: Distribution) -> str:
    """The package that installed it."""
    path = dist.locate_file(dist._path.name)  # it has no public name
    return subprocess.run(["dpkg", "-S", path], check=True, capture_output=True, text=True).stdout.partition(":")[0]


def main() -> None:
    """Write both files."""
    substvars, release = sys.argv[1:]
    minor = sys.version_info.minor
    # The compiled ones are for this version of Python only, and the environment names it.
    depends = [f"python3 (>= 3.{minor}~)", f"python3 (<< 3.{minor + 1})"]
    vendored = []
    todo, seen = [("storaged", "")], set()
    while todo:
        name, least = todo.pop(0)
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen:
            continue
        seen.add(key)
        dist = distribution(name)
        if str(dist.locate_file("")).startswith(sys.prefix):
            if key != "storaged":
                vendored.append(f"{dist.metadata['Name']} {dist.version} ({licence(dist)})")
            todo += requirements(dist)
        else:  # its own requirements are its package's
            depends.append(debian_package(dist) + (f" (>= {least})" if least else ""))
    with open("debian/vendored.txt", "w") as file:
        print("In /usr/lib/storaged/venv, because Debian has none that is recent enough:", "", *sorted(vendored),
              sep="\n", file=file)
    with open(substvars, "a") as file:
        print(f"python3:Depends={', '.join(depends)}", file=file)
        print(f"qsd:Depends={'qemu-system-common' if release == '12' else 'qemu-utils (>= 1:8)'}", file=file)
    print(*depends, *vendored, sep="\n")


main()
