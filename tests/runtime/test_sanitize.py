"""Text of others is shown without the control characters that a terminal would obey."""

from __future__ import annotations

import re
from pathlib import Path

from lrcompress.reporting import report
from lrcompress.reporting.report import Report
from lrcompress.runtime.sanitize import printable
from tests.conftest import invoke, refusal
from tests.samples import DETAILS, METRICS, RECORD


def test_what_a_terminal_would_obey_is_shown(tmp_path: Path) -> None:
    assert printable("a\x1b[2J\u202eb\r\n 日本\u3000") == "a\\x1b[2J\\u202eb\\r\\n 日本\u3000"
    report.write(tmp_path, Report("title", METRICS, DETAILS, RECORD))
    file = tmp_path / "metrics.json"
    named = re.sub('"low"(?!:)', r'"low\\u001b]0;pwned\\u0007"', file.read_text())
    file.write_text(named)
    result = invoke("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert "low\\x1b]0;pwned\\x07" in result.stdout
    assert "\x1b" not in refusal("inspect", "./\x1b[2J")
