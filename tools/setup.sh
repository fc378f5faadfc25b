#!/usr/bin/env bash
# Make the environment in the folder $1 for the build $2 ("default FOLDER" or "cpu FOLDER"). The Makefile calls this.
#
# .build in that folder tells from the first moment on that the folder is ours and what it is to hold; .installed
# comes last. A folder with the first and without the second was interrupted, and is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 build=$2 torch=${2%% *}

stop() {
    printf '%s\n' "$@" >&2
    exit 1
}
pin() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" constraints.txt; }

# --- what to install, and what it takes -------------------------------------------------------------------------------
case $torch in
default)
    what="torch $(pin torch) and torchvision $(pin torchvision), default build"
    want=("torch===$(pin torch)" -e '.[images,course,grade,cluster,test]') # === is the default build even where pip sees a CPU wheel
    ;;
cpu)
    what="torch $(pin torch), small install without torchvision"
    want=("torch==$(pin torch)" -e '.[course,grade,cluster,test]')
    ;;
*) stop "TORCH is 'default' or 'cpu', not '$torch'." ;;
esac
# Measured on Linux x86_64, in GB: what is downloaded, what stays, what must be free while pip works; and the time.
price() {
    case $1 in
    default) download=2.8 size=5.9 need=12 time="3 to 8 minutes" ;;
    cpu) download=0.5 size=2.0 need=3 time="2 to 5 minutes" ;;
    esac
}
price "$torch"

# --- is it there already? ---------------------------------------------------------------------------------------------
same_python() { [[ -z ${PY:-} || $("$venv/bin/python" -V 2>&1) == $("$PY" -V 2>&1) ]]; }
fresh=yes
if [[ -e $venv/.installed && $(cat "$venv/.build") == "$build" && -x $venv/bin/python ]] && same_python; then
    fresh=no
    if [[ ! pyproject.toml -nt $venv/.installed && ! constraints.txt -nt $venv/.installed ]]; then
        echo "$venv is ready: $what."
        exit 0
    fi
fi
[[ -e $venv/.build || -z $(ls -A "$venv" 2>/dev/null) ]] || stop \
    "The folder $venv was not made by 'make setup', so it is left as it is." \
    "Move it away, or name another folder:   make setup VENV=.venv-condiff"

# --- a Python that will do, room enough, and an empty environment -----------------------------------------------------
probe='
import sys
version = "%d.%d.%d" % sys.version_info[:3]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    print("is " + version)
else:
    from importlib.util import find_spec
    pip_from = [name for name in ("ensurepip", "pip") if find_spec(name)]
    missing = [name for name in ("venv", "_ssl", "_ctypes", "_bz2", "_lzma") if not find_spec(name)]
    missing += [] if pip_from else ["ensurepip"]
    print("is %s without %s" % (version, ", ".join(missing)) if missing else "fits %s %s" % (version, pip_from[0]))
'
room() {
    free=$({ df -Pk "$venv" && du -sk "$venv"; } | awk 'NR == 2 { kb = $4 } NR == 3 { kb += $1 } END { print int(kb / 1e6) }')
    ((free >= need)) || stop "Not enough disk space for $what." \
        "Set-up needs $need GB while it works ($size GB stay); there are $free GB at $venv." \
        "Free some, or name a folder on a larger disk:   make setup VENV=/path/to/folder" \
        "The small install needs 3 GB:   make setup TORCH=cpu"
}
if [[ $fresh == yes ]]; then
    tried=""
    for python in ${PY:-python3.13 python3.12 python3.11 python3}; do
        answer=$("$python" -I -c "$probe" 2>/dev/null) || answer="is not there or does not start"
        [[ $answer == fits\ * ]] && break
        tried+="  $python ${answer:-gives no answer}"$'\n'
    done
    [[ $answer == fits\ * ]] || stop \
        "condiff needs Python 3.11, 3.12 or 3.13 with its venv module. Tried:" "$tried" \
        "Debian and Ubuntu have it in two packages:   sudo apt-get install python3 python3-venv" \
        "One that lies somewhere else:   make setup PY=/path/to/python3.12" \
        "Conda and mamba bring their own; see environment.yml."
    read -r _ version pip_from <<<"$answer"
    mkdir -p "$venv"
    room

    rm -rf "$venv"
    mkdir -p "$venv"
    printf '%s\n' "$build" >"$venv/.build"
    if [[ $pip_from == ensurepip ]]; then
        "$python" -m venv "$venv"
    else # Debian's python3-pip comes without ensurepip
        "$python" -m venv --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install -q pip
    fi
fi
rm -f "$venv/.installed"

# --- install ----------------------------------------------------------------------------------------------------------
pip() { "$venv/bin/python" -m pip "$@"; }
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
TMPDIR=$(cd "$venv" && pwd)/tmp # pip unpacks there, so that only this file system needs the room
export TMPDIR
mkdir -p "$TMPDIR"

if [[ $torch == cpu && $fresh == yes && -z ${TORCH_INDEX:-} && $(uname) == Linux ]] &&
    ! pip index versions torch 2>/dev/null | grep -qF "$(pin torch)+cpu"; then
    echo "pip as configured here offers no CPU wheel of torch $(pin torch) for Python $version: this takes the default build."
    echo "The small one comes from an index that has it:   make setup TORCH=cpu TORCH_INDEX=address"
    price default
    room
fi
echo "Setting up $venv: $what, Python $("$venv/bin/python" -c 'import platform; print(platform.python_version())')."
[[ $fresh == no ]] || echo "This downloads $download GB, takes $size GB of disk and $time."

log=$venv/setup.log
trap 'stop "Interrupted. The same command starts afresh."' INT
install() { # every word of pip goes to the log; on the screen only what one waits for
    pip install -c constraints.txt "$@" 2>&1 | tee -a "$log" | awk '
        /(Downloading|Using cached) .*\(([0-9]+[0-9]\.[0-9] MB|.* GB)\)/ {
            sub(/^ */, ""); sub(/-(cp|py)[0-9].*\.whl/, ""); print "  " $0; fflush()
        }
        /^Installing collected packages/ && NF > 9 { print "  Unpacking " NF - 3 " packages"; fflush() }' || {
        tail -n 12 "$log" >&2
        stop "pip did not get through; all it said is in $log. The same command starts afresh."
    }
}
[[ $fresh == no ]] || install --upgrade pip # a recent one is twice as fast
[[ -z ${TORCH_INDEX:-} ]] || install --no-deps -i "$TORCH_INDEX" "torch==$(pin torch)"
install "${want[@]}"
rm -rf "$TMPDIR"
unset TMPDIR

"$venv/bin/python" - "$torch" <<'EOF'
import sys
import torch
if sys.argv[1] == "default":
    import torchvision  # beside a torch of another build this fails
device = f"GPU {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU in use, all runs on the CPU"
print(f"torch {torch.__version__}: {device}.")
EOF
touch "$venv/.installed"
echo "Ready after $((SECONDS / 60)) min $((SECONDS % 60)) s; $venv takes $(du -sk "$venv" | awk '{ printf "%.1f", $1 / 1e6 }') GB."
