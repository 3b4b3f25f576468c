#!/bin/sh
# Print the path of the first Python >= 3.12 of: $PYTHON, .python-version through pyenv, python3.12, python3.
# Exit 1 with one line on standard error if there is none.
root=$(dirname "$0")/..

executable() {
    "$1" -c 'import sys; sys.version_info >= (3, 12) or sys.exit(1); print(sys.executable)' 2>/dev/null
}

pyenv_python() {  # also where the shell has not initialised pyenv
    pyenv=$(command -v pyenv || echo "${PYENV_ROOT:-$HOME/.pyenv}/bin/pyenv")
    prefix=$("$pyenv" prefix "$(cat "$root/.python-version")" 2>/dev/null) && echo "$prefix/bin/python"
}

if [ -n "${PYTHON:-}" ]; then
    executable "$PYTHON" && exit
    echo "PYTHON=$PYTHON is not a Python >= 3.12; give the path of one, or leave PYTHON out" >&2
    exit 1
fi
for candidate in "$(pyenv_python)" python3.12 python3; do
    [ -n "$candidate" ] && executable "$candidate" && exit
done
echo "no Python >= 3.12 found (tried pyenv, python3.12, python3): install one, or say make PYTHON=/path/to/python" >&2
exit 1
