"""Reports on runs: an HTML page, and the demo's picture."""

from dynaslim.report.data import ReportOptions
from dynaslim.report.page import Report, build_report, make_report

__all__ = ["Report", "ReportOptions", "build_report", "make_report"]
