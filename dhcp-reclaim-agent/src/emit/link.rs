//! The private link: a veth pair that nobody listens to. What is sent on it passes `emit`, which
//! redirects or drops it.

use std::fs;

use futures::TryStreamExt as _;
use rtnetlink::{Handle, LinkUnspec, LinkVeth};

use super::{EmitError, PacketSocket, sys};
use crate::core::IfIndex;

const NAME: &str = "dreclaim0";
const PEER: &str = "dreclaim1";

/// Removed when dropped.
#[derive(Debug)]
pub struct PrivateLink {
    ifindex: IfIndex,
    socket: PacketSocket,
}

impl PrivateLink {
    /// Makes the pair anew, in the place of one that a crashed agent left. Program `emit` is to be
    /// attached to [`ifindex`](Self::ifindex) before anything is sent.
    pub async fn create(handle: &Handle) -> Result<Self, EmitError> {
        let error = |what| {
            move |source| EmitError::Link {
                what,
                interface: NAME,
                source: Box::new(source),
            }
        };
        let socket = PacketSocket::open()?;
        if let Some(stale) = find(handle).await {
            handle
                .link()
                .del(stale)
                .execute()
                .await
                .map_err(error("remove the stale"))?;
        }
        handle
            .link()
            .add(LinkVeth::new(NAME, PEER).build())
            .execute()
            .await
            .map_err(error("create"))?;
        let ifindex = find(handle).await.ok_or(EmitError::Missing(NAME))?;
        // From here on, what fails takes the pair along.
        let link = Self { ifindex, socket };
        for name in [NAME, PEER] {
            // No neighbour discovery where nobody is; without IPv6 there is no such file.
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
            let up = LinkUnspec::new_with_name(name).up().build();
            handle
                .link()
                .set(up)
                .execute()
                .await
                .map_err(error("raise"))?;
        }
        Ok(link)
    }

    pub const fn ifindex(&self) -> IfIndex {
        self.ifindex
    }

    /// Sends a RELEASE through `emit`. That it returns `Ok` says only that the frame got there: what
    /// became of it is for `Kernel::verdict` to say.
    pub fn send_release(&self, frame: &[u8]) -> Result<(), EmitError> {
        match self.socket.send(self.ifindex, frame) {
            // How the kernel tells the sender that an egress program dropped the frame.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            Err(source) => Err(EmitError::Send {
                interface: NAME.to_owned(),
                source,
            }),
            Ok(()) => Ok(()),
        }
    }
}

impl Drop for PrivateLink {
    fn drop(&mut self) {
        if let Err(error) = sys::delete_link(self.ifindex) {
            tracing::debug!(interface = NAME, %error, "cannot remove the private link");
        }
    }
}

async fn find(handle: &Handle) -> Option<IfIndex> {
    let mut links = handle.link().get().match_name(NAME.to_owned()).execute();
    // Not found is an error here.
    let link = links.try_next().await.ok().flatten()?;
    Some(link.header.index)
}
