"""What a model will see: statistics, duplicates, baselines and samples of preference data, as a report."""
