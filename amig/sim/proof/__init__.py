"""What can happen to a page: a model of log, writers, users and pipeline, and a search of all interleavings."""
