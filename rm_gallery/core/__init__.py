"""Chat models, graders, the batch runner and the export. Importing it loads neither torch nor a client library."""
