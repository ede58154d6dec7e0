"""Kernels: what denoises. Imported as `treesearch.backends`, in a checkout too."""

if __name__ != "treesearch.backends":
    raise ImportError("import treesearch.backends: the folder has one name, whether installed or not")
