"""The report: one HTML file to review CAMs with."""

from seg3dcam.review.report.page import Report, notebook_view, save_report

__all__ = ["Report", "notebook_view", "save_report"]
