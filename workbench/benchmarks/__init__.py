"""Timings of engines, comparisons and views. Nothing in the product imports this package."""
