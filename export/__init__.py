if __name__ != "scaphoid.export":
    raise ImportError("import this package as scaphoid.export (install the project with: pip install -e .)")
