"""The processes of a run: how they meet, how the failure of one ends the others, and what a run wants of its CPU."""
