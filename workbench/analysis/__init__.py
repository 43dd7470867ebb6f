"""Arrays computed from traces: what the plots and views show. Nothing here draws."""
