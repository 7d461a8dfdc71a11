"""A producer that has the client and nothing else. Prints what importing and using it brought along."""

import importlib.metadata
import json
import sys

from penstock_client import App

app = App("shop", kafka=sys.argv[1])
orders = app.namespace("orders", retry=None)


@orders.task(name="orders.confirm")
def confirm(order_id: int, *, coupon: str | None = None, **kwargs: object) -> None: ...


sent = confirm.delay(7, coupon="X").wait(30)
distributions = sorted(distribution.name for distribution in importlib.metadata.distributions())
print(json.dumps({"id": sent.id, "modules": sorted(sys.modules), "distributions": distributions}))
