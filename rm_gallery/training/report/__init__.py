"""Reports of runs: `report.html` of a run directory, several runs side by side, and a live page."""
