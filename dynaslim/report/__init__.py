"""Reports on runs: an HTML page, and the demo's picture."""

from dynaslim.recipes import ReportOptions
from dynaslim.report.page import Report, build_report, make_report

__all__ = ["Report", "ReportOptions", "build_report", "make_report"]
