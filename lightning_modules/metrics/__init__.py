"""Scores of whole volumes; `CaseMetrics` is what the scores of every task have in common."""

from lightning_modules.metrics.cases import CaseMetrics, MeanOverCases
from lightning_modules.metrics.lesions import LesionMetrics, LesionReport
from lightning_modules.metrics.regions import RegionMetrics

__all__ = ["CaseMetrics", "LesionMetrics", "LesionReport", "MeanOverCases", "RegionMetrics"]
