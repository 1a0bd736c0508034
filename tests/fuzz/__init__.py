"""Coverage-guided fuzzing of everything that takes bytes from outside; docs/fuzzing.md says how to run it."""
