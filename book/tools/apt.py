"""Install a Debian or Ubuntu package where that can be done without asking anybody: as root, or by a sudo that asks no password."""

import os
import shutil
import subprocess
import sys


def apt_prefix() -> list[str] | None:
    """The words before apt-get, or None where it may not be used."""
    if not shutil.which("apt-get"):
        return None
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True).returncode == 0:
        return [sudo, "-n"]
    return None


def apt_install(*packages: str) -> bool:
    """Install packages; True when apt-get says they are there. The index is refreshed only when they are not found without."""
    prefix = apt_prefix()
    if prefix is None:
        return False
    print(f"Installing {' '.join(packages)} with apt-get", file=sys.stderr)
    apt = [
        *prefix,
        "env",
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "-qq",
        "-o",
        "DPkg::Lock::Timeout=120",
    ]

    def run(*words: str) -> bool:
        return (
            subprocess.run([*apt, *words], stdin=subprocess.DEVNULL, capture_output=True).returncode
            == 0
        )

    install = ("install", "-y", "--no-install-recommends", *packages)
    return run(*install) or (run("update") and run(*install))
