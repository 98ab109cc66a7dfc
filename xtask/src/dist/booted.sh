#!/bin/sh
# Inside of a container with a service manager: what a new user does, from the package on. /dist has
# the package; what is written to /out says how it went.
exec >/out/log 2>&1
set -eux
trap 'code=$?; [ $code = 0 ] || journalctl --no-pager --lines=60; echo $code >/out/code; systemctl --no-block poweroff' EXIT

fail() {
    echo "FAILED: $*"
    exit 1
}
# Until the command succeeds; what it waits for has no event that a shell could wait for.
await() {
    set +x
    for _ in $(seq 300); do
        if "$@"; then
            set -x
            return 0
        fi
        sleep 0.1
    done
    fail "not within 30 s: $*"
}
show() { systemctl show --property="$1" --value dhcp-reclaim; }
lease_of() { grep -q "$1" /tmp/leases; }
no_lease_of() { ! lease_of "$1"; }
state_is() { dhcp-reclaim list | grep "$1 " | grep -q " $2 "; }
config=/etc/dhcp-reclaim/dhcp-reclaim.toml

# A container's /sys is a tmpfs with parts of the real one.
mount -o remount,rw /sys || true
mkdir -p /sys/fs/bpf
mount -t bpf bpf /sys/fs/bpf
ip link add br0 type bridge
ip address add 10.67.0.1/24 dev br0
ip link set br0 up
touch /tmp/leases
dnsmasq --conf-file=/dev/null --port=0 --interface=br0 --bind-interfaces --no-ping --user=root \
    --dhcp-range=10.67.0.100,10.67.0.109,1h --dhcp-leasefile=/tmp/leases --dhcp-authoritative
cat >/tmp/udhcpc <<'S'
#!/bin/sh
[ "$1" != bound ] || ip address add "$ip/24" dev "$interface"
S
chmod +x /tmp/udhcpc
boot() {
    ip netns add "$1"
    ip link add "$1" type veth peer name eth0 address "$2" netns "$1"
    ip link set "$1" master br0 up
    ip -n "$1" link set lo up
    ip -n "$1" link set eth0 up
    ip netns exec "$1" udhcpc -i eth0 -n -q -t 20 -T 1 -s /tmp/udhcpc
}
kill_vm() {
    ip link delete "$1"
    ip netns delete "$1"
}

# Install: nothing is started.
dpkg --install /dist/package.deb
[ "$(show ActiveState)" = inactive ]
code=0
systemctl start dhcp-reclaim || code=$?
[ $code != 0 ] || fail "started without a bridge"
[ "$(show ExecMainStatus)" = 2 ]
[ "$(show NRestarts)" = 0 ] || fail "a wrong configuration is tried again"
systemctl reset-failed dhcp-reclaim

# Edit one line, start: ready when systemctl returns.
sed -i 's/^#bridge = .*/bridge = ["br0"]/' $config
systemctl enable --now dhcp-reclaim
[ "$(show ActiveState)" = active ]
show StatusText | grep -q 'on br0'

# A VM boots, and is killed: its lease is given back.
boot vm1 02:00:00:00:00:01
ip=$(awk '/02:00:00:00:00:01/ { print $3 }' /tmp/leases)
await state_is "$ip" bound
kill_vm vm1
await no_lease_of 02:00:00:00:00:01
await state_is "$ip" released
dhcp-reclaim explain "$ip"
dhcp-reclaim events | grep released

# What runs has given up what it does not need.
pid=$(show MainPID)
grep -E '^(Cap|NoNew|Seccomp)' "/proc/$pid/status"
grep -q '^Seccomp:.2$' "/proc/$pid/status"
grep -q '^NoNewPrivs:.1$' "/proc/$pid/status"
grep -q '^CapEff:.0000008000001400$' "/proc/$pid/status"

# Reload: a wrong file is refused and named, and the agent stays; a right one is followed.
cp $config /tmp/right
echo 'rate = 0' >>$config
systemctl reload dhcp-reclaim
await sh -c 'systemctl show --property=StatusText dhcp-reclaim | grep -q "refused: .*rate.*zero"'
cp /tmp/right $config
echo 'rate = 10' >>$config
systemctl reload dhcp-reclaim
await sh -c '! systemctl show --property=StatusText dhcp-reclaim | grep -q refused'
[ "$(show MainPID)" = "$pid" ]

# A stuck loop is restarted by the watchdog, and knows its leases still.
boot vm2 02:00:00:00:00:02
ip=$(awk '/02:00:00:00:00:02/ { print $3 }' /tmp/leases)
await state_is "$ip" bound
mkdir -p /run/systemd/system/dhcp-reclaim.service.d
printf '[Service]\nWatchdogSec=3s\nTimeoutAbortSec=1s\n' >/run/systemd/system/dhcp-reclaim.service.d/quick.conf
systemctl daemon-reload
systemctl restart dhcp-reclaim
before=$(show MainPID)
kill -STOP "$before"
await sh -c "[ \"\$(systemctl show --property=MainPID --value dhcp-reclaim)\" != $before ]"
await state_is "$ip" bound
[ "$(show NRestarts)" = 1 ]
[ "$(show Result)" = success ]

# An upgrade restarts it, and it goes on.
before=$(show MainPID)
dpkg --install /dist/package.deb
[ "$(show MainPID)" != "$before" ] || fail "not restarted by the upgrade"
state_is "$ip" bound
# Whoever was not seen by this agent yet has more time.
dhcp-reclaim probe "$ip"
kill_vm vm2
await no_lease_of 02:00:00:00:00:02

# Stopped, its programs stay; removed, they are gone; purged, its state is, too.
boot vm3 02:00:00:00:00:03
systemctl stop dhcp-reclaim
[ "$(show Result)" = success ]
[ -e /sys/fs/bpf/dhcp-reclaim ]
systemctl start dhcp-reclaim
dpkg --remove dhcp-reclaim
[ ! -e /sys/fs/bpf/dhcp-reclaim ]
[ -e /var/lib/dhcp-reclaim/bindings.redb ]
dpkg --purge dhcp-reclaim
[ ! -e /var/lib/dhcp-reclaim ]
lease_of 02:00:00:00:00:03
