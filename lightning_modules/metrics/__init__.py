"""Metrics over whole volumes, as torchmetrics `Metric` subclasses."""

from lightning_modules.metrics.lesions import LesionMetrics, LesionReport
from lightning_modules.metrics.regions import EvaluationMetrics, RegionMetrics

__all__ = ["EvaluationMetrics", "LesionMetrics", "LesionReport", "RegionMetrics"]
