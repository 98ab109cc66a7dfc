//! Names and addresses that tests, the demo and their readers share.
use std::{fmt, net::Ipv4Addr, str::FromStr};

use anyhow::{Context as _, ensure};

pub const BRIDGE: &str = "br0";
pub const UPLINK: &str = "uplink0";
/// What a VM, and a server in its own namespace, call their only link.
pub const NIC: &str = "eth0";
/// What its link is on, where that tags its frames.
pub const TRUNK: &str = "trunk0";

pub const BRIDGE_MAC: Mac = Mac([0x02, 0xdc, 0, 0, 0, 0x01]);
pub const UPLINK_MAC: Mac = Mac([0x02, 0xdc, 0, 0, 0, 0x02]);
pub const SERVER_MAC: Mac = Mac([0x02, 0xdc, 0, 0, 0, 0x03]);

pub const SERVER_IP: Ipv4Addr = Ipv4Addr::new(10, 67, 0, 1);
pub const BROADCAST_IP: Ipv4Addr = Ipv4Addr::new(10, 67, 0, 255);
pub const PREFIX: u8 = 24;

/// Longer than any test, so that only a RELEASE frees an address.
pub const LEASE_SECONDS: u32 = 3600;

/// The MAC of the VM with this number.
pub const fn vm_mac(number: u8) -> Mac {
    Mac([0x02, 0xda, 0, 0, 0, number])
}

/// The `n`th address of the pool, from zero.
pub const fn pool_ip(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 67, 0, 100 + n)
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts
                .next()
                .with_context(|| format!("short MAC {text:?}"))?;
            *byte = u8::from_str_radix(part, 16).with_context(|| format!("bad MAC {text:?}"))?;
        }
        ensure!(parts.next().is_none(), "long MAC {text:?}");
        Ok(Self(mac))
    }
}
