//! `import`: leases that were there before the agent was.

use std::{net::Ipv4Addr, path::PathBuf};

use super::{Query, print, unexpected};
use crate::{
    config::{ConfigError, ImportError},
    control::{ImportRequest, ImportView, LeaseEntry, Request, Response, json_line},
    core::{MacAddr, Vlan},
    leasefile::{self, Format, ImportSpec, Place},
};

/// What one request may hold: the agent takes lines of 64 KiB.
const CHUNK_BYTES: usize = 48 << 10;

/// Tell the agent of leases that were there first, from the lease files of a server
///
/// For VMs that ran before the agent did: dnsmasq's lease file, Kea's memfile (CSV) or libvirt's
/// BRIDGE.status. An imported lease was not seen on the wire: nothing of it is released before its VM
/// was seen alive at a port here, with that MAC and that address, and whatever is seen on the wire
/// takes its place.
///
/// All files are read before anything is told. With --json: one object.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Lease files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// What the files are, if their contents do not tell
    #[arg(long)]
    format: Option<Format>,
    /// The bridge that the leases belong to [default: the only one; of libvirt, by the file's name]
    #[arg(long, value_name = "NAME")]
    bridge: Option<String>,
    /// The VLAN that they belong to, on a bridge that filters VLANs or with guests that tag
    #[arg(long, value_name = "ID", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..4095))]
    vlan: Vlan,
    /// The server that granted them [default, of libvirt: the bridge's own address]
    #[arg(long, value_name = "IP")]
    server: Option<Ipv4Addr>,
    /// The MAC of a server on the link, to send RELEASEs to before anything of it was heard
    #[arg(long, value_name = "MAC")]
    server_mac: Option<MacAddr>,
    #[command(flatten)]
    query: Query,
}

pub fn main(args: &Args) -> anyhow::Result<()> {
    let mut requests = Vec::new();
    for file in &args.files {
        let spec = ImportSpec {
            path: file.clone(),
            format: args.format,
            place: Place {
                bridge: args.bridge.clone(),
                vlan: args.vlan,
                server: args.server,
                server_mac: args.server_mac,
            },
        };
        let (format, leases) = leasefile::read(file, args.format)?;
        let place = spec.placed(format).map_err(|source| {
            ConfigError::Import(ImportError {
                path: file.clone(),
                source,
            })
        })?;
        let entries = leases.into_iter().map(LeaseEntry::from);
        requests.extend(chunks(&place, entries)?);
    }
    let mut total = ImportView::default();
    for request in requests {
        args.query.ask(&Request::Import(request), |answer| {
            let Response::Imported(view) = answer else {
                return Err(unexpected(&answer));
            };
            total.taken += view.taken;
            total.known += view.known;
            total.over += view.over;
            total.refused += view.refused;
            Ok(())
        })?;
    }
    print(&if args.query.json {
        json_line(&total)? + "\n"
    } else {
        for_people(&total)
    })
}

fn chunks(
    place: &Place,
    entries: impl Iterator<Item = LeaseEntry>,
) -> anyhow::Result<Vec<ImportRequest>> {
    let mut requests = Vec::new();
    let mut request = ImportRequest::of(place);
    let mut bytes = 0;
    for entry in entries {
        let length = serde_json::to_string(&entry)?.len() + 1;
        if bytes + length > CHUNK_BYTES {
            bytes = 0;
            requests.push(std::mem::replace(&mut request, ImportRequest::of(place)));
        }
        bytes += length;
        request.leases.push(entry);
    }
    requests.push(request);
    Ok(requests)
}

fn for_people(total: &ImportView) -> String {
    let ImportView {
        taken,
        known,
        over,
        refused,
    } = total;
    format!(
        "{taken} taken: their VMs are looked for; {known} known already, {over} over, {refused} refused\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::client_id_text;

    #[test]
    fn a_request_fits_a_line_whatever_the_client_ids() {
        let entry = |n: u32| LeaseEntry {
            ip: Ipv4Addr::from(0x0a00_0000 + n),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            client_id: Some(client_id_text(&[7; 255])),
            expires_at: None,
        };
        let place = Place::default();
        let requests = chunks(&place, (0..1000).map(entry)).unwrap();
        let count: usize = requests.iter().map(|request| request.leases.len()).sum();
        assert_eq!(count, 1000);
        for request in requests {
            let line = serde_json::to_string(&Request::Import(request)).unwrap();
            assert!(line.len() < 60_000, "{}", line.len());
        }
    }
}
