"""The tasks of the worker in compose.yaml. `python deploy/app/tasks.py` sends one."""

from penstock_client import App

app = App("example", kafka="127.0.0.1:9094")
greetings = app.namespace("greetings", retry=None)


@greetings.task(name="greetings.greet")
def greet(name: str, **kwargs: object) -> None:
    print(f"Hello, {name}!", flush=True)


if __name__ == "__main__":
    greet.delay("world")
