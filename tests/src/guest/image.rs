//! What a guest boots: a kernel of Debian's, busybox, two DHCP clients with Debian's own scripts, and a
//! first process that does what a line tells it to.
use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    boot::{Initramfs, Kernel, KernelVersion, initramfs::MODULES},
    sandbox::{DIR, find, run},
};

/// One that `cargo xtask test` fetches anyway.
pub const KERNEL: KernelVersion = KernelVersion::V6_12;

#[derive(Clone, Debug)]
pub struct Image {
    pub kernel: Kernel,
    pub(super) initramfs: PathBuf,
}

impl Image {
    /// Makes it, in the sandbox's folder, from this host's programs and a kernel that was fetched.
    pub fn new() -> Result<Self> {
        let kernel = Kernel::find(KERNEL, &Kernel::store())?;
        let mut initramfs = Initramfs::new()?;
        // busybox's own `ip` does not know all that dhclient's script wants of it.
        for program in ["busybox", "dhclient", "ip"] {
            initramfs.program(program)?;
        }
        initramfs.copy(&find("dhclient-script").context("dhclient-script is not installed")?)?;
        for path in ["/etc/dhcp/dhclient.conf", UDHCPC_DEFAULT] {
            initramfs.copy(Path::new(path))?;
        }
        let busybox = find("busybox").context("busybox is not installed")?;
        for applet in run(Command::new(&busybox).arg("--list"))?.lines() {
            initramfs.link(&Path::new("/usr/bin").join(applet), &busybox);
        }
        for module in ["virtio_pci", "virtio_net"] {
            initramfs.module(&kernel, module)?;
        }
        initramfs.file(Path::new("/etc/fstab"), 0o644, "");
        initramfs.dir(Path::new("/var/lib/dhcp"));
        initramfs.link(Path::new("/var/run"), "/run");
        initramfs.file(Path::new(UDHCPC_SCRIPT), 0o755, UDHCPC_SAYS);
        let hook = Path::new("/etc/dhcp/dhclient-exit-hooks");
        initramfs.file(hook, 0o644, DHCLIENT_SAYS);
        initramfs.file(
            Path::new("/init"),
            0o755,
            INIT.replace("@MODULES@", MODULES),
        );

        let path = Path::new(DIR).join("guest.cpio");
        fs::create_dir_all(DIR)?;
        initramfs.write(&path)?;
        Ok(Self {
            kernel,
            initramfs: path,
        })
    }
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let release = &self.kernel.release;
        write!(f, "qemu with Linux {release}, busybox, udhcpc or dhclient")
    }
}

const UDHCPC_DEFAULT: &str = "/etc/udhcpc/default.script";
const UDHCPC_SCRIPT: &str = "/etc/udhcpc/say.script";

/// Debian's script, and then a line to whoever listens.
const UDHCPC_SAYS: &str = r#"#!/bin/sh
/etc/udhcpc/default.script "$@"
case "$1" in
bound | renew) echo "lease $ip" >/dev/ttyS1 ;;
esac
"#;

const DHCLIENT_SAYS: &str = r#"
case "$reason" in
BOUND | RENEW | REBIND | REBOOT) echo "lease $new_ip_address" >/dev/ttyS1 ;;
esac
"#;

/// The kernel makes `NAME=value` of its command line the environment of its first process.
const INIT: &str = r#"#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in @MODULES@/*.ko; do insmod "$module"; done
hostname "$NAME"
ip link set lo up
stty -F /dev/ttyS1 raw -echo
case "$CLIENT" in
udhcpc) udhcpc -f -i eth0 -t 20 -T 1 -A 1 -x "hostname:$NAME" -s /etc/udhcpc/say.script & ;;
dhclient) dhclient -d eth0 & ;;
esac
while :; do
    while read -r number command; do
        sh -c "$command" </dev/null 2>&1
        echo "done $number $?"
    done </dev/ttyS1 >/dev/ttyS1
done
"#;
