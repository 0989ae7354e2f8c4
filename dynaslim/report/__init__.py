"""Reports on runs as HTML pages, and the demo's figure."""

from dynaslim.recipes import ReportOptions
from dynaslim.report.page import Report, build_report, make_report

__all__ = ["Report", "ReportOptions", "build_report", "make_report"]
