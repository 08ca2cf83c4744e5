if __name__ != "scaphoid.bench":
    raise ImportError("import this package as scaphoid.bench (install the project with: pip install -e .)")
