"""What a run did to each expert, module by module: read, summed up, and shown on one page.

Example::

    from epmq_gptq.publish.page import read_report, report_page

    report = read_report("out/merged-4bit")
    Path("report.html").write_text(report_page(report), encoding="utf-8")
"""

from ...run_report import read_report
from .figures import report_figures
from .render import report_page
from .retention import Retention, read_retention
from .sources import check_baseline

__all__ = [
    "Retention",
    "check_baseline",
    "read_report",
    "read_retention",
    "report_figures",
    "report_page",
]
