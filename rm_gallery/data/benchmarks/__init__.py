"""Published benchmarks: how their rows are read (published.py), and their scores from rewards (scores.py)."""
