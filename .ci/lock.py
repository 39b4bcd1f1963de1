"""Write ``.ci/requirements.lock``: every package of the environment, with version and hashes, from pip's own resolution.

    python .ci/lock.py torch==2.14.1 torchvision==0.29.1

Hashes are of the files for this platform; ``make setup LOCKED=1`` installs exactly them.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".ci" / "requirements.lock"


def main() -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*command, *sys.argv[1:], "--editable", f"{ROOT}[dev]"], stdout=subprocess.PIPE, check=True)
    lines = []
    for item in json.loads(done.stdout)["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name != "forensics-lib":
            lines.append(f"{name.lower()}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")
    head = f"# Made by .ci/lock.py for {platform.system()} {platform.machine()}, Python {platform.python_version()}\n"
    LOCK.write_text(head + "\n".join(sorted(lines)) + "\n", encoding="utf-8")
    print(f"{len(lines)} packages in {LOCK}")


if __name__ == "__main__":
    main()
