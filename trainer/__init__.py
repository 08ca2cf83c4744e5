if __name__ != "scaphoid.trainer":
    raise ImportError("import this package as scaphoid.trainer (install the project with: pip install -e .)")
