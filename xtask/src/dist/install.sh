#!/bin/sh
# In a mount namespace of its own: installs the package into a chroot, looks at what is there, and
# takes it away again. No service manager runs in there.
set -eu
base=$1 work=$2 deb=$3 version=$4

fail() {
    echo "FAILED: $*" >&2
    exit 1
}
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay overlay -o "lowerdir=$base,upperdir=$work/upper,workdir=$work/work" "$work/root"
root=$work/root
mount -t proc proc "$root/proc"
inside() { chroot "$root" "$@"; }
config=/etc/dhcp-reclaim/dhcp-reclaim.toml

cp "$deb" "$root/tmp/package.deb"
inside dpkg --install /tmp/package.deb
for file in /usr/bin/dhcp-reclaim /lib/systemd/system/dhcp-reclaim.service $config \
    /usr/share/man/man1/dhcp-reclaim.1.gz /usr/share/man/man1/dhcp-reclaim-run.1.gz \
    /usr/share/bash-completion/completions/dhcp-reclaim \
    /usr/share/zsh/vendor-completions/_dhcp-reclaim \
    /usr/share/fish/vendor_completions.d/dhcp-reclaim.fish \
    /usr/share/doc/dhcp-reclaim/copyright /usr/share/doc/dhcp-reclaim/dhcp-reclaim.cdx.json \
    /usr/share/doc/dhcp-reclaim/README.md /usr/share/doc/dhcp-reclaim/docs/getting-started.md \
    /usr/share/doc/dhcp-reclaim/packaging/prometheus/dhcp-reclaim.rules.yml \
    /usr/share/doc/dhcp-reclaim/packaging/grafana/dhcp-reclaim.json \
    /usr/share/doc/dhcp-reclaim/packaging/kubernetes/dhcp-reclaim.yaml; do
    [ -s "$root$file" ] || fail "no $file"
done
told=$(inside dhcp-reclaim --version)
[ "$told" = "dhcp-reclaim $version" ] || fail "--version says $told"
[ "$(inside dpkg-query --show --showformat='${Depends}' dhcp-reclaim)" = "" ] || fail "it has dependencies"
inside man dhcp-reclaim-run | grep -q -e --hold-down || fail "the manual lacks --hold-down"
bash -n "$root/usr/share/bash-completion/completions/dhcp-reclaim"
inside systemd-analyze verify dhcp-reclaim.service
inside systemd-analyze security --offline=true --threshold=24 dhcp-reclaim.service >/dev/null ||
    fail "the unit is exposed too much"

# What is installed cannot start before it is configured, and says so.
code=0
inside dhcp-reclaim run --check --config $config || code=$?
[ $code = 2 ] || fail "the file without a bridge gives $code"
code=0
inside dhcp-reclaim list || code=$?
[ $code = 3 ] || fail "list without an agent gives $code"
sed -i 's/^#bridge = .*/bridge = ["br0"]/' "$root$config"
inside dhcp-reclaim run --check --config $config
mkdir -p "$root/var/lib/dhcp-reclaim"
touch "$root/var/lib/dhcp-reclaim/bindings.redb"

# The operator's file survives whatever happens to the package, and only a purge takes it away.
inside dpkg --install /tmp/package.deb
grep -q '^bridge' "$root$config" || fail "installing again took the configuration back"
inside dpkg --remove dhcp-reclaim
[ ! -e "$root/usr/bin/dhcp-reclaim" ] || fail "removed, and the binary is there"
grep -q '^bridge' "$root$config" || fail "removing took the configuration away"
[ -e "$root/var/lib/dhcp-reclaim/bindings.redb" ] || fail "removing took the state away"
inside dpkg --purge dhcp-reclaim
left=$(find "$root/etc" "$root/usr" "$root/lib" "$root/var/lib/dhcp-reclaim" -name '*dhcp-reclaim*' \
    2>/dev/null || true)
[ -z "$left" ] || fail "purged, and left: $left"
[ ! -e "$root/var/lib/dhcp-reclaim" ] || fail "purged, and the state is there"
