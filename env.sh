# Sets PYTHON to a Python that satisfies requirements.txt, and defines path_of. To be sourced, from any
# folder. The python on the PATH is used as it is if it will do; otherwise .venv is made and filled
# once.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The path $1 that a script was given, as its caller means it: seen from the folder that the script has
# left by cd. Without a path $2, as it is.
path_of() {
    case $1 in
        "") echo "$2" ;;
        /*) echo "$1" ;;
        *) echo "$OLDPWD/$1" ;;
    esac
}

satisfies() {
    "$1" - "$here/requirements.txt" <<'PY' 2>/dev/null
import re, sys
from importlib.metadata import version

def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]]

assert sys.version_info >= (3, 10)
for line in open(sys.argv[1]):
    name, least = line.strip().split(">=")
    assert numbers(version(name)) >= numbers(least)
PY
}

for PYTHON in python python3 "$here/.venv/bin/python"; do
    satisfies "$PYTHON" && return
done

for python in python3 python python3.13 python3.12 python3.11 python3.10; do
    "$python" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null && break
    python=
done
if [ -z "$python" ]; then
    echo "error: no Python 3.10 or newer on the PATH; install one" >&2
    exit 2
fi
echo "making $here/.venv from requirements.txt (once, a few minutes)"
"$python" -m venv "$here/.venv" && "$here/.venv/bin/pip" install -q -r "$here/requirements.txt" || {
    echo "error: $here/.venv could not be filled from requirements.txt; see above" >&2
    exit 2
}
PYTHON="$here/.venv/bin/python"
