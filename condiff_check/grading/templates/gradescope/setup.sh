#!/usr/bin/env bash
# Run once by Gradescope, as root, when it builds the image. AUTOGRADER_ROOT stands for /autograder where it is tried out.
set -euo pipefail
root="${AUTOGRADER_ROOT:-/autograder}"
export DEBIAN_FRONTEND=noninteractive

apt-get update
apt-get install -y --no-install-recommends bubblewrap libseccomp2

# Python 3.11 to 3.13: the image's own if it is one of them, else one that its distribution offers.
python=
for version in 3.13 3.12 3.11; do
    if apt-get install -y --no-install-recommends "python$version" "python$version-venv"; then
        python="python$version"
        break
    fi
done
if [ -z "$python" ]; then
    echo "This image offers no Python 3.11 to 3.13: choose a newer one, such as Ubuntu 24.04, in Gradescope's settings." >&2
    exit 1
fi

# The sandbox shows this folder to students' code, so it is readable for all; source/, with the secret, is not.
"$python" -m venv "$root/venv"
pip=("$root/venv/bin/pip" install --no-cache-dir --disable-pip-version-check)
cd "$root/source"
pins=()
if [ -f condiff/constraints.txt ]; then
    pins=(-c condiff/constraints.txt)
fi
# A GPU is of no use here: set TORCH_INDEX to the address of torch's CPU wheels (see README.md) and save gigabytes.
if [ -n "${TORCH_INDEX:-}" ]; then
    "${pip[@]}" "${pins[@]}" --index-url "$TORCH_INDEX" torch
fi
package=@PACKAGE@
if [ "$package" = ./condiff ]; then
    cp -r condiff "$root/condiff"
    "${pip[@]}" "${pins[@]}" --editable "$root/condiff"
else
    "${pip[@]}" "$package"
fi
chmod 700 "$root/source"
