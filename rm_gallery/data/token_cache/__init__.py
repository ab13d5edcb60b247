"""Token cache: the files of one side as token arrays on disk, made once and mapped into memory."""
