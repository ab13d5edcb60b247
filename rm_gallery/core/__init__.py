"""Using models: chat models, graders, the batch runner. Importing it loads neither torch nor a client library."""
