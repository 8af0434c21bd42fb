"""Known weaknesses of the versions in a constraints file, by pip-audit; what could not be looked up
is said. Exits with 1 where there is a weakness, with 2 where a version could not be looked up."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

COMMAND = (
    "pip-audit",
    "--no-deps",
    "--disable-pip",
    "--progress-spinner",
    "off",
    "--format",
    "json",
)


def say(sentence: str) -> None:
    sys.stdout.write(f"audit: {sentence}\n")


def main(file: str) -> int:
    done = subprocess.run(
        [*COMMAND, "--requirement", file], capture_output=True, text=True, check=False
    )
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        say(f"nothing could be looked up: {' '.join(done.stderr.split())[-300:]}")
        return 2
    weak = [one for one in found if one.get("vulns")]
    unknown = [one["name"] for one in found if "skip_reason" in one]
    for one in weak:
        for known in one["vulns"]:
            mended = ", ".join(known["fix_versions"]) or "no version"
            say(f"{one['name']} {one['version']} has {known['id']}, mended in {mended}")
    looked = len(found) - len(unknown)
    say(f"{looked} of {len(found)} versions looked up, {len(weak)} with weaknesses")
    if unknown:
        say(f"no database at hand knows {', '.join(unknown)}: nothing is known of these")
    return 1 if weak else 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
