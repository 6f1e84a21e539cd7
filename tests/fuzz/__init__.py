"""Fuzzing, guided by coverage, of everything that reads what others wrote: ``python -m tests.fuzz TARGET``."""
