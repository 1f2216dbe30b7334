"""Metrics over whole volumes, as torchmetrics `Metric` subclasses."""

from lightning_modules.metrics.cases import CaseMetrics
from lightning_modules.metrics.lesions import LesionMetrics, LesionReport
from lightning_modules.metrics.regions import RegionMetrics

__all__ = ["CaseMetrics", "LesionMetrics", "LesionReport", "RegionMetrics"]
