if __name__ != "scaphoid.export.edge":
    raise ImportError("import this package as scaphoid.export.edge (install the project with: pip install -e .)")
