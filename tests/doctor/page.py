"""The table of docs/doctor.md, from the cases of the tests: what the doctor says, and what to do.

python -m tests.doctor.page        # writes it
"""

from pathlib import Path

from moesys.doctor.finding import Finding
from tests.doctor.cluster_cases import CLUSTER_CASES
from tests.doctor.local_cases import CASES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "doctor.md"
BEGIN, END = "<!-- table: {} -->", "<!-- end -->"
TABLES = {"of one machine": CASES, "of a cluster": CLUSTER_CASES}


def row(finding: Finding) -> str:
    cells = (finding.name, finding.level, finding.detail, finding.fix)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(name: str) -> str:
    findings = [f for case in TABLES[name] for f in case.findings if f.level != "ok"]
    rows = dict.fromkeys(row(finding) for finding in findings)
    return "\n".join(["| finding | level | for example | fix |", "|---|---|---|---|", *rows])


def filled(page: str) -> str:
    for name in TABLES:
        before, begin, rest = page.partition(BEGIN.format(name))
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"{PAGE.name} has no place {BEGIN.format(name)} ... {END}")
        page = f"{before}{begin}\n\n{table(name)}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
