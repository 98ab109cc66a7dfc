//! Filters on a port's clsact, as the kernel lists them: aya can take one away by its name, and so
//! cannot set the next one first.

use std::io;

use aya::programs::{
    TcAttachType,
    tc::{SchedClassifierLink, TcHandle},
};
use netlink_packet_route::{RouteNetlinkMessage, tc::TcMessage};
use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage},
    sys::protocols::NETLINK_ROUTE,
};

use crate::{
    core::IfIndex,
    netlink::{self, attribute, text, u32_at},
};

const RTM_NEWTFILTER: u16 = 44;
/// `struct tcmsg`.
const HEADER: usize = 20;
const TCM_HANDLE: usize = 8;
const TCM_INFO: usize = 16;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;
/// `TC_H_MAKE(TC_H_CLSACT, ...)`.
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;

/// A BPF program on one way of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    name: String,
    pub(super) program: u32,
    priority: u16,
    handle: u32,
}

impl Filter {
    /// Takes it off. Gone already: so much the better.
    pub(super) fn remove(&self, interface: &str, way: TcAttachType) {
        let handle = TcHandle::from(self.handle);
        let link = SchedClassifierLink::attached(interface, way, self.priority, handle, None);
        // Dropped, it is detached.
        drop(link);
    }
}

/// The filters with a program of this name, on one way of a port.
pub(super) fn with_name(
    ifindex: IfIndex,
    way: TcAttachType,
    name: &str,
) -> io::Result<Vec<Filter>> {
    let parent = match way {
        TcAttachType::Ingress => INGRESS,
        TcAttachType::Egress => EGRESS,
        TcAttachType::Custom(parent) => parent,
    };
    let mut filters = list(ifindex, parent)?;
    filters.retain(|filter| filter.name == name);
    Ok(filters)
}

fn list(ifindex: IfIndex, parent: u32) -> io::Result<Vec<Filter>> {
    let mut ask = TcMessage::default();
    ask.header.index = ifindex.cast_signed();
    ask.header.parent = parent.into();
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetTrafficFilter(ask));
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut request = vec![0; message.buffer_len()];
    message.serialize(&mut request);

    let mut filters = Vec::new();
    netlink::dump(NETLINK_ROUTE, &request, |kind, payload| {
        if kind == RTM_NEWTFILTER {
            filters.extend(filter(payload));
        }
    })?;
    Ok(filters)
}

/// `None` for what is no BPF filter.
fn filter(payload: &[u8]) -> Option<Filter> {
    let (header, attributes) = payload.split_at_checked(HEADER)?;
    let options = attribute(attributes, TCA_OPTIONS)?;
    Some(Filter {
        name: text(&options, TCA_BPF_NAME)?,
        program: u32_at(&attribute(&options, TCA_BPF_ID)?, 0)?,
        priority: (u32_at(header, TCM_INFO)? >> 16) as u16,
        handle: u32_at(header, TCM_HANDLE)?,
    })
}
