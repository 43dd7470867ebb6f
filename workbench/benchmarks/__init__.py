"""Timings of engines, comparisons and views, and the calibration of the verdict. No other package imports this one."""
