"""Messages that nobody sends by accident, and a meter of what they take.

As a script it handles each in a process of its own and prints what became of it, the memory it took at its
highest (bytes) and the time (ms): one JSON object a line.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import zstandard

from penstock_broker.dispatch.service import Refused
from penstock_broker.dispatch.service import parse as parse_request
from penstock_broker.ingest.admission import Admission, AdmissionLimits
from penstock_protocol.payload import PayloadError, decode_parameters
from penstock_protocol.v1 import consumer_pb2 as pb
from penstock_protocol.v1.activation_pb2 import RetryState, TaskActivation
from penstock_protocol.v1.raw_pb2 import RawSendTasksRequest

MIB = 1 << 20
NOW = 1_800_000_000_000
HOSTILE_TEXT = "line\nbreak\r\x1b[31mred\x1b[0m\x07\u202eevil\u2028\x85{}%s\0'\";--"


def field(number: int, value: bytes | int) -> bytes:
    """A field of a message, as it is on the wire."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def task(**fields: object) -> bytes:
    message = TaskActivation(id="id-1", namespace="emails", taskname="shop.send", application="shop")
    message.MergeFrom(TaskActivation(**fields))  # type: ignore[arg-type]
    return message.SerializeToString()


def received(seconds: int, nanos: int = 0) -> bytes:
    message = TaskActivation()
    message.received_at.seconds, message.received_at.nanos = seconds, nanos
    return task() + message.SerializeToString()


def headers(count: int) -> bytes:
    return task() + b"".join(field(5, field(1, b"%x" % n)) for n in range(count))


