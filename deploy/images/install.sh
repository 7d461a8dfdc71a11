#!/bin/sh
# Installs one of the packages, and exactly what its lock names, into a new virtual environment. This is the
# build stage of the images; it runs the same anywhere.
#
#   deploy/images/install.sh TARGET broker|worker
set -eu
target=$1
package=$2
cd "$(dirname "$0")/../.."
case $package in
    broker) wheels="protocol broker" ;;
    worker) wheels="protocol client worker" ;;
    *) echo "install.sh: '$package' has no image. Known: broker, worker." >&2; exit 2 ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# What builds stays out of what runs: the target has neither pip nor a build backend.
python3 -m venv "$scratch/build"
"$scratch/build/bin/pip" install --quiet --require-hashes --only-binary :all: -r requirements/build.txt
for name in $wheels; do
    (cd "packages/$name" && "$scratch/build/bin/python" -m hatchling build -t wheel -d "$scratch/wheels")
done

python3 -m venv --without-pip "$target"
install() { "$scratch/build/bin/pip" --python "$target/bin/python" install --quiet "$@"; }
install --require-hashes --only-binary :all: -r "requirements/$package.txt"
install --no-deps --no-index "$scratch"/wheels/*.whl
