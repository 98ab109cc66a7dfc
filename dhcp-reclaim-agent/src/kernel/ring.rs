//! Records out of the ring buffer. Reading a record and giving its place back are two steps, so that
//! what was done with it is kept somewhere before the ring forgets it: a record that was read by an
//! agent that was killed is read again by the next one.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use aya::{
    Ebpf,
    maps::{Map, MapData, MapInfo},
};
use dhcp_reclaim_ebpf::abi::Record;
use nix::unistd::{SysconfVar, sysconf};
use tokio::io::{Interest, unix::AsyncFd};
use zerocopy::FromBytes as _;

use super::KernelError;

const NAME: &str = "RECORDS";
/// Records that one turn of the loop takes: it must come round to its timers.
pub const BATCH: usize = 256;
/// `BPF_RINGBUF_HDR_SZ`, and the two bits of its length word.
const HEADER: usize = 8;
const BUSY: u32 = 1 << 31;
const DISCARD: u32 = 1 << 30;

/// The agent's end of the ring. Records of an earlier agent's time are still in it.
///
/// Not aya's `RingBuf`: that hands out one item at a time and frees its place when the item is
/// dropped, which would mean a commit of the store for each record.
pub struct RecordRing {
    ring: AsyncFd<Mapped>,
}

impl RecordRing {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        let Some(Map::RingBuf(map)) = ebpf.take_map(NAME) else {
            return Err(KernelError::Object(NAME));
        };
        let ring = Mapped::new(map)?;
        // SAFETY: the descriptor is the map's, which `ring` owns, never closes and never swaps.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
            .map_err(|error| KernelError::Poll(error.into_parts().1))?;
        Ok(Self { ring })
    }

    /// Waits until there is a record to read. Nothing is lost if the future is dropped.
    pub async fn ready(&mut self) -> Result<(), KernelError> {
        loop {
            if self.ring.get_ref().peek().is_some() {
                return Ok(());
            }
            // A record that comes before this line makes the descriptor ready again.
            let mut guard = self.ring.readable_mut().await.map_err(KernelError::Poll)?;
            guard.clear_ready();
        }
    }

    /// The next record that was not read yet. It stays in the ring until [`Self::consume`].
    pub fn read(&mut self) -> Option<Record> {
        self.ring.get_mut().read()
    }

    /// Gives back the places of all records that were read.
    pub fn consume(&mut self) {
        self.ring.get_mut().consume();
    }

    /// Waits for records, and takes at most a batch of them out of the ring.
    pub async fn next_batch(&mut self) -> Result<Vec<Record>, KernelError> {
        loop {
            self.ready().await?;
            let records = self.take_now();
            if !records.is_empty() {
                return Ok(records);
            }
        }
    }

    /// Takes at most a batch of what is there out of the ring, without waiting.
    pub fn take_now(&mut self) -> Vec<Record> {
        let records = std::iter::from_fn(|| self.read()).take(BATCH).collect();
        self.consume();
        records
    }
}

/// The ring, in memory: a page with the consumer's position that we write; one with the producer's,
/// and the data after it, twice in a row so that no record is cut in two (kernel/bpf/ringbuf.c).
struct Mapped {
    map: MapData,
    consumer: NonNull<u8>,
    producer: NonNull<u8>,
    page: usize,
    bytes: usize,
    /// How far we have read; the consumer's position lags behind.
    read: u64,
}

// SAFETY: the mappings belong to the process, not to a thread.
unsafe impl Send for Mapped {}

