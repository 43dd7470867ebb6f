"""LMDeploy's engines behind the workbench's interface."""
