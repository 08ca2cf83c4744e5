#!/bin/sh
# Installs scaphoid on a Jetson from the folder that this file lies in, without network:
#
#     sudo sh install.sh              check, install, build the engines, try them, switch over, start the service
#     sh install.sh --check           only say what is missing
#     sudo sh install.sh --root DIR   instead of /opt/scaphoid
#
# Run it again after an interruption or a lack of memory: what is done stays done, and the version in use stays in use
# until the new one has predicted a sample. Go back: DIR/bin/scaphoid-edge rollback DIR. Not run on hardware.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=/opt/scaphoid
check_only=
while [ $# -gt 0 ]; do
    case $1 in
    --check) check_only=yes ;;
    --root) root=${2:?--root needs a folder} && shift ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
    shift
done
case $root in
/*) ;;
*) printf '%s: --root needs an absolute path: the service is started elsewhere\n' "$root" >&2 && exit 2 ;;
esac
# shellcheck source=/dev/null
. "$here/needs.env"                   # MEMORY_MIB, DISK_MIB, PRECISION, FLOWS
system=${SCAPHOID_SYSTEM_ROOT:-}      # where /etc and /proc are looked for: for the tests
nvcc=$(command -v nvcc || echo "$system/usr/local/cuda/bin/nvcc")
missing=0

step() { printf '\n== %s\n' "$*"; }
have() { printf '   ok       %s\n' "$*"; }
warn() { printf '   warning  %s\n' "$*"; }
lack() {
    printf '   MISSING  %s\n' "$*"
    missing=$((missing + 1))
}

check() {
    step "this machine"
    if [ "$(uname -m)" = aarch64 ]; then have "64-bit Arm"; else lack "64-bit Arm: this is $(uname -m)"; fi
    release=$(sed -n 's/^# R\([0-9]*\).*REVISION: \([0-9.]*\).*/\1.\2/p' "$system/etc/nv_tegra_release" 2>/dev/null || true)
    case $release in
    3[6-9].* | [4-9][0-9].*) have "Jetson Linux $release" ;;
    "") lack "JetPack 6 or later: /etc/nv_tegra_release does not say" ;;
    *) lack "JetPack 6 (Jetson Linux 36) or later: this is $release" ;;
    esac
    if python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        have "$(python3 --version)"
    else
        lack "python3 3.10 or later with venv: apt install python3-venv"
    fi
    check_wheels
    cuda=$("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p' || true)
    case $cuda in
    12.[6-9]* | 1[3-9].*) have "CUDA $cuda" ;;
    *) lack "CUDA 12.6 or later with nvcc: ${cuda:-none found}; apt install nvidia-jetpack" ;;
    esac
    tensorrt=$(python3 -c 'import tensorrt; print(tensorrt.__version__)' 2>/dev/null || true)
    case $tensorrt in
    10.* | 11.*) have "TensorRT $tensorrt" ;;
    *) lack "TensorRT 10 or 11 for python3: ${tensorrt:-none found}; apt install nvidia-jetpack" ;;
    esac
    if command -v g++ >/dev/null; then have "g++"; else lack "g++: apt install build-essential"; fi
    check_room
    check_power
}

check_wheels() {
    [ -d "$here/wheels" ] || return 0
    python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
    [ -n "$python" ] || return 0 # said already
    for wheel in "$here"/wheels/*.whl; do
        case ${wheel##*/} in
        *-"cp$(printf %s "$python" | sed 's/\.//')"-* | *-abi3-* | *-py3-* | *-py2.py3-*) ;;
        *) lack "wheels for Python $python: ${wheel##*/} is for another; bundle again with --python $python" && return ;;
        esac
    done
    have "wheels for Python $python"
}

check_room() {
    memory=$(awk '$1 == "MemAvailable:" { print int($2 / 1024) }' "$system/proc/meminfo" 2>/dev/null || true)
    if [ "${memory:-0}" -ge "$MEMORY_MIB" ]; then
        have "$memory MiB of memory are free, the flows take up to $MEMORY_MIB"
    else
        lack "memory: ${memory:-unknown} MiB free, the flows take up to $MEMORY_MIB; stop other programs"
    fi
    swap=$(awk '$1 == "SwapTotal:" { print int($2 / 1024) }' "$system/proc/meminfo" 2>/dev/null || true)
    [ "${swap:-0}" -ge 4096 ] || warn "${swap:-0} MiB of swap: building engines is safer with 4096 or more"
    existing=$root
    while [ ! -d "$existing" ]; do existing=$(dirname "$existing"); done
    disk=$(df -Pm "$existing" 2>/dev/null | awk 'NR == 2 { print $4 }' || true)
    if [ "${disk:-0}" -ge "$DISK_MIB" ]; then
        have "$disk MiB of disk are free below $existing, $DISK_MIB are needed"
    else
        lack "disk: ${disk:-unknown} MiB free below $existing, $DISK_MIB are needed"
    fi
}

