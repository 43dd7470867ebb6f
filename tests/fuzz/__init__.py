"""Fuzzing of everything that reads files, answers or settings which others made."""
