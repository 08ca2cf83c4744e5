"""What the client raises. Every error names the request and says whose fault it was, as far as known."""


class ClientError(Exception):
    """A request without an answer. `request_id` is what the server's trace and logs call it; empty before sending."""

    def __init__(self, message: str, request_id: str = "") -> None:
        super().__init__(message)
        self.request_id = request_id


class ServerUnavailable(ClientError):
    """No server can be reached, is ready and serves the flow: no request can succeed."""


class RequestRejected(ClientError):
    """The image is at fault, by the guard here or by the server (INVALID_ARGUMENT): sending it again cannot help."""


class RequestFailed(ClientError):
    """Not the image's fault as far as known (engine error, full queue): it was tried again and failed again."""


class DeadlineExceeded(RequestFailed):
    """No answer within the caller's time. The request may still be computed: it is never cancelled."""


class Quarantined(ClientError):
    """These very bytes failed every time while the server answered others: they were not sent."""
