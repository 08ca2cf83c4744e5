"""OpenVINO and NNCF report imports and conversions to their makers unless the user has declined in a file of the home
folder. Importing this before them declines for the process: nothing leaves a machine with radiographs."""

from contextlib import suppress

with suppress(ImportError):  # a client without an engine has nothing to decline
    from openvino_telemetry.utils.opt_in_checker import ConsentCheckResult, OptInChecker

    OptInChecker.check = lambda *_, **__: ConsentCheckResult.DECLINED
