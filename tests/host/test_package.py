"""The Debian package is built here, and has what it must have. scripts/try-deb installs it (docs/packages.md)."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.harness import run

TOP = Path(__file__).parents[2]
DOC = "./usr/share/doc/storaged"
#: Build and trial take 60 seconds of processor time, of which CI, with three lanes for two processors, has given them a
#: fifth of what they could use. The limit is for what hangs.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, which lintian has found no error in."""
    place = tmp_path_factory.mktemp("package")
    tree = place / "storaged"
    tree.mkdir()
    # What git knows or would take, so that a change is tested before it is committed.
    files = run("git", "-C", TOP, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    present = "\0".join(name for name in files.split("\0") if name and (TOP / name).exists())
    run("tar", "-c", "-C", TOP, "--null", "-T", "-", "-f", place / "tree.tar", stdin=present)
    run("tar", "-x", "-C", tree, "-f", place / "tree.tar")
    with open(place / "made.tar", "wb") as made, open(place / "log", "wb") as log:
        done = subprocess.run(
            ["scripts/deb", "--inside", "bookworm", "0.1.0+test"], cwd=tree, stdout=made, stderr=log, timeout=600,
            # How pip reaches its packages may be in the environment. A quarter of the build would be to compress well.
            env={
                **os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SOURCE_DATE_EPOCH": "1769817600",
                "DPKG_DEB_COMPRESSOR_LEVEL": "1",
            },
        )
    assert done.returncode == 0, (place / "log").read_text()[-3000:]
    run("tar", "-x", "-C", place, "-f", place / "made.tar")
    (made_package,) = place.glob("*.deb")
    return made_package


def test_a_fresh_root_is_given_its_first_volume_an_upgrade_and_a_purge(package: Path) -> None:
    # What the package depends on comes from Debian's archive alone. Another Debian would need another package.
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    with open(package, "rb") as file, tarfile.open(package.parent / "package.tar", "w") as archive:
        member = archive.gettarinfo(fileobj=file, arcname=package.name)
        archive.addfile(member, file)
    with open(package.parent / "package.tar", "rb") as archive_file:
        done = subprocess.run(
            [TOP / "scripts/in-fresh-root", codename, "scripts/try-deb", "--inside"], stdin=archive_file,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800, check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "try-deb: installed, upgraded, removed and purged" in done.stdout


def test_the_package_has_the_program_its_pages_completions_units_and_configuration(package: Path) -> None:
    listed = run("dpkg-deb", "-c", package).stdout
    files = {line.split()[5]: line.split()[0] for line in listed.splitlines()}
    for name in (
        "./etc/storaged/storaged.toml", "./usr/lib/sysusers.d/storaged.conf", f"{DOC}/README.md",
        f"{DOC}/vendored.txt", f"{DOC}/copyright", f"{DOC}/backends/nbd.md",
        "./usr/share/man/man1/storaged.1.gz", "./usr/share/man/man5/storaged.toml.5.gz",
        "./usr/share/man/man7/storaged-sources.7.gz", "./usr/share/man/man8/storaged.8.gz",
        "./usr/share/bash-completion/completions/storaged", "./usr/share/zsh/vendor-completions/_storaged",
        "./usr/share/fish/vendor_completions.d/storaged.fish", "./usr/lib/systemd/catalog/storaged.catalog",
    ):
        assert files[name] == "-rw-r--r--", name
    assert files["./usr/bin/storaged"] == "-rwxr-xr-x"
    names = {name.rpartition("/")[2] for name in files}
    units = [path.name for path in (TOP / "systemd").iterdir() if path.suffix in (".service", ".socket", ".slice")]
    assert {*units, "60-storaged.rules"} <= names
    assert not [name for name in files if "__pycache__" in name]


def test_what_is_not_in_the_package_is_a_dependency(package: Path) -> None:
    depends = run("dpkg-deb", "-f", package, "Depends").stdout
    for name in ("python3-libnbd", "kmod", "qemu-utils"):
        assert re.search(rf"\b{name}\b", depends)
    assert re.search(r"python3 \(>= 3\.\d+~\), python3 \(<< 3\.\d+\)", depends)
    have = re.findall(r"site-packages/([^/]+)-[\d.]+\.dist-info/$", run("dpkg-deb", "-c", package).stdout, re.MULTILINE)
    vendored = {re.sub(r"[-_.]+", "-", name).lower() for name in have}
    required = (TOP / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    asked = re.findall(r'^    "([\w.-]+)>=', required, re.MULTILINE)
    assert len(asked) > 5
    for name in (re.sub(r"[-_.]+", "-", name).lower() for name in asked):
        debian = {f"python3-{name}", f"python3-{name.removeprefix('py')}"}  # pyyaml is python3-yaml
        assert name in vendored or debian & set(re.findall(r"python3-[\w.-]+", depends)), name


def test_the_configuration_of_the_package_lets_its_group_in(package: Path, tmp_path: Path) -> None:
    run("dpkg-deb", "-x", package, tmp_path)
    text = (tmp_path / "etc/storaged/storaged.toml").read_text()
    assert re.search(r'^socket_group = "storaged"$', text, re.MULTILINE)
    assert (tmp_path / "usr/lib/sysusers.d/storaged.conf").read_text().endswith("\ng storaged -\n")


def test_an_upgrade_restarts_the_daemon_and_stops_nothing(package: Path, tmp_path: Path) -> None:
    run("dpkg-deb", "-e", package, tmp_path / "control")
    scripts = {name: (tmp_path / "control" / name).read_text() for name in ("postinst", "prerm", "postrm")}
    acts = [line.split() for text in scripts.values() for line in text.splitlines() if "deb-systemd-invoke" in line]
    assert [words[2] for words in acts if words[1] == "restart"] == ["storaged.service"]
    assert all("stop" not in words for line in scripts["postinst"].splitlines() if (words := line.split()))
    # All that stops is in the branch of a removal, behind the refusal.
    removal = scripts["prerm"].partition("remove)")[2].partition(";;")[0]
    assert removal.index("exit 1") < removal.index("invoke stop")
    assert scripts["prerm"].count("invoke stop") == 1
