"""The life of an activation, as pure data and pure functions: no I/O, no clock, no protobuf."""
