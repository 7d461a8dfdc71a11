"""Every check of the repository, one session each. CI runs those that are on by default and nothing else.

nox -l                     the menu
nox -s unit-3.11           one session
nox -s e2e -- -k poison    arguments after -- go to the tool
"""

import difflib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
PACKAGES = ("protocol", "client", "worker", "broker")
SUPPORTED = ("3.11", "3.12", "3.13")
SOURCES = [f"packages/{name}/src/penstock_{name}" for name in PACKAGES]
EDITABLE = [argument for name in PACKAGES for argument in ("-e", f"packages/{name}")]
# The uv beside the nox that runs this, for what is not done in a session's own environment.
UV = (sys.executable, "-m", "uv")
DIST = ROOT / "dist"
PROTO = "packages/protocol/proto"
GENERATED = "packages/protocol/src"
# Module that prints a page -> the page.
GENERATED_PAGES = {
    "penstock_broker.config.document": "docs/configuration.md",
    "penstock_broker.domain.document": "docs/lifecycle.md",
}

# Of the long sessions of `faults`, what takes seconds and needs no root.
QUICK_FAULTS = ("--short", "tests/faults/test_clocks.py", "tests/faults/test_children.py")

# lock file -> (what is installed from this tree, dependency groups). `lock` comes first: the others follow
# its versions, except those that stand alone.
LOCKS: dict[str, tuple[list[str], list[str]]] = {
    "lock": (["protocol[grpc]", "client[grpc,cli]", "worker", "broker"], ["dev"]),
    "runtime": (["protocol[grpc]", "client[grpc,cli]", "worker", "broker"], []),
    "broker": (["protocol[grpc]", "broker"], []),
    "worker": (["protocol[grpc]", "client", "worker"], []),
    "client": (["protocol", "client"], []),
    "build": ([], ["build"]),
    "tools": ([], ["tools"]),
    "proto": ([], ["proto"]),
    "bench": ([], ["bench"]),
    "foreign": ([], ["foreign"]),
    "celery": ([], ["celery"]),
    "dramatiq": ([], ["dramatiq"]),
    "taskiq": ([], ["taskiq"]),
}
# The other systems of the benchmarks, each in an environment of its own.
RIVALS = ("celery", "dramatiq", "taskiq")
STAND_ALONE = ("lock", "proto", "foreign", *RIVALS)


