"""How good answers are: each metric is one small class, and :func:`score` computes all that apply."""

from luthier.evaluation.metrics.base import MeanMetric, Metric, References, Rows, check_rows
from luthier.evaluation.metrics.corpus import SignedScore, bleu, chrf
from luthier.evaluation.metrics.functions import FunctionMetric
from luthier.evaluation.metrics.overlap import ROUGE, exact_match, is_exact, rouge, rouge_l
from luthier.evaluation.metrics.records import is_json, is_json_exact, json_exact, json_valid, parse_object
from luthier.evaluation.metrics.registry import METRICS, ON_REQUEST, metric_of, metrics_for, require_metrics, score
from luthier.evaluation.metrics.tools import tool_calls

__all__ = [
    "METRICS",
    "ON_REQUEST",
    "ROUGE",
    "FunctionMetric",
    "MeanMetric",
    "Metric",
    "References",
    "Rows",
    "SignedScore",
    "bleu",
    "check_rows",
    "chrf",
    "exact_match",
    "is_exact",
    "is_json",
    "is_json_exact",
    "json_exact",
    "json_valid",
    "metric_of",
    "metrics_for",
    "parse_object",
    "require_metrics",
    "rouge",
    "rouge_l",
    "score",
    "tool_calls",
]
