if __name__ != "scaphoid.triton_repo":
    raise ImportError("import this package as scaphoid.triton_repo (install the project with: pip install -e .)")
