"""Sends the task of deploy/app straight to a broker, by its name alone."""

import sys

from penstock_client import App

app = App("example", broker=sys.argv[1], queues=["greetings"])
app.send_task("greetings.greet", args=("image",), queue="greetings").wait(30)
