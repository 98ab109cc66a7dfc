//! Leases that were there first: from files at the start, and from the control socket.

use tracing::{info, warn};

use super::{Agent, Clocks, chain};
use crate::{
    control::{
        ErrorCode, ImportRequest, ImportView, LeaseEntry, OrderAnswer, Peer, Refusal, Response,
        client_id_bytes,
    },
    core::{Import, Key, SegmentId},
    leasefile::{self, PlaceError},
};

impl Agent {
    /// Those of the settings. A file that cannot be read keeps nobody from starting.
    pub(super) async fn import_files(&mut self) {
        for spec in self.settings.imports.clone() {
            let read = leasefile::read(&spec.path, spec.format);
            let imported = read.map_err(|error| chain(&error));
            let imported = imported.and_then(|(format, leases)| {
                let place = spec.placed(format).map_err(|error| error.to_string())?;
                let leases = leases.into_iter().map(LeaseEntry::from).collect();
                let request = ImportRequest {
                    leases,
                    ..ImportRequest::of(&place)
                };
                self.import(request).map_err(|error| error.to_string())
            });
            if let Err(error) = imported {
                self.counters.import_failures += 1;
                warn!(file = %spec, error, "not imported");
            }
        }
        self.carry_out().await;
    }

    pub(super) async fn import_ordered(&mut self, request: ImportRequest, by: Peer) -> OrderAnswer {
        let told = request.leases.len();
        let view = self
            .import(request)
            .map_err(|error| Refusal::new(ErrorCode::BadRequest, error.to_string()))?;
        let text = format!(
            "{told} leases: {} taken, {} known, {} over, {} refused",
            view.taken, view.known, view.over, view.refused
        );
        self.write_down(by, "import", Some(text));
        self.carry_out().await;
        Ok(vec![Response::Imported(view)])
    }

    fn import(&mut self, request: ImportRequest) -> Result<ImportView, PlaceError> {
        let segment = self.import_segment(request.bridge.as_deref())?;
        // Untagged where the bridge's own address is: its VLAN, if it tells VLANs apart.
        let vlan = match request.vlan {
            0 => self.own_vlan(segment).unwrap_or(0),
            named => named,
        };
        let clocks = Clocks::now();
        let told = request.leases.len();
        let imports: Vec<Import> = request
            .leases
            .into_iter()
            .filter_map(|lease| {
                let client_id = match lease.client_id.as_deref() {
                    None => None,
                    Some(text) => Some(client_id_bytes(text)?),
                };
                Some(Import {
                    key: Key {
                        segment,
                        vlan,
                        ip: lease.ip,
                    },
                    chaddr: lease.mac,
                    client_id,
                    server: request.server,
                    server_mac: request.server_mac,
                    expires: lease.expires_at.map(|at| clocks.monotonic_at(at)),
                })
            })
            .collect();
        let unreadable = (told - imports.len()) as u64;
        let count = self.engine.import(imports, clocks.monotonic);
        let view = ImportView {
            taken: count.taken,
            known: count.known,
            over: count.over,
            refused: count.refused + unreadable,
        };
        let bridge = self.segments.name(segment).unwrap_or("?");
        info!(
            bridge,
            taken = view.taken,
            known = view.known,
            over = view.over,
            refused = view.refused,
            "imported"
        );
        Ok(view)
    }

    fn import_segment(&self, bridge: Option<&str>) -> Result<SegmentId, PlaceError> {
        let name = match (bridge, self.settings.bridges.as_slice()) {
            (Some(name), _) => name,
            (None, [only]) => only,
            (None, _) => return Err(PlaceError::Bridge),
        };
        let id = self.segments.id(name);
        id.ok_or_else(|| PlaceError::UnknownBridge(name.to_owned()))
    }
}
