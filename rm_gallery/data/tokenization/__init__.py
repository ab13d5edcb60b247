"""Tokenization: a `PreferenceGroup` becomes a `TokenGroup`, its texts as any server would tokenize them."""
