"""Aggregators: one result of the results that several graders gave for one sample."""

from rm_gallery.core.runner.aggregator.base_aggregator import BaseAggregator
from rm_gallery.core.runner.aggregator.weighted_sum_aggregator import WeightedSumAggregator

__all__ = ["BaseAggregator", "WeightedSumAggregator"]
