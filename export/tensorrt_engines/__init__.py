if __name__ != "scaphoid.export.tensorrt_engines":
    raise ImportError(
        "import this package as scaphoid.export.tensorrt_engines (install the project with: pip install -e .)"
    )
