from penstock_protocol.v1 import activation_pb2 as _activation_pb2
from penstock_protocol.v1 import consumer_pb2 as _consumer_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PushTaskRequest(_message.Message):
    __slots__ = ("task", "callback_url")
    TASK_FIELD_NUMBER: _ClassVar[int]
    CALLBACK_URL_FIELD_NUMBER: _ClassVar[int]
    task: _activation_pb2.TaskActivation
    callback_url: str
    def __init__(self, task: _Optional[_Union[_activation_pb2.TaskActivation, _Mapping]] = ..., callback_url: _Optional[str] = ...) -> None: ...

class PushTaskResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
