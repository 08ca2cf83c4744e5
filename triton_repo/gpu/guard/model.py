"""The guard of the GPU repository, for the vendor's Python backend: an image that is fit to be decoded goes on as it
came, any other is answered with INVALID_ARGUMENT and the reason.

Assembling copies what it imports of this package beside it: of the vendor's image it needs Python and numpy alone.
"""

import sys
from pathlib import Path

import triton_python_backend_utils as pb_utils

sys.dont_write_bytecode = True  # the manifest lists what is here
sys.path.insert(0, str(Path(__file__).parent))  # and these copies run, whatever else is installed

from scaphoid.trainer.data.guard import RejectedImage, check_encoded  # noqa: E402
from scaphoid.triton_repo.supervisor.request_log import refused  # noqa: E402

MODEL = Path(__file__).parents[1].name


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        (encoded,) = request.inputs()
        if reason := why_not(memoryview(encoded.as_numpy()[0])):
            pb_utils.Logger.log_warn(refused(request.request_id(), MODEL, "INVALID_ARGUMENT"))
            error = pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse([encoded])  # itself: its bytes are not copied


def why_not(encoded: memoryview) -> str:
    """Empty for an image that is fit to be decoded."""
    try:
        check_encoded(encoded)
    except RejectedImage as rejected:
        return rejected.reason
    except Exception as error:  # whatever the guard trips over fails alone; the message may quote the file
        return f"cannot be read ({type(error).__name__})"
    return ""
