"""Token cache: the files of one side as token arrays on disk, built once and memory-mapped."""