NOTHING: dict[str, Callable[[], bytes | None]] = {
    "no value": lambda: None,
    "empty": lambda: b"",
    "one byte": lambda: b"\x0a",
    "JSON": lambda: b'{"id": "1"}',
    "JSON array": lambda: b"  [1, 2]",
    "text": lambda: b"hello, this is no protobuf at all",
    "zeros": lambda: bytes(64),
    "ones": lambda: b"\xff" * 64,
    "cut off": lambda: task()[:-3],
    "a varint without end": lambda: task() + b"\x40" + b"\xff" * 30,
    "a length beyond the end": lambda: task() + b"\x0a\xff\xff\xff\xff\x07",
    "a length beyond 64 bits": lambda: task() + b"\x0a" + b"\xff" * 9 + b"\x7f",
    "an unknown wire type": lambda: task() + b"\x0f\x00",
    "field number 0": lambda: b"\x02\x00" + task(),
    "an end without its group": lambda: task() + b"\xa4\x06",
    "groups nested 100,000 deep": lambda: task() + b"\xa3\x06" * 100_000,
    "an id that is not UTF-8": lambda: task() + field(1, b"\xff\xfe"),
    "a surrogate in the taskname": lambda: task() + field(3, b"\xed\xa0\x80"),
    "a header that is not UTF-8": lambda: task() + field(5, field(1, b"k") + field(2, b"\xc0\x80")),
    "another message": lambda: pb.GetTasksRequest(request_id="", max_tasks=3, wait_ms=9).SerializeToString(),
    "gzip": lambda: b"\x1f\x8b\x08" + bytes(40),
    "a Confluent schema header": lambda: b"\x00\x00\x00\x00\x07" + task(),
    "no id": lambda: TaskActivation(taskname="t").SerializeToString(),
    "no taskname": lambda: TaskActivation(id="i").SerializeToString(),
    "an endless id": lambda: task() + field(1, b"x" * (7 * MIB)),
    "an endless namespace": lambda: task() + field(2, "ü".encode() * 300),
    "an endless application": lambda: task(application="a" * 257),
    "an endless taskname": lambda: task(taskname="t" * 513),
    "too large": lambda: task(parameters_bytes=bytes(9 * MIB)),
    "900,000 headers": lambda: headers(900_000),
    "4 million empty headers": lambda: task() + b"\x2a\x00" * (4 * MIB - 100),
    "4 million retry states": lambda: task() + b"\x3a\x00" * (4 * MIB - 100),
    "4 million empty groups": lambda: task() + b"\xa3\x06\xa4\x06" * (2 * MIB - 100),
    "2 million ids": lambda: task() + b"\x0a\x01x" * (2 * MIB),
}
SOMETHING: dict[str, Callable[[], bytes]] = {
    "an ordinary one": task,
    "unknown fields": lambda: task() + field(2000, b"x" * 100) + field(99, 2**64 - 1),
    "every field twice": lambda: task() + task(id="second"),
    "the longest names": lambda: task(id="i" * 256, namespace="n" * 256, taskname="t" * 512),
    "names that a terminal obeys": lambda: task(
        id=HOSTILE_TEXT, namespace=HOSTILE_TEXT, application=HOSTILE_TEXT, taskname=HOSTILE_TEXT
    ),
    "names beyond the BMP": lambda: task(id="😀" * 256, namespace="\U0010ffff" * 256),
    "an unknown policy": lambda: task(retry_state=RetryState(max_attempts=2)) + field(7, field(3, 2**63)),
    "a negative policy": lambda: task() + field(7, field(3, 2**64 - 1)),
    "huge durations": lambda: task(
        delay=2**64 - 1,
        expires=2**64 - 1,
        processing_deadline_duration=2**64 - 1,
        retry_state=RetryState(delay_on_retry=2**64 - 1),
    ),
    "huge attempts": lambda: task(retry_state=RetryState(attempts=2**32 - 1, max_attempts=2**32 - 1)),
    "the year 292 billion": lambda: received(2**63 - 1, 2**31 - 1),
    "the year -292 billion": lambda: received(-(2**63), -(2**31)),
    "a second of minus one": lambda: received(-1, -1),
    "nanoseconds of their own": lambda: received(NOW // 1000, 2**31 - 1),
    "expired before it was sent": lambda: received(NOW // 1000 - 60) + field(9, 1),
    "2,000 headers": lambda: headers(2_000),
    "a header of 1 MiB": lambda: task(headers={"k": "v" * MIB}),
    "arguments that are nothing": lambda: task(parameters_bytes=b"\xc1" * 100),
    "8 MiB of arguments": lambda: task(parameters_bytes=bytes(8 * MIB - 500)),
    "a frame that declares 512 MiB": lambda: task(
        parameters_bytes=zstandard.ZstdCompressor().compress(bytes(512 * MIB)),
        headers={"compression-type": "zstd"},
    ),
}


def arguments(packed: bytes, compressed: bool = True) -> TaskActivation:
    if not compressed:
        return TaskActivation(id="a", taskname="t", parameters_bytes=packed)
    frame = zstandard.ZstdCompressor().compress(packed)
    return TaskActivation(id="a", taskname="t", parameters_bytes=frame, headers={"compression-type": "zstd"})


def listed(value: bytes, count: int) -> bytes:
    """msgpack of arguments that are ``count`` times ``value``."""
    return b"\x82\xa4args\xdd" + count.to_bytes(4, "big") + value * count + b"\xa6kwargs\x80"


def text(characters: bytes) -> bytes:
    return b"\x82\xa4args\x91\xdb" + len(characters).to_bytes(4, "big") + characters + b"\xa6kwargs\x80"


def unsized(size: int) -> TaskActivation:
    """A frame that does not say what it becomes."""
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    frame = b"".join(stream.compress(bytes(MIB)) for _ in range(size // MIB)) + stream.flush()
    return TaskActivation(parameters_bytes=frame, headers={"compression-type": "zstd"})


ARGUMENTS: dict[str, Callable[[], TaskActivation]] = {
    "16 KB that become 512 MiB": lambda: arguments(bytes(512 * MIB)),
    "a frame that does not say it becomes 512 MiB": lambda: unsized(512 * MIB),
    "a frame of 64 frames": lambda: TaskActivation(
        parameters_bytes=zstandard.ZstdCompressor().compress(bytes(MIB)) * 64,
        headers={"compression-type": "zstd"},
    ),
    "a window of 2 GiB": lambda: TaskActivation(
        parameters_bytes=b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(40), headers={"compression-type": "zstd"}
    ),
    "1 KB that becomes 33 million lists": lambda: arguments(listed(b"\x90", 32 * MIB - 100)),
    "4 million lists": lambda: arguments(listed(b"\x90", 4 * MIB - 100)),
    "4 million lists, as they are": lambda: arguments(listed(b"\x90", 4 * MIB - 100), compressed=False),
    "a million dicts": lambda: arguments(listed(b"\x81\xa0\xc0", MIB)),
    "as many dicts as may be": lambda: arguments(listed(b"\x81\xa0\xc0", 49_990)),
    "as many lists as may be": lambda: arguments(listed(b"\x90", 149_990)),
    "as many texts as may be": lambda: arguments(listed(b"\xa2xy", 149_990)),
    "as large as may be": lambda: arguments(text(b"x" * (4 * MIB - 30))),
    "as large as may be, four bytes a character": lambda: arguments(
        text("😀".encode() + b"x" * (4 * MIB - 34))
    ),
    "a list that says it has 4 billion": lambda: arguments(b"\x82\xa4args\xdd\xff\xff\xff\xff\x90"),
    "a dict that says it has 4 billion": lambda: arguments(b"\x82\xa4args\xdf\xff\xff\xff\xff\x90"),
    "a text that says it has 4 billion": lambda: arguments(b"\x82\xa4args\x91\xdb\xff\xff\xff\xff\x90"),
    "lists of 16 million in each other": lambda: arguments(b"\xdd\x00\xff\xff\xff" * 200),
    "nested 3 million deep": lambda: arguments(b"\x91" * (3 * MIB)),
    "JSON of 2 million lists": lambda: TaskActivation(parameters='{"args": [' + "[]," * (2 * MIB) + "1]}"),
    "JSON of a million lists": lambda: TaskActivation(parameters='{"args": [' + "[]," * MIB + "1]}"),
    "JSON nested 3 million deep": lambda: TaskActivation(parameters="[" * (3 * MIB)),
    "JSON of a number with 3 million digits": lambda: TaskActivation(
        parameters='{"args": [' + "9" * (3 * MIB) + "]}"
    ),
}
REQUESTS: dict[str, Callable[[], tuple[type, bytes]]] = {
    "4 million outcomes": lambda: (pb.SetTaskStatusesRequest, b"\x0a\x00" * (4 * MIB - 100)),
    "4 million releases": lambda: (pb.ReleaseTasksRequest, b"\x0a\x00" * (4 * MIB - 100)),
    "4 million claims": lambda: (pb.ExtendClaimsRequest, b"\x0a\x00" * (4 * MIB - 100)),
    "4 million updates": lambda: (pb.SetBatchActivationStatusRequest, b"\x0a\x00" * (4 * MIB - 100)),
    "4 million namespaces": lambda: (pb.GetTasksRequest, b"\x1a\x00" * (4 * MIB - 100)),
    "4 million activations": lambda: (RawSendTasksRequest, b"\x0a\x00" * (4 * MIB - 100)),
    "an id of 8 MiB": lambda: (pb.SetTaskStatusRequest, field(1, b"x" * (8 * MIB - 10))),
    "32,000 outcomes": lambda: (pb.SetTaskStatusesRequest, b"\x0a\x00" * 32_000),
}


def admit(value: bytes | None) -> str:
    row = Admission(AdmissionLimits()).admit(value, NOW, 1, 7, "tasks", 0)
    return f"{row.status.name} {row.error or ''}"


def decode(activation: TaskActivation) -> str:
    try:
        args, kwargs = decode_parameters(activation)
    except PayloadError as error:
        return f"PayloadError {error}"
    return f"decoded {len(args)} {len(kwargs)}"


def parse_call(request: tuple[type, bytes]) -> str:
    try:
        return f"parsed {parse_request(*request).ByteSize()}"
    except Refused as refused:
        return f"{refused.code.name} {refused.message}"


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _measure(make: Callable[[], object], handle: Callable[..., str]) -> dict[str, object]:
    given = make()
    gc.collect()
    # What making it has freed must not hide what handling it takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = _memory("VmRSS"), time.perf_counter()
    became = handle(given)
    milliseconds = (time.perf_counter() - begun) * 1000
    return {"became": became[:300], "bytes": _memory("VmHWM") - before, "ms": round(milliseconds, 1)}


def _in_a_process_of_its_own(name: str, make: Callable[[], object], handle: Callable[..., str]) -> None:
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert status == 0, f"{name}: the process ended with {status}"
        return
    os.write(1, json.dumps({"name": name, **_measure(make, handle)}).encode() + b"\n")
    os._exit(0)


def main() -> None:
    # The first of each kind loads what it needs; that is no part of what an input takes.
    admit(task())
    decode(arguments(listed(b"\x90", 3)))
    parse_call((pb.GetTasksRequest, b""))
    for kinds, handle in ((NOTHING | SOMETHING, admit), (ARGUMENTS, decode), (REQUESTS, parse_call)):
        for name, make in kinds.items():  # type: ignore[attr-defined]
            _in_a_process_of_its_own(name, make, handle)


if __name__ == "__main__":
    main()
