"""What a run did to each expert, module by module: read, summed up, and shown on one page.

Example::

    from epmq_gptq.publish.report import read_report, report_page

    report = read_report("out/merged-4bit")
    Path("report.html").write_text(report_page(report), encoding="utf-8")
"""

from .figures import report_figures
from .page import report_page
from .retention import Retention, read_retention
from .run import ExpertFigures, ModuleFigures, RunReport, check_baseline, read_report

__all__ = [
    "ExpertFigures",
    "ModuleFigures",
    "Retention",
    "RunReport",
    "check_baseline",
    "read_report",
    "read_retention",
    "report_figures",
    "report_page",
]
