"""Tokenization: groups become token ids, with the common prefix of their texts stored once."""
