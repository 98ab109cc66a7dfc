//! The bridges' own addresses. A mass of RELEASEs asks for them at once.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::Ipv4Addr,
    time::Duration,
};

use crate::{
    clock,
    core::{IfIndex, Time},
    ports::{AddressError, local_networks},
};

/// What was read is good for this long.
const FRESH: Duration = Duration::from_secs(1);

/// Addresses with the lengths of their prefixes, by bridge.
#[derive(Debug, Default)]
pub(super) struct Addresses(BTreeMap<IfIndex, (Time, Vec<(Ipv4Addr, u8)>)>);

impl Addresses {
    pub(super) async fn of(&mut self, bridge: IfIndex) -> Result<&[(Ipv4Addr, u8)], AddressError> {
        let now = clock::monotonic();
        self.0.retain(|_, (at, _)| now.since(*at) < FRESH);
        let (_, networks) = match self.0.entry(bridge) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(none) => none.insert((now, local_networks(bridge).await?)),
        };
        Ok(networks)
    }
}
