import workbench  # noqa: F401, before Transformers: it prepares the import of torchvision