impl Mapped {
    fn new(map: MapData) -> Result<Self, KernelError> {
        let failed = |source| KernelError::Map {
            name: NAME,
            source: Box::new(aya::maps::MapError::IoError(source)),
        };
        let page = sysconf(SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .and_then(|page| usize::try_from(page).ok())
            .unwrap_or(4096);
        let info: MapInfo = map.info().map_err(|error| KernelError::Map {
            name: NAME,
            source: Box::new(error),
        })?;
        let bytes = info.max_entries() as usize;
        let fd = map.fd().as_fd().as_raw_fd();
        let write = libc::PROT_READ | libc::PROT_WRITE;
        let consumer = map_pages(fd, 0, page, write).map_err(failed)?;
        let producer = match map_pages(fd, page, page + 2 * bytes, libc::PROT_READ) {
            Ok(producer) => producer,
            Err(error) => {
                // SAFETY: the mapping that was just made.
                unsafe { libc::munmap(consumer.as_ptr().cast(), page) };
                return Err(failed(error));
            }
        };
        let mut ring = Self {
            map,
            consumer,
            producer,
            page,
            bytes,
            read: 0,
        };
        ring.read = ring.consumer_position().load(Ordering::Acquire);
        Ok(ring)
    }

    fn consumer_position(&self) -> &AtomicU64 {
        // SAFETY: the first word of a live mapping, aligned to a page.
        unsafe { AtomicU64::from_ptr(self.consumer.as_ptr().cast()) }
    }

    fn producer_position(&self) -> &AtomicU64 {
        // SAFETY: as above; it is only loaded, since the mapping is read-only.
        unsafe { AtomicU64::from_ptr(self.producer.as_ptr().cast()) }
    }

    /// Where the next record's header is, and what it says.
    fn peek(&self) -> Option<(usize, u32)> {
        if self.read >= self.producer_position().load(Ordering::Acquire) {
            return None;
        }
        let mask = self.bytes as u64 - 1; // a power of two, as the kernel demands
        let at = self.page + usize::try_from(self.read & mask).ok()?;
        // SAFETY: within the mapping, since `at` was masked, and a header is aligned to 8 bytes.
        let header = unsafe { AtomicU32::from_ptr(self.producer.add(at).as_ptr().cast()) };
        let header = header.load(Ordering::Acquire);
        // Still being written: what comes after it has to wait.
        (header & BUSY == 0).then_some((at, header))
    }

    fn read(&mut self) -> Option<Record> {
        loop {
            let (at, header) = self.peek()?;
            let length = (header & !(BUSY | DISCARD)) as usize;
            if HEADER + length > self.bytes {
                // The kernel writes no such thing, and nothing beyond could be told.
                return None;
            }
            self.read += (HEADER + length).next_multiple_of(8) as u64;
            if header & DISCARD != 0 {
                continue;
            }
            // SAFETY: within the mapping: the data is there twice, so `at + bytes` is the furthest
            // that a record of at most `bytes` reaches. It is not written to until it is consumed.
            let data = unsafe {
                std::slice::from_raw_parts(self.producer.add(at + HEADER).as_ptr(), length)
            };
            // Only the kernel half writes here, and all that it writes is records.
            if let Ok(record) = Record::read_from_bytes(data) {
                return Some(record);
            }
        }
    }

    fn consume(&mut self) {
        let position = self.consumer_position();
        if position.load(Ordering::Relaxed) == self.read {
            return;
        }
        position.store(self.read, Ordering::Release);
        // The kernel wakes us only if it finds its newest record to be the next one of ours: our
        // position must be there before we look whether there is one (kernel/bpf/ringbuf.c,
        // bpf_ringbuf_commit).
        fence(Ordering::SeqCst);
    }
}

impl AsRawFd for Mapped {
    fn as_raw_fd(&self) -> RawFd {
        self.map.fd().as_fd().as_raw_fd()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mappings that `new` made; nothing that points into them outlives a method.
        unsafe {
            libc::munmap(self.consumer.as_ptr().cast(), self.page);
            libc::munmap(self.producer.as_ptr().cast(), self.page + 2 * self.bytes);
        }
    }
}

fn map_pages(fd: RawFd, offset: usize, length: usize, access: i32) -> io::Result<NonNull<u8>> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: a fresh mapping, at an address of the kernel's choice.
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            access,
            libc::MAP_SHARED,
            fd,
            offset,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(io::Error::last_os_error)
}
