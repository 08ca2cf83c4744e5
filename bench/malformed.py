"""Requests that no client should send, over HTTP and gRPC, each bounded.

What a server may do with one is refuse it, close the connection, or overlook what is wrong and give the right answer;
what it must not do is crash, hang, or let it touch another request. A request may be half sent and left; none is left
that the server has begun to compute.
"""

import gzip
import json
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from tritonclient.grpc import InferResult, service_pb2

TIMEOUT_S = 60.0  # far beyond what an answer takes
LEFT_AFTER_S = 0.5  # a request that the server waits for the rest of
JSON_DEPTH = 2_000
JSON_MEBIBYTES = 8


@dataclass(frozen=True)
class Refusal:
    """What came back: the `reason` of an error, empty where the server gave none; or a `probability`."""

    what: str
    reason: str = ""
    probability: float | None = None


@dataclass(frozen=True)
class Target:
    """A server's addresses and a flow that it serves, with a sound image for it."""

    http: str
    grpc: str
    flow: str
    encoded: bytes


def malformed(target: Target, seed: int) -> Refusal:
    """Send the malformed request of this number, and wait for what comes back. Raises OSError when the server cannot
    be reached."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        make = rng.choice(HTTP_REQUESTS)
        unfinished = make in UNFINISHED
        return _over_http(target, make.__name__, make(target, rng), LEFT_AFTER_S if unfinished else TIMEOUT_S)
    make = rng.choice(GRPC_REQUESTS)
    return _over_grpc(target, make.__name__, make(target, rng))


def _over_http(target: Target, what: str, request: bytes, timeout_s: float) -> Refusal:
    host, _, port = target.http.rpartition(":")
    received, late = b"", False
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        try:
            connection.sendall(request)
            while len(received) < 2**20 and (block := connection.recv(65536)):
                received += block
        except TimeoutError:
            late = True
        except ConnectionError:
            pass  # refused by closing
    head, _, body = received.partition(b"\r\n\r\n")
    if not head:
        reason = "connection closed" if not late else "left" if timeout_s == LEFT_AFTER_S else ""
        return Refusal(f"http {what}", reason)
    try:
        answer = json.loads(body)
        if outputs := answer.get("outputs"):
            return Refusal(f"http {what}", probability=float(outputs[0]["data"][0]))
        return Refusal(f"http {what}", str(answer["error"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return Refusal(f"http {what}", head.splitlines()[0].decode(errors="replace"))


def _over_grpc(target: Target, what: str, message: bytes) -> Refusal:
    with grpc.insecure_channel(target.grpc, options=[("grpc.max_send_message_length", -1)]) as channel:
        try:
            answer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return Refusal(f"grpc {what}")
            return Refusal(f"grpc {what}", f"{error.code().name}: {error.details()}")
    found = InferResult(service_pb2.ModelInferResponse.FromString(answer)).as_numpy("probability")
    return Refusal(f"grpc {what}", probability=None if found is None else float(found.ravel()[0]))


def _post(target: Target, body: bytes, headers: dict[str, object] | None = None, path: str = "") -> bytes:
    lines = {"Host": target.http, "Content-Length": len(body), "Connection": "close"} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path or f'/v2/models/{target.flow}/infer'} HTTP/1.1\r\n{head}\r\n".encode() + body


def _json_body(target: Target, **changes: object) -> bytes:
    """A sound request as JSON, but for what changes in its input."""
    given = {"name": "encoded", "datatype": "UINT8", "shape": [1, len(target.encoded)], "data": list(target.encoded)}
    return json.dumps({"inputs": [given | changes], "outputs": [{"name": "probability"}]}).encode()


def http_garbage(target: Target, rng: random.Random) -> bytes:
    return rng.choice(
        (rng.randbytes(500), b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 1000, b"\x16\x03\x01" + rng.randbytes(200))
    )


def http_body_of_garbage(target: Target, rng: random.Random) -> bytes:
    return _post(target, rng.choice((b"", b"{", b"null", b"[]", b'"x"', b"{}", rng.randbytes(1000), b"\xff\xfe{}")))


def http_json_nested(target: Target, rng: random.Random) -> bytes:
    depth = rng.choice((100, JSON_DEPTH))
    return _post(target, b'{"inputs":' * depth + b"[" * depth + b"]" * depth + b"}" * depth)


def http_json_long(target: Target, rng: random.Random) -> bytes:
    filler = json.dumps({"x" * rng.randrange(1, 2000): "y" * (JSON_MEBIBYTES << 20)}).encode()
    return _post(
        target, rng.choice((filler, b'{"inputs":[' + b"{}," * 200_000 + b"{}]}", b"[" + b"1," * 10**6 + b"1]"))
    )


def http_wrong_value(target: Target, rng: random.Random) -> bytes:
    length = len(target.encoded)
    change = rng.choice(
        (
            {"name": rng.choice(("", "image", "encoded\0", "x" * 10_000, None, 7, ["encoded"]))},
            {"datatype": rng.choice(("FP32", "INT8", "BYTES", "UINT9", "", None, 3, "BOOL", "FP64"))},
            {
                "shape": rng.choice(
                    ([length], [1, length + 1], [2, length], [9, length], [1, -1], [0, 0], [], [1, 2**62])
                )
            },
            {
                "shape": rng.choice(
                    ([1, 2**62], [2**32, 2**32], [1, 1, length], "x", [1.5, 2], None, [-1, length], [1] * 1000)
                )
            },
            {"data": rng.choice(([], [300] * length, [-1] * length, ["x"] * length, [[0]], None, {}, [1.5] * length))},
            {"parameters": {"shared_memory_region": "../../etc/passwd", "shared_memory_byte_size": 100}},
            {"parameters": {"binary_data_size": rng.choice((-1, 0, 2**40, 2**63, "x"))}},
        )
    )
    return _post(target, _json_body(target, **change))


def http_wrong_request(target: Target, rng: random.Random) -> bytes:
    body = json.loads(_json_body(target))
    change = rng.choice(
        (
            {"outputs": [{"name": "nothing"}]},
            {"outputs": rng.choice(("x", [7], [{}], [{"name": None}]))},
            {"outputs": [{"name": "probability", "parameters": {"shared_memory_region": "none"}}]},
            {"inputs": []},
            {"inputs": body["inputs"] * 2},
            {"id": rng.choice((7, [], {"a": 1}))},
            {"parameters": rng.choice(("x", {"sequence_id": [1]}, {"priority": -1}, {"timeout": "x"}))},
        )
    )
    return _post(target, json.dumps(body | change).encode())


def http_wrong_lengths(target: Target, rng: random.Random) -> bytes:
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "encoded",
                    "datatype": "UINT8",
                    "shape": [1, len(target.encoded)],
                    "parameters": {"binary_data_size": len(target.encoded) + rng.choice((-1, 1, 1000, 2**31))},
                }
            ]
        }
    ).encode()
    lengths = (len(header), 0, -1, len(header) + 5, 2**40, 2**64, "x")
    return _post(target, header + target.encoded, {"Inference-Header-Content-Length": rng.choice(lengths)})


def http_half_sent(target: Target, rng: random.Random) -> bytes:
    whole = _post(target, _json_body(target))
    return whole[: rng.randrange(1, len(whole) - 1)]


def http_wrong_content_length(target: Target, rng: random.Random) -> bytes:
    body = _json_body(target)
    return _post(target, body, {"Content-Length": rng.choice((0, -1, 10, len(body) + 10, 2**40, 2**70, "x"))})


def http_compressed(target: Target, rng: random.Random) -> bytes:
    """A body that inflates a thousandfold, or is not what its header says."""
    bomb = gzip.compress(bytes(JSON_MEBIBYTES << 20))
    body = rng.choice((bomb, b"not gzip", bomb[: len(bomb) // 2]))
    return _post(target, body, {"Content-Encoding": rng.choice(("gzip", "deflate", "br", "x" * 1000))})


def http_wrong_path(target: Target, rng: random.Random) -> bytes:
    names = ("..%2f..%2fetc%2fpasswd", "../../etc/passwd", "x" * 5000, "msfm/versions/99999999999999999999", "%00")
    name = rng.choice((*names, "preprocess/versions/-1", "msfm/versions/7"))
    return _post(target, _json_body(target), path=f"/v2/models/{name}/{rng.choice(('infer', 'generate', ''))}")


def http_restricted(target: Target, rng: random.Random) -> bytes:
    """Model control and shared memory without their key."""
    paths = ("repository/models/msfm/unload", "repository/models/msfm/load", "repository/index", "logging")
    more = ("systemsharedmemory/region/x/register", "systemsharedmemory/unregister", "trace/setting")
    body = b'{"key": "/x", "byte_size": 100, "offset": 0}'
    header = {"scaphoid-key": rng.choice(("", "x", "x" * 4000))}
    return _post(target, body, header, path="/v2/" + rng.choice((*paths, *more)))


def _message(target: Target) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=target.flow, id="fuzz")
    request.inputs.add(name="encoded", datatype="UINT8", shape=[1, len(target.encoded)])
    request.outputs.add(name="probability")
    request.raw_input_contents.append(target.encoded)
    return request


def grpc_garbage(target: Target, rng: random.Random) -> bytes:
    return rng.choice((b"", rng.randbytes(300), b"\x0a\xff\xff\xff\xff\x0f", b"\x0a" + bytes(1000), b"\x2a" * 10_000))


def grpc_flipped(target: Target, rng: random.Random) -> bytes:
    """Bits of the message's beginning, where its names and shapes are."""
    changed = bytearray(_message(target).SerializeToString())
    for _ in range(rng.randrange(4, 12)):
        changed[rng.randrange(60)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def grpc_cut(target: Target, rng: random.Random) -> bytes:
    whole = _message(target).SerializeToString()
    return whole[: rng.randrange(1, len(whole) - 1)]


def grpc_wrong_shape(target: Target, rng: random.Random) -> bytes:
    request, length = _message(target), len(target.encoded)
    shapes = ([length], [1, length + 1], [2, length], [9, length], [1, -1], [0, 0], [], [1, 2**62], [2**32, 2**32])
    request.inputs[0].shape[:] = rng.choice((*shapes, [1, 1, length], [-1, length], [1] * 1000, [-(2**63), -1]))
    return request.SerializeToString()


def grpc_wrong_names(target: Target, rng: random.Random) -> bytes:
    request = _message(target)
    change = rng.randrange(5)
    if change == 0:
        request.model_name = rng.choice(("", "../../etc/passwd", "x" * 100_000, "preprocess\0"))
    elif change == 1:
        request.model_version = rng.choice(("99999999999999999999", "-1", "x", "1.5", "2"))
    elif change == 2:
        request.inputs[0].name = rng.choice(("", "image", "encoded\0", "x" * 100_000))
    elif change == 3:
        request.inputs[0].datatype = rng.choice(("", "FP32", "BYTES", "UINT9", "x" * 1000, "INT8", "BOOL"))
    else:
        request.outputs[0].name = rng.choice(("", "nothing", "x" * 100_000, "main_logits"))
    return request.SerializeToString()


def grpc_wrong_contents(target: Target, rng: random.Random) -> bytes:
    request = _message(target)
    change = rng.randrange(6)
    if change == 0:
        del request.raw_input_contents[:]
    elif change == 1:
        request.raw_input_contents[0] = rng.choice((b"", target.encoded[:-1], target.encoded + b"x"))
    elif change == 2:
        request.raw_input_contents.append(rng.randbytes(50))
    elif change == 3:
        request.inputs[0].contents.fp32_contents.extend([1.0] * 100)
    elif change == 4:
        request.inputs.add().CopyFrom(request.inputs[0])
    else:
        request.inputs[0].parameters["shared_memory_region"].string_param = "scaphoid-server"
        request.inputs[0].parameters["shared_memory_byte_size"].int64_param = rng.choice((-1, 0, 2**40))
    return request.SerializeToString()


def grpc_batch(target: Target, rng: random.Random) -> bytes:
    """More images than one, of which each alone is sound."""
    request, images = _message(target), rng.choice((2, 9, 100))
    request.inputs[0].shape[:] = [images, len(target.encoded)]
    request.raw_input_contents[0] = target.encoded * images
    return request.SerializeToString()


def grpc_bytes(target: Target, rng: random.Random) -> bytes:
    """Strings whose lengths lie."""
    request = _message(target)
    request.inputs[0].datatype = "BYTES"
    request.inputs[0].shape[:] = [1, 1]
    request.raw_input_contents[0] = struct.pack("<I", rng.choice((0, 10, 2**31, 2**32 - 1))) + b"x" * rng.choice((0, 5))
    return request.SerializeToString()


UNFINISHED = (http_garbage, http_half_sent, http_wrong_content_length, http_wrong_lengths, http_body_of_garbage)
Make = Callable[[Target, random.Random], bytes]
HTTP_REQUESTS: tuple[Make, ...] = (
    http_garbage,
    http_body_of_garbage,
    http_json_nested,
    http_json_long,
    http_wrong_value,
    http_wrong_request,
    http_wrong_lengths,
    http_half_sent,
    http_wrong_content_length,
    http_compressed,
    http_wrong_path,
    http_restricted,
)
GRPC_REQUESTS: tuple[Make, ...] = (
    grpc_garbage,
    grpc_flipped,
    grpc_cut,
    grpc_wrong_shape,
    grpc_wrong_names,
    grpc_wrong_contents,
    grpc_batch,
    grpc_bytes,
)
