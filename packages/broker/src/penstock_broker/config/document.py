"""Prints ``docs/configuration.md``, made from the settings: ``python -m penstock_broker.config.document``."""

from __future__ import annotations

import sys

from penstock_broker.config.expected import default_text, kind
from penstock_broker.config.load import FOREIGN, FOREIGN_PREFIXES
from penstock_broker.config.settings import ENV_PREFIX, SECTIONS, Settings

_HEAD = f"""\
# Configuration of the broker

<!-- Generated from penstock_broker.config.settings by `python -m penstock_broker.config.document`. -->

A setting has one name everywhere: `grpc_port` in the YAML file given with `-c`, `{ENV_PREFIX}GRPC_PORT` in
the environment, `--grpc-port` on the command line. Defaults < file < environment < command line. An empty
variable counts as not set. Unknown names are errors. `penstock-broker config check` says what is wrong,
`penstock-broker config show --origin` what is used and where it comes from.

Sizes can be written with a unit: `64MiB`. Secrets cannot be given on the command line, where every user of
the machine would see them.
"""

_TAIL = f"""\
## Kafka in the newer form

```yaml
kafka_clusters:
  default:
    address: kafka-0:9092,kafka-1:9092
kafka_topics:
  taskworker-ingest:
    cluster: default                  # the default
    consumer_group: taskworker-ingest # default: penstock-<topic>
  taskworker-ingest-dlq:
    produce_only: true
```

In the environment names are joined by `__`: `{ENV_PREFIX}KAFKA_CLUSTERS__DEFAULT__ADDRESS=kafka:9092`. A
topic whose name has a hyphen or capitals belongs in the file. A broker consumes one topic, all its topics are
on one cluster, and the form cannot be mixed with `kafka_topic`, `kafka_cluster` and `kafka_consumer_group`.

## Settings of Sentry's taskbroker without a meaning here

They are ignored with a warning.

"""


def document() -> str:
    """The text of ``docs/configuration.md``."""
    parts = [_HEAD]
    for name, field in Settings.model_fields.items():
        if name in SECTIONS:
            parts.append(
                f"\n## {SECTIONS[name]}\n\n| setting | default | values | meaning |\n|---|---|---|---|\n"
            )
        default = f"`{default_text(name)}`" if default_text(name) else "none"
        parts.append(f"| `{name}` | {default} | {kind(name)} | {field.description} |\n")
    parts += ["\n", _TAIL]
    parts += [f"- `{name}`: {note}\n" for name, note in FOREIGN.items()]
    parts += [f"- `{prefix}*`: {note}\n" for prefix, note in FOREIGN_PREFIXES.items()]
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(document())
