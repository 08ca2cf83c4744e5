if __name__ != "scaphoid.kernels":
    raise ImportError("import this package as scaphoid.kernels (install the project with: pip install -e .)")
