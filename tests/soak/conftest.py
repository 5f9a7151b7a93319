"""The table that `make soak` prints: what each promise was seen to hold, in figures."""

import pytest


@pytest.fixture
def figures(record_property):
    """figures("R1", {"kills": 50}): a row of the table; xdist carries it to the terminal."""

    def note(row, found):
        record_property(row, ", ".join(f"{key} {value}" for key, value in found.items()))

    return note


def pytest_terminal_summary(terminalreporter):
    rows = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for row, text in getattr(report, "user_properties", []):
                if report.when == "call":
                    rows.setdefault(row, []).append(text)
    terminalreporter.section("promises")
    for row in sorted(rows, key=lambda r: (int(r[1:].partition(" ")[0]), r)):
        terminalreporter.write_line(f"{row:4} {'; '.join(rows[row])}")
