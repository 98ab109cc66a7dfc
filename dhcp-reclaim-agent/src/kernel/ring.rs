//! Records out of the ring buffer, in batches.

use aya::{
    Ebpf,
    maps::{MapData, RingBuf},
};
use dhcp_reclaim_ebpf::abi::Record;
use tokio::io::{Interest, unix::AsyncFd};
use zerocopy::FromBytes as _;

use super::KernelError;

/// Records that one turn of the loop takes: it must come round to its timers.
const BATCH: usize = 256;

/// The agent's end of the ring. Records of an earlier agent's time are still in it.
pub struct RecordRing {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl RecordRing {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        const NAME: &str = "RECORDS";

        let map = ebpf.take_map(NAME).ok_or(KernelError::Object(NAME))?;
        let ring = RingBuf::try_from(map).map_err(|error| KernelError::Map {
            name: NAME,
            source: Box::new(error),
        })?;
        // SAFETY: the descriptor is the map's, which `ring` owns, never closes and never swaps.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
            .map_err(|error| KernelError::Poll(error.into_parts().1))?;
        Ok(Self { ring })
    }

    /// Waits for records, and takes at most a batch of them. Nothing is lost if the future is
    /// dropped.
    pub async fn next_batch(&mut self) -> Result<Vec<Record>, KernelError> {
        loop {
            let records = self.take_now();
            if !records.is_empty() {
                return Ok(records);
            }
            // A record that comes before this line makes the descriptor ready again.
            let mut guard = self.ring.readable_mut().await.map_err(KernelError::Poll)?;
            guard.clear_ready();
        }
    }

    /// What is there, without waiting.
    pub fn take_now(&mut self) -> Vec<Record> {
        let ring = self.ring.get_mut();
        let mut records = Vec::new();
        while records.len() < BATCH {
            let Some(item) = ring.next() else { break };
            // Only the kernel half writes here, and all that it writes is records.
            if let Ok(record) = Record::read_from_bytes(&item) {
                records.push(record);
            }
        }
        records
    }
}
