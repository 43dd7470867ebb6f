"""LMDeploy's two engines, TurboMind and PyTorch, behind the workbench's engine interface."""
