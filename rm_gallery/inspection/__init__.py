"""What the model reads: statistics, duplicates, baselines and samples of preference data, as a report."""
