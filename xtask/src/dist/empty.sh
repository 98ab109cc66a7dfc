#!/bin/sh
# In namespaces of its own: the binary alone in an empty root, as the container image has it.
set -eu
work=$1 binary=$2 version=$3

fail() {
    echo "FAILED: $*" >&2
    [ ! -e "$work/agent.log" ] || cat "$work/agent.log" >&2
    exit 1
}
mount -t tmpfs tmpfs "$work"
mkdir -p "$work/root/dev" "$work/root/proc" "$work/root/sys" "$work/root/usr/bin" "$work/root/run" "$work/root/var/lib"
cp "$binary" "$work/root/usr/bin/dhcp-reclaim"
told=$(chroot "$work/root" /usr/bin/dhcp-reclaim --version)
[ "$told" = "dhcp-reclaim $version" ] || fail "--version says $told"

mount -t proc proc "$work/root/proc"
mount -t sysfs sysfs "$work/root/sys"
mount -t bpf bpf "$work/root/sys/fs/bpf"
# Every runtime gives a container these two.
for device in random urandom; do
    touch "$work/root/dev/$device"
    mount --bind "/dev/$device" "$work/root/dev/$device"
done
ip link add br0 type bridge
ip link set br0 up
ip link add vm1 type veth peer name guest
ip link set vm1 master br0 up
agent() { chroot "$work/root" /usr/bin/dhcp-reclaim "$@"; }
setpriv --bounding-set=-all,+bpf,+net_admin,+net_bind_service,+net_raw,+perfmon,+sys_chroot \
    chroot "$work/root" /usr/bin/dhcp-reclaim run --bridge br0 >"$work/agent.log" 2>&1 &
pid=$!
# The image has nothing to wait with but the program itself.
for _ in $(seq 300); do
    kill -0 $pid 2>/dev/null || fail "the agent ended"
    code=0
    agent stats --json >"$work/stats" 2>/dev/null || code=$?
    [ $code != 0 ] || break
    sleep 0.1
done
[ $code = 0 ] || fail "the agent does not answer"
grep -q '"ports": *1' "$work/stats" || fail "it does not watch one port: $(cat "$work/stats")"
grep -q '^Seccomp:.2$' "/proc/$pid/status" || grep -q '^Seccomp:.2$' "$work/root/proc/"*/status ||
    fail "no sandbox"
kill $pid
wait $pid || fail "no clean end"
