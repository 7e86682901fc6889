"""Packages of Debian's archive, fetched into a directory of one's own: the system's own packages stay as they are."""

import os
import subprocess
from pathlib import Path


def run(command: list[str | Path], **options: object) -> None:
    """Run a command; what it printed is the error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")


def lists(directory: Path, **settings: str | Path) -> dict[str, str]:
    """Fetch the lists of packages; return the environment in which apt knows of nothing but `directory`.

    Parameters
    ----------
    directory : Path
        Where apt keeps what it fetches; packages are in ``cache/archives``.
    **settings
        Options of apt, two underscores for each double colon.
    """
    for each in ("state/lists/partial", "cache/archives/partial"):
        (directory / each).mkdir(parents=True, exist_ok=True)
    (directory / "status").touch()
    options = {
        "APT__Install-Recommends": "0",
        "APT__Sandbox__User": "root",
        "Dir__State": directory / "state",
        "Dir__State__status": directory / "status",
        "Dir__Cache": directory / "cache",
        **settings,
    }
    config = directory / "config"
    config.write_text("".join(f'{name.replace("__", "::")} "{value}";\n' for name, value in options.items()))
    environment = {**os.environ, "APT_CONFIG": str(config)}
    run(["apt-get", "update", "-qq"], env=environment)
    return environment