check_power() {
    mode=$(nvpmodel -q 2>/dev/null | sed -n 's/^NV Power Mode: //p' || true)
    case $mode in
    MAXN*) have "power mode $mode" ;;
    "") lack "nvpmodel: the power mode is unknown" ;;
    *) warn "power mode $mode: engines are timed while they are built; build in the mode they will run in (nvpmodel -m 0)" ;;
    esac
}

install_code() {
    step "code: $root/code"
    rm -rf "$root/code.new"
    mkdir -p "$root/bin"
    cp -Rp "$here/python" "$root/code.new"
    [ -d "$root/python" ] || python3 -m venv --system-site-packages "$root/python"
    if [ -d "$here/wheels" ]; then
        "$root/python/bin/python" -m pip install --quiet --no-index "$here"/wheels/*.whl
    fi

    step "op library, for this GPU (minutes)"
    library=scaphoid/build/edge/libscaphoid_ops_c.so
    if [ -d "$root/code/scaphoid/build/ops" ]; then # objects of an earlier run: only what changed is compiled again
        cp -Rp "$root/code/scaphoid/build" "$root/code.new/scaphoid/build"
    fi
    SCAPHOID_CUDA=${SCAPHOID_CUDA:-87} CUDA_HOME=$(dirname "$(dirname "$nvcc")") PATH="$root/python/bin:$PATH" \
        "$root/python/bin/python" "$root/code.new/scaphoid/kernels/build_ops.py" edge --out "$root/code.new/$library"
    rm -rf "$root/code.old"
    [ ! -d "$root/code" ] || mv "$root/code" "$root/code.old"
    mv "$root/code.new" "$root/code"
    printf '#!/bin/sh\nPYTHONPATH=%s/code exec %s/python/bin/python -m scaphoid.export.edge.command "$@"\n' \
        "$root" "$root" >"$root/bin/scaphoid-edge"
    chmod 755 "$root/bin/scaphoid-edge"
}

install_version() {
    version=$("$root/bin/scaphoid-edge" add "$root" "$here/artefacts")
    folder=$root/versions/$version
    step "engines of version $version, one at a time (minutes each; run again to go on)"
    PYTHONPATH=$root/code "$root/python/bin/python" -m scaphoid.export.tensorrt_engines.build_engines \
        "$folder/artefacts" "$folder/engines" --precision "$PRECISION"
    for flow in $FLOWS; do
        step "one prediction by $flow, before it is used"
        "$root/bin/scaphoid-edge" predict "$folder/artefacts" "$here/sample.pgm" --flow "$flow" --engines tensorrt
    done
    step "switch to version $version"
    "$root/bin/scaphoid-edge" use "$root" "$version"
}

install_service() {
    step "service: scaphoid-edge"
    id scaphoid >/dev/null 2>&1 || useradd --system --home-dir /var/lib/scaphoid --groups video,render scaphoid
    install -d -o scaphoid -g scaphoid -m 2770 /var/lib/scaphoid /var/lib/scaphoid/inbox /var/lib/scaphoid/out
    case " $FLOWS " in
    *" msfm "*) flow=msfm ;;
    *) flow=${FLOWS%% *} ;;
    esac
    sed "s|@ROOT@|$root|g; s|@FLOW@|$flow|g" "$here/scaphoid-edge.service" \
        >"$system/etc/systemd/system/scaphoid-edge.service"
    systemctl daemon-reload
    systemctl enable scaphoid-edge
    systemctl restart scaphoid-edge
    have "put radiographs into /var/lib/scaphoid/inbox; predictions.jsonl is in /var/lib/scaphoid/out"
}

check
if [ "$missing" -gt 0 ]; then
    printf '\n%s missing: nothing was changed\n' "$missing" >&2
    exit 1
fi
[ -z "$check_only" ] || exit 0
install_code
install_version
install_service
