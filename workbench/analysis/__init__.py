"""Arrays computed from traces, for plots and views; nothing in this package draws."""