def show_pyenv_interpreters() -> None:
    """Make every Python that pyenv holds visible, not only the one it has activated."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(path.name for version in SUPPORTED for path in (root / "versions").glob(f"{version}.*"))
    if found and "PYENV_VERSION" not in os.environ:
        os.environ["PYENV_ROOT"] = str(root)
        os.environ["PYENV_VERSION"] = ":".join(found)


def python_of_distribution() -> str:
    """For figures: a Python as distributions and images build it, profile-guided, where there is one. One
    that pyenv has built is not, and takes 1.1 to 1.2 times the CPU."""
    found = (shutil.which(f"python{version}", path="/usr/bin") for version in SUPPORTED)
    return next(filter(None, found), sys.executable)


show_pyenv_interpreters()
# Else every process that a test starts parses all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def install_locked(session: nox.Session, lock: str) -> None:
    session.install("--require-hashes", "-r", f"requirements/{lock}.txt")


def install_everything(session: nox.Session) -> None:
    """All locked dependencies and tools, and the four packages as they stand in the tree."""
    install_locked(session, "lock")
    session.install("--no-deps", "--no-build-isolation", *EDITABLE)


def build_wheels(session: nox.Session) -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    for name in PACKAGES:
        with session.chdir(ROOT / "packages" / name):
            session.run("python", "-m", "hatchling", "build", "-t", "wheel", "-d", str(DIST), silent=True)
    session.log("built: %s", ", ".join(sorted(wheel.name for wheel in DIST.glob("*.whl"))))


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: lint and format."""
    install_everything(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(default=False)
def format(session: nox.Session) -> None:
    """Rewrite the code as `lint` wants it."""
    install_everything(session)
    session.run("ruff", "check", "--fix", ".")
    session.run("ruff", "format", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy: --strict over the packages; over tests without the demand to annotate every function."""
    install_everything(session)
    session.run("mypy", *SOURCES, "noxfile.py", "tools")
    lenient = [f"--allow-{what}" for what in ("untyped-defs", "incomplete-defs", "untyped-calls")]
    lenient.append("--no-warn-unused-ignores")
    # The simulation compares stores as the broker's tests do.
    helpers = {"MYPYPATH": "packages/broker/tests"}
    session.run("mypy", *lenient, "conftest.py", "tests", "benchmarks", env=helpers)
    # Each on its own: their modules may share names.
    for directory in (*(f"packages/{name}/tests" for name in PACKAGES), "demo"):
        session.run("mypy", *lenient, directory, env={"MYPYPATH": directory})


@nox.session
def imports(session: nox.Session) -> None:
    """import-linter: who may import whom."""
    install_everything(session)
    session.run("lint-imports")


@nox.session
def deps(session: nox.Session) -> None:
    """deptry: each package declares what it imports; the lock files fit the declarations."""
    install_everything(session)
    for name in PACKAGES:
        with session.chdir(ROOT / "packages" / name):
            session.run("deptry", "src")
    with tempfile.TemporaryDirectory() as scratch:
        for path in (ROOT / "requirements").glob("*.txt"):
            shutil.copy(path, scratch)
        write_locks(session, Path(scratch))
        require_same(session, Path(scratch), ROOT / "requirements", "*.txt", "nox -s lock")


@nox.session
def proto(session: nox.Session) -> None:
    """Regenerating the messages gives the committed bytes (`-- write` replaces them); buf lint."""
    install_locked(session, "proto")
    files = sorted(str(path.relative_to(ROOT / PROTO)) for path in (ROOT / PROTO).rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        output = str(ROOT / GENERATED) if "write" in session.posargs else scratch
        session.run(
            *("python", "-m", "grpc_tools.protoc", f"--proto_path={PROTO}"),
            *(f"--python_out={output}", f"--pyi_out={output}", f"--grpc_python_out={output}"),
            *files,
        )
        if output == scratch:
            require_same(session, Path(scratch), ROOT / GENERATED, "*_pb2*.py*", "nox -s proto -- write")
    session.run("buf", "lint")


@nox.session
def docs(session: nox.Session) -> None:
    """The generated pages are what the code says (`-- write` replaces them)."""
    install_everything(session)
    for module, page in GENERATED_PAGES.items():
        said = session.run("python", "-m", module, silent=True, log=False)
        if "write" in session.posargs:
            (ROOT / page).write_text(str(said))
        elif str(said) != (ROOT / page).read_text():
            session.error(f"{page} is not what the code says; next: nox -s docs -- write")


@nox.session(python=["3.11", "3.13"])
def unit(session: nox.Session) -> None:
    """Unit tests of all packages: seconds, no network beyond loopback."""
    install_everything(session)
    # Most of them wait most of the time.
    spread = ["--numprocesses=4", "--dist=worksteal"]
    session.run("pytest", *(session.posargs or [*spread, "packages", "tests/repository"]))


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels; install the client's alone and send through Kafka; carry out the image recipes."""
    install_everything(session)
    build_wheels(session)
    wheels = {"PENSTOCK_WHEELS": str(DIST)}
    session.run("pytest", "--timeout=300", "tests/install", *session.posargs, env=wheels)


@nox.session
def e2e(session: nox.Session) -> None:
    """Brokers, workers and a real Kafka as processes, killed and restarted."""
    install_everything(session)
    # Two at a time, each with a Kafka of its own: half of their time they wait.
    spread = ["--numprocesses=2", "--dist=loadfile"]
    tests = session.posargs or [*spread, *QUICK_FAULTS]
    foreign = {"PENSTOCK_FOREIGN_PYTHON": apart(session, "foreign")}
    session.run("pytest", "tests/e2e", *tests, env=foreign)


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """Kills, power cuts, full and slow disks, partitions, clocks: for minutes (`-- --short`: seconds)."""
    install_everything(session)
    session.run("pytest", "tests/faults", *session.posargs, env={"PENSTOCK_KAFKA_REQUIRED": "1"})


@nox.session
def sim(session: nox.Session) -> None:
    """Whole pools in simulation, each out of one seed; `-- --seeds N`, `--hours H`, `--seed S` to replay."""
    install_everything(session)
    if not session.posargs:
        session.run("pytest", "--numprocesses=2", "--dist=worksteal", "tests/sim")
    session.run("python", "-m", "tests.sim", *session.posargs)


@nox.session(default=False)
def planted(session: nox.Session) -> None:
    """Plant each known bug in a copy of the product: the tests must catch it. `-- WORD` plants some."""
    install_everything(session)
    session.run("python", "-m", "tests.planted", *session.posargs)


@nox.session(default=False)
def matrix(session: nox.Session) -> None:
    """tox: the built wheels on every supported Python, with the oldest and the latest dependencies."""
    install_everything(session)
    build_wheels(session)
    session.run("tox", *session.posargs)


@nox.session(default=False, python=python_of_distribution())
def bench(session: nox.Session) -> None:
    """Measure; judges nothing, makes docs/performance.md anew. Short; `-- P3` measures one claim in full."""
    session.env["UV_COMPILE_BYTECODE"] = "1"  # as pip does
    install_everything(session)
    install_locked(session, "bench")
    for name in ("client", *RIVALS):
        apart(session, name, str(session.python))
    missing = [] if shutil.which("redis-server") else ["redis-server"]
    if shutil.which("go") or Path("/usr/local/go/bin/go").exists():
        found = shutil.which("postgres") or list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        missing += [] if found else ["postgresql"]
    if missing:
        # Where this is Debian, and we may.
        install = ("apt-get", "install", "-y", "--no-install-recommends", *missing)
        session.run(*install, external=True, silent=True, success_codes=range(256))
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session(default=False)
def kafka(session: nox.Session) -> None:
    """The tests' Kafka, for development; Ctrl-C stops it."""
    install_everything(session)
    session.run("python", "-m", "tests.kafka_server", *session.posargs)


@nox.session(default=False, python=False)
def setup(session: nox.Session) -> None:
    """Make .venv with the packages and all tools, for an editor and for running things by hand."""
    session.run(*UV, "venv", "--allow-existing", "--python", sys.executable, ".venv")
    pip = (*UV, "pip", "install", "--python", ".venv/bin/python")
    session.run(*pip, "--require-hashes", "-r", "requirements/lock.txt")
    session.run(*pip, "--no-deps", "--no-build-isolation", *EDITABLE)
    session.log("ready: . .venv/bin/activate")


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Bring requirements/ in line with the declarations; `-- --upgrade` takes the newest versions."""
    install_everything(session)
    write_locks(session, ROOT / "requirements", *session.posargs)


def apart(session: nox.Session, lock: str, base: str = sys.executable) -> str:
    """An interpreter with what one lock names, apart from the rest (see pyproject.toml)."""
    home = ROOT / ".nox" / lock
    python = str(home / "bin" / "python")
    if not home.exists():
        session.run(*UV, "venv", "--quiet", "--python", base, str(home), external=True)
    pip = (*UV, "pip", "install", "--quiet", "--python", python)
    session.run(*pip, "--require-hashes", "-r", f"requirements/{lock}.txt", external=True)
    return python


def write_locks(session: nox.Session, directory: Path, *options: str) -> None:
    """Write every lock into `directory`, keeping the versions found there unless told to upgrade."""
    for name, (packages, groups) in LOCKS.items():
        hashed = ["--generate-hashes", *options]
        follow = None if name in STAND_ALONE else directory / "lock.txt"
        compile_lock(session, directory / f"{name}.txt", follow, packages, groups, hashed)
    # For those who install by name: the same versions, in the form that pip's -c takes.
    packages, groups = LOCKS["runtime"]
    constraints, follow = directory / "constraints.txt", directory / "lock.txt"
    compile_lock(session, constraints, follow, packages, groups, list(options))


def compile_lock(
    session: nox.Session,
    output: Path,
    follow: Path | None,
    packages: list[str],
    groups: list[str],
    options: list[str],
) -> None:
    ours = [argument for name in PACKAGES for argument in ("--no-emit-package", f"penstock-{name}")]
    with tempfile.NamedTemporaryFile("w", suffix=".in") as wanted:
        wanted.writelines(f"-e {ROOT}/packages/{package}\n" for package in packages)
        wanted.flush()
        session.run(
            *("uv", "pip", "compile", "--quiet", "--universal", "--python-version", SUPPORTED[0]),
            *("--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", *ours),
            *(argument for group in groups for argument in ("--group", group)),
            *(("-c", str(follow)) if follow else ()),
            *(*options, "-o", str(output), wanted.name),
            silent=True,
            log=False,
        )


def require_same(session: nox.Session, made: Path, kept: Path, pattern: str, remedy: str) -> None:
    """Fail unless the files below `made` and `kept` are the same, by name and by byte."""
    found = ((root, path) for root in (made, kept) for path in root.rglob(pattern))
    names = {str(path.relative_to(root)) for root, path in found if "__pycache__" not in path.parts}
    for name in sorted(names):
        if not (made / name).exists():
            session.error(f"{kept / name} belongs to nothing any more. Delete it, or: {remedy}")
        require_same_text(session, kept / name, (made / name).read_text(), remedy)
    session.log("%d files are as committed", len(names))


def require_same_text(session: nox.Session, kept: Path, wanted: str, remedy: str) -> None:
    found = kept.read_text() if kept.exists() else ""
    if found == wanted:
        return
    changes = difflib.unified_diff(
        found.splitlines(), wanted.splitlines(), "committed", "wanted", lineterm="", n=1
    )
    print("\n".join(list(changes)[:40]))
    session.error(f"{kept.relative_to(ROOT)} is out of date. Next: {remedy}")
