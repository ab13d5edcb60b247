"""RM-Gallery: train Bradley-Terry reward models and use what was trained."""

__version__ = "0.1.0"
