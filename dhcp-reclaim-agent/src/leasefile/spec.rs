//! Which file, and what it does not say itself: the bridge, the VLAN and the server.

use std::{fmt, net::Ipv4Addr, path::PathBuf, str::FromStr};

use clap::ValueEnum as _;
use nix::ifaddrs::getifaddrs;
use serde::{Deserialize, de};

use super::Format;
use crate::core::{MacAddr, Vlan};

/// Where the leases of a file belong: no format says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub bridge: Option<String>,
    pub vlan: Vlan,
    /// Option 54 of its answers, and where a RELEASE goes.
    pub server: Option<Ipv4Addr>,
    /// Of a server on the link, if it was never heard.
    pub server_mac: Option<MacAddr>,
}

/// `PATH[,server=IP][,bridge=NAME][,vlan=N][,server-mac=MAC][,format=F]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportSpec {
    pub path: PathBuf,
    pub format: Option<Format>,
    pub place: Place,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no import: expected PATH,server=IP and what else it takes of bridge=NAME, vlan=N, server-mac=MAC, format=dnsmasq|kea|libvirt"
)]
pub struct ParseSpecError(String);

/// What has to be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    #[error(
        "which server granted them is not said: name it with `--server IP` (`server=IP` in a setting)"
    )]
    Server,
    #[error(
        "which bridge they belong to is not said, and several are followed: name it with `--bridge NAME` (`bridge=NAME` in a setting)"
    )]
    Bridge,
    #[error("bridge {0} is not followed by the agent: name one that is, with `--bridge NAME`")]
    UnknownBridge(String),
}

impl FromStr for ImportSpec {
    type Err = ParseSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseSpecError(text.escape_debug().to_string());
        let mut parts = text.split(',');
        let path = parts.next().filter(|path| !path.is_empty());
        let mut spec = Self {
            path: path.ok_or_else(wrong)?.into(),
            format: None,
            place: Place::default(),
        };
        for part in parts {
            let (name, value) = part.split_once('=').ok_or_else(wrong)?;
            match name {
                "server" => spec.place.server = Some(value.parse().map_err(|_| wrong())?),
                "server-mac" => spec.place.server_mac = Some(value.parse().map_err(|_| wrong())?),
                "bridge" => spec.place.bridge = Some(value.to_owned()),
                "vlan" => spec.place.vlan = value.parse().map_err(|_| wrong())?,
                "format" => {
                    spec.format = Some(Format::from_str(value, false).map_err(|_| wrong())?)
                }
                _ => return Err(wrong()),
            }
        }
        Ok(spec)
    }
}

impl fmt::Display for ImportSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

impl<'de> Deserialize<'de> for ImportSpec {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl ImportSpec {
    /// What is known of the place once the file's format is: libvirt names the file by the bridge, and
    /// its dnsmasq serves at the bridge's own address.
    pub fn placed(&self, format: Format) -> Result<Place, PlaceError> {
        let mut place = self.place.clone();
        if format == Format::Libvirt {
            let stem = self.path.file_stem().map(|stem| stem.to_string_lossy());
            let status = self.path.extension().is_some_and(|end| end == "status");
            if place.bridge.is_none() && status {
                place.bridge = stem.map(std::borrow::Cow::into_owned);
            }
            if place.server.is_none() {
                place.server = place.bridge.as_deref().and_then(only_address);
            }
        }
        if place.server.is_none() {
            return Err(PlaceError::Server);
        }
        Ok(place)
    }
}

/// The IPv4 address of an interface that has one, and no second.
fn only_address(name: &str) -> Option<Ipv4Addr> {
    let all = getifaddrs()
        .ok()?
        .filter(|found| found.interface_name == name);
    let mut ips = all.filter_map(|found| Some(found.address?.as_sockaddr_in()?.ip()));
    let first = ips.next()?;
    ips.next().is_none().then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_is_a_path_and_what_the_file_does_not_say() {
        let spec: ImportSpec = "/l,server=10.0.0.1,bridge=br0,vlan=7,format=kea"
            .parse()
            .unwrap();
        assert_eq!(spec.path, PathBuf::from("/l"));
        assert_eq!(spec.format, Some(Format::Kea));
        let place = spec.placed(Format::Kea).unwrap();
        assert_eq!((place.bridge.as_deref(), place.vlan), (Some("br0"), 7));
        for wrong in [
            "",
            ",server=10.0.0.1",
            "/l,server",
            "/l,server=x",
            "/l,color=red",
        ] {
            assert!(wrong.parse::<ImportSpec>().is_err(), "{wrong}");
        }
        let plain: ImportSpec = "/l".parse().unwrap();
        assert_eq!(plain.placed(Format::Dnsmasq), Err(PlaceError::Server));
    }

    #[test]
    fn libvirts_server_is_at_its_bridge() {
        let spec: ImportSpec = "/var/lib/libvirt/dnsmasq/lo.status".parse().unwrap();
        let place = spec.placed(Format::Libvirt).unwrap();
        assert_eq!(place.bridge.as_deref(), Some("lo"));
        assert_eq!(place.server, Some(Ipv4Addr::LOCALHOST));
        let gone: ImportSpec = "/var/lib/libvirt/dnsmasq/nobridge.status".parse().unwrap();
        assert_eq!(gone.placed(Format::Libvirt), Err(PlaceError::Server));
    }
}
