//! Capabilities: three of some forty stay.

use caps::{CapSet, Capability, CapsHashSet};

use super::SandboxError;

/// What a running agent needs: docs/security.md says what for.
pub const KEPT: [Capability; 3] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_BPF,
];

pub(super) fn drop_all_but(kept: &[Capability]) -> Result<(), SandboxError> {
    let failed = SandboxError::Capabilities;
    let kept: CapsHashSet = kept.iter().copied().collect();
    let bounding = caps::read(None, CapSet::Bounding).map_err(failed)?;
    for capability in bounding.difference(&kept) {
        // Needs CAP_SETPCAP, which a service manager may have kept to itself. Nothing can be gained
        // by this set anyway, once new privileges are given up.
        let _ = caps::drop(None, CapSet::Bounding, *capability);
    }
    caps::clear(None, CapSet::Ambient).map_err(failed)?;
    // Effective first: it must be part of what is permitted.
    for set in [CapSet::Effective, CapSet::Permitted] {
        let has = caps::read(None, set).map_err(failed)?;
        let left = has.intersection(&kept).copied().collect();
        caps::set(None, set, &left).map_err(failed)?;
    }
    caps::clear(None, CapSet::Inheritable).map_err(failed)
}
