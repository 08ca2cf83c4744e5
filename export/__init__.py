if __name__ != "scaphoid.export":
    raise ImportError("import this package as scaphoid.export (install the project with: pip install -e .)")
import scaphoid.export.no_telemetry  # noqa: F401 before any module of this package imports OpenVINO
